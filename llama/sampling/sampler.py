"""Draws tokens from logits, by temperature and top_p: pure functions whose randomness is an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.sampling.params import SamplingParams

# The token that `sample` returns for a row whose logits are NaN or infinite; it is in no vocabulary.
INVALID = -1

# How many of the most probable tokens are sorted, unless their mass is too little: see D8.
TOP_K_PREFIX = 512

# The random numbers of XTC are others than those that draw tokens.
XTC_STREAM = "xtc"

# What is smaller is 0 on a device: devices differ in whether they take it for 0.
SMALLEST = torch.finfo(torch.float32).tiny


def uniforms(seed: int, index: int, count: int, sample: int = 0, stream: str = "") -> Tensor:
    """Return `count` random numbers in [0, 1) for the prompt with this index: (count,), fp32, on the CPU.

    They are the same on every machine, and a longer series begins with a shorter one (see D8). sample: the number of
    the completion among those of one prompt; stream: what the numbers decide: "" the tokens, XTC_STREAM whether XTC
    acts at a place.
    """
    key = f"{seed}:{index}:{sample}" if sample else f"{seed}:{index}"
    key = f"{key}:{stream}" if stream else key
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters of the rows that are drawn together, on their device.

    temperature, top_p: (n,), fp32; what is too small for a normal number there is 0. Where a row's tokens are filtered
    before they are drawn, top_p is 1 here: the filters apply it (see FilterTensors).
    kinds: which kinds of draws occur among the rows, so which operations run: "greedy" at temperature 0 or top_p 0,
    else "whole" at top_p 1, where every token can come, else "nucleus".
    """

    temperature: Tensor
    top_p: Tensor
    kinds: frozenset[str]

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device | str) -> SamplingTensors:
        """Take the parameters of each row to a device."""
        given = [[each.temperature for each in params], [1 if is_filtered(each) else each.top_p for each in params]]
        values = torch.tensor(given, dtype=torch.float32, device="cpu")
        values = values.where(values >= SMALLEST, 0)
        kinds = {
            "greedy" if temperature == 0 or top_p == 0 else "whole" if top_p == 1 else "nucleus"
            for temperature, top_p in values.T.tolist()
        }
        temperature, top_p = values.to(device)
        return SamplingTensors(temperature, top_p, frozenset(kinds))

    def choose(
        self, greedy: Callable[[], Tensor], whole: Callable[[], Tensor], nucleus: Callable[[], Tensor]
    ) -> Tensor:
        """Return each row's token, (n,), from the function of its kind; those of kinds that do not occur do not run.

        Each returns a token for every row, (n,).
        """
        tokens: Tensor | None = None
        # Greedy is last: it is what a row is, whatever else its parameters are.
        for kind, draw_rows in (("nucleus", nucleus), ("whole", whole), ("greedy", greedy)):
            if kind in self.kinds:
                found = draw_rows()
                tokens = found if tokens is None else torch.where(self._rows_of(kind), found, tokens)
        assert tokens is not None, "no rows"
        return tokens

    def _rows_of(self, kind: str) -> Tensor:
        """Tell which rows are greedy, or which are at top_p 1: (n,)."""
        return (self.temperature == 0) | (self.top_p == 0) if kind == "greedy" else self.top_p == 1


def is_filtered(params: SamplingParams) -> bool:
    """Tell whether tokens are left out by more than top_p before one is drawn; a greedy choice leaves out none."""
    others = params.top_k > 0 or params.min_p > 0 or params.typical_p < 1
    return (others or has_xtc(params)) and params.temperature >= SMALLEST and params.top_p >= SMALLEST


def has_xtc(params: SamplingParams) -> bool:
    """Tell whether XTC can act: two tokens have to reach its threshold."""
    return params.xtc_probability > 0 and params.xtc_threshold <= 0.5


def sample(logits: Tensor, uniform: Tensor, rows: SamplingTensors) -> Tensor:
    """Return one token for each row, (bsz,): drawn from the nucleus, at temperature 0 or top_p 0 the greatest logit's.

    logits: (bsz, vocab_size), fp32; uniform: (bsz,), in [0, 1). Rows without a finite maximum get INVALID. A row's
    token does not depend on the other rows, nor on their parameters.
    """
    highest, greedy = logits.max(dim=-1)  # NaN wins a maximum

    def from_nucleus() -> Tensor:
        top_p = rows.top_p
        if len(rows.kinds) > 1:  # a row of another kind is not to have all sorted
            top_p = top_p.where((top_p < 1) & (rows.temperature > 0), -1)
        return draw(nucleus(probabilities(logits, rows.temperature), top_p), uniform)

    def from_all() -> Tensor:
        probs = probabilities(logits, rows.temperature)
        return draw((torch.arange(probs.shape[-1], device=probs.device).expand_as(probs), probs), uniform)

    return rows.choose(lambda: greedy, from_all, from_nucleus).where(highest.isfinite(), INVALID)


def probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return the probabilities of logits (bsz, vocab_size) at temperature (bsz,), fp32."""
    # Subtract the maximum before the division, which could overflow at a small temperature; at 0 the maximum would be
    # divided as 0 / 0.
    temperature = temperature.clamp(min=torch.finfo(logits.dtype).tiny)[:, None]
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def nucleus(probs: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of the nucleus and their probabilities, both (bsz, n), not renormalised (arXiv:1904.09751).

    probs: (bsz, vocab_size); top_p: (bsz,). A token stays while the mass before it is <= top_p, so one stays at 0; the
    others get probability 0. Tokens are in order of falling probability, and of ids among equals (see D19).
    """
    return first_in_order(probs, probs, top_p[:, None])


def first_in_order(ranks: Tensor, masses: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens in order of falling rank, and of ids among equals, and their masses, both (bsz, n).

    ranks, masses: (bsz, vocab_size); limit: (bsz, 1). A token whose predecessors have more mass than the limit gets 0.
    """
    vocab_size = ranks.shape[-1]
    top, tokens = ranks.topk(min(TOP_K_PREFIX, vocab_size))
    held = top if masses is ranks else masses.gather(-1, tokens)
    # Which of the tokens that tie with the last are among the top k is not defined: the mass above must exceed the
    # limit.
    above = held.where(top > top[:, -1:], 0).sum(-1, keepdim=True)
    if top.shape[-1] < vocab_size and bool((above <= limit).any()):
        top, tokens = ranks.sort(dim=-1, descending=True, stable=True)
    else:
        tokens, by_id = tokens.sort(dim=-1)
        top, by_rank = top.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(-1, by_rank)
    held = top if masses is ranks else masses.gather(-1, tokens)
    return tokens, held.where(held.cumsum(-1) - held <= limit, 0)


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw a token of each row of probs, (bsz, vocab_size), from its nucleus, (bsz, 1), as Meta's code calls it.

    The random numbers are those of torch's global generator, as there.
    """
    probs = probs.float()
    tokens, kept = nucleus(probs, probs.new_full(probs.shape[:1], p))
    return tokens.gather(-1, torch.multinomial(kept, 1))


def draw(candidates: tuple[Tensor, Tensor], uniform: Tensor) -> Tensor:
    """Draw one token for each row, (bsz,): invert the cumulative distribution of (tokens, probs), both (bsz, n)."""
    tokens, probs = candidates
    mass = probs.cumsum(-1)
    target = uniform.to(mass)[:, None] * mass[:, -1:]
    index = (mass <= target).sum(-1, keepdim=True)
    # Rounding can put the target on the whole mass: then take the last token with a probability above 0 (NaN is not).
    indices = torch.arange(probs.shape[-1], device=probs.device)
    index = index.minimum((indices * (probs > 0)).amax(-1, keepdim=True))
    return tokens.gather(-1, index)[:, 0]


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token under its logits, before any temperature: fp32, shaped like tokens."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)


def top_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens of each row, likeliest first, and their log-probabilities: both (bsz, count)."""
    top, tokens = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return tokens, top - logits.logsumexp(-1, keepdim=True)
