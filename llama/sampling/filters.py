"""Leaves tokens out before one is drawn: top_k, top_p, min_p, typical_p and XTC, pure functions of rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.sampling.params import SamplingParams
from llama.sampling.sampler import SMALLEST, TOP_K_PREFIX, first_in_order, has_xtc, is_filtered

# How many tokens more than top_k are looked at first: as many may tie with the last.
MOST_TIES = 32

# Of any vocabulary: fp32 represents every integer only up to here.
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class FilterTensors:
    """What filters leave of the rows that are drawn together, on their device; all tensors are (n,), most fp32.

    A value that leaves nothing out: top_k infinite, top_p 1, min_p 0, typical_p 1, xtc_probability 0. A row that uses
    none but top_p is left to the sampler, and has them all, as has a greedy row.
    is_filtered: (n,), bool: whether a row uses any.
    kinds: which filters occur among the rows, by their parameters' names and "xtc", so which operations run; "none"
    where a row has none.
    width: how many of the greatest logits hold all that the rows can keep; 0 where a row may keep more.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    xtc_probability: Tensor
    xtc_threshold: Tensor
    is_filtered: Tensor
    kinds: frozenset[str]
    width: int

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device | str) -> FilterTensors | None:
        """Take the filters of each row to a device; None where no row has any."""
        rows = [_values(each) for each in params]
        filtered = [is_filtered(each) for each in params]
        if not any(filtered):
            return None
        kinds = {
            kind
            for row in rows
            for kind, value, off in zip((*_NEUTRAL, "xtc"), row, _NEUTRAL.values(), strict=False)
            if value != off
        }
        largest = max(row[0] for row, used in zip(rows, filtered, strict=True) if used)
        width = int(largest) + MOST_TIES if largest <= TOP_K_PREFIX else 0
        values = torch.tensor(rows, dtype=torch.float32, device="cpu").T.contiguous().to(device)
        top_k, top_p, min_p, typical_p, probability, threshold = values
        used = torch.tensor(filtered, device="cpu").to(device)
        occurring = frozenset(kinds if all(filtered) else kinds | {"none"})
        return FilterTensors(top_k, top_p, min_p, typical_p, probability, threshold, used, occurring, width)

    def apply(self, logits: Tensor, temperature: Tensor, xtc_uniform: Tensor | None = None) -> Tensor:
        """Return logits whose left out tokens are -inf, (n, vocab_size), not divided by the temperature.

        logits: (n, vocab_size), fp32; temperature: (n,); xtc_uniform: (n,), in [0, 1), random numbers that nothing
        else is decided by. A row without filters is returned bit for bit, and none depends on the others. Of a row
        that is not all numbers nothing is left, so that the sampler's token is INVALID.
        """
        if (tokens := self._greatest(logits)) is None:
            kept = self._apply(logits, temperature, xtc_uniform)
        else:
            short = self._apply(logits.gather(-1, tokens), temperature, xtc_uniform)
            kept = torch.full_like(logits, -torch.inf).scatter_(-1, tokens, short)
        return kept if "none" not in self.kinds else kept.where(self.is_filtered[:, None], logits)

    def _greatest(self, logits: Tensor) -> Tensor | None:
        """Return the tokens of the greatest logits by id, (n, width), if they hold all that top_k keeps, with ties."""
        if not 0 < self.width < logits.shape[-1]:
            return None
        greatest, tokens = logits.topk(self.width)
        last = greatest.gather(-1, (self.top_k.clamp(max=self.width)[:, None] - 1).long())
        are_enough = (greatest[:, -1:] < last) | ~self.is_filtered[:, None]
        return tokens.sort(-1)[0] if bool(are_enough.all()) else None

    def _apply(self, logits: Tensor, temperature: Tensor, xtc_uniform: Tensor | None) -> Tensor:
        """Do as `apply`, for any columns that hold the tokens in order of their ids."""
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=SMALLEST)[:, None]
        probs = scaled.exp()  # over the likeliest one's; 0 where a token is left out
        if "top_k" in self.kinds:
            probs = _keep_first(logits, (probs > 0).float(), self.top_k[:, None] - 1, probs)
        if "top_p" in self.kinds:
            probs = _keep_first(logits.where(probs > 0, -torch.inf), probs, _limit(self.top_p, probs), probs)
        if "min_p" in self.kinds:
            probs = probs.where(probs >= self.min_p[:, None], 0)
        if "typical_p" in self.kinds:
            # A token's surprise less the expected one is what its scaled logit is below their mean.
            mean = _total(probs * scaled.where(probs > 0, 0)) / _total(probs)
            nearness = -(scaled - mean).abs().where(probs > 0, torch.inf)
            probs = _keep_first(nearness, probs, _limit(self.typical_p, probs), probs)
        if "xtc" in self.kinds:
            assert xtc_uniform is not None, "XTC has random numbers of its own"
            probs = self._apply_xtc(logits, probs, xtc_uniform[:, None])
        return logits.where(probs > 0, -torch.inf)

    def _apply_xtc(self, logits: Tensor, probs: Tensor, uniform: Tensor) -> Tensor:
        """Leave out all tokens that reach the threshold but the last of them in order."""
        top = (probs > 0) & (probs >= self.xtc_threshold[:, None] * _total(probs))
        lowest = logits.where(top, torch.inf).amin(-1, keepdim=True)
        places = torch.arange(probs.shape[-1], device=probs.device)
        last = places.where(top & (logits == lowest), -1).amax(-1, keepdim=True)
        return probs.where(~top | (places == last) | (uniform >= self.xtc_probability[:, None]), 0)


# What leaves nothing out, by the fields' order.
_NEUTRAL = {"top_k": torch.inf, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "xtc": 0.0}


def _values(params: SamplingParams) -> list[float]:
    """Return a row's values, in the fields' order."""
    if not is_filtered(params):
        return [*_NEUTRAL.values(), params.xtc_threshold]
    xtc = params.xtc_probability if has_xtc(params) else 0.0
    top_k = params.top_k if 0 < params.top_k <= MOST_TOKENS else torch.inf
    return [top_k, params.top_p, params.min_p, params.typical_p, xtc, params.xtc_threshold]


def _keep_first(ranks: Tensor, masses: Tensor, limit: Tensor, probs: Tensor) -> Tensor:
    """Return probs, 0 where the masses of tokens of higher ranks, or of lower ids, exceed the limit, (n, 1)."""
    is_off = limit.isinf()
    tokens, held = first_in_order(ranks, masses, limit.where(~is_off, -1))  # a row without limit has nothing sorted
    kept = torch.zeros_like(masses).scatter_(-1, tokens, held)
    return probs.where((kept > 0) | is_off, 0)


def _limit(share: Tensor, probs: Tensor) -> Tensor:
    """Return the mass, (n, 1), that a share, (n,), of all is; infinite where that is all."""
    share = share[:, None].double()  # so exact that the first token which exceeds it is the same everywhere
    return (share * _total(probs)).where(share < 1, torch.inf)


def _total(values: Tensor) -> Tensor:
    """Return sums, (n, 1), that are added in the columns' order: neither other rows nor zeros between change a bit."""
    return values.cumsum(-1)[:, -1:]
