"""A model together with the KV cache of one batch, and a list of the tokens that are cached.

Knows nothing of sampling or of text; rows are lists of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.backends.base import backend_of
from llama.config import DynamicScaling
from llama.memory.estimate import MAX_SCORED_POSITIONS
from llama.model import Transformer
from llama.sampling import log_probs

# Shortest common prefix of a batch's prompts that is prefilled once and copied to every row: see D26.
MIN_SHARED_PREFIX = 16


class Context:
    """The rows of one batch as far as a model has computed them, each from position 0.

    cached_tokens: of each row, the tokens whose keys and values are in the cache; correct also after an interrupt.
    """

    def __init__(self, model: Transformer, bsz: int, max_seq_len: int) -> None:
        self.model, self.device = model, model.device
        self.cache = model.new_cache(bsz, max_seq_len)
        self.cached_tokens: list[list[int]] = [[] for _ in range(bsz)]
        self.n_computed = 0  # tokens that have passed through the model so far

    @property
    def prefix_reusable(self) -> bool:
        """Whether cached keys stay valid as their text grows, and in other rows that begin alike: see D28."""
        scaling = self.model.args.rope_scaling
        return not isinstance(scaling, DynamicScaling) or self.cache.max_seq_len <= scaling.old_context_len

    @property
    def bytes_in_use(self) -> int:
        """Bytes of memory that the cache takes: on a CPU, positions that were never written take none."""
        if self.device.type != "cpu":
            return self.cache.nbytes
        return self.cache.nbytes // self.cache.max_seq_len * max(len(row) for row in self.cached_tokens)

    def has_room(self, bsz: int, seqlen: int) -> bool:
        """Tell whether a batch of bsz rows of `seqlen` positions fits into the cache."""
        return bsz <= len(self.cached_tokens) and seqlen <= self.cache.max_seq_len

    def grow(self, max_seq_len: int) -> None:
        """Enlarge rows to at least `max_seq_len` positions; cached tokens stay."""
        if max_seq_len > self.cache.max_seq_len:
            self.cache.grow(max_seq_len, max(len(row) for row in self.cached_tokens))

    def prefill(self, texts: Sequence[Sequence[int]], scored: bool = False) -> tuple[Tensor, list[list[float]]]:
        """Compute the tokens of each row's text that are not cached, at least the last, and a common prefix only once.

        Returns the final states of the last tokens, (bsz, dim), and if scored the log-probability of each token given
        the tokens before it; 0.0 for the first token, which follows none.
        """
        starts = [0] * len(texts)
        scores: list[list[float]] = [[0.0] for _ in texts]
        if self.prefix_reusable and not scored:
            pairs = zip(self.cached_tokens, texts, strict=False)
            starts = [min(common_prefix_len(cached, text), len(text) - 1) for cached, text in pairs]
        # One less than all have in common: the token after the prefix is the same for all, and so is its score.
        shared = min(common_prefix_len(texts[0], text) for text in texts) - 1
        if self.prefix_reusable and not any(starts) and len(texts) > 1 and shared >= MIN_SHARED_PREFIX:
            _, first = self._prefill_in_chunks(texts[:1], [0], [shared], scored)
            for row in range(1, len(texts)):
                self.copy_row(0, row, shared)
            starts = [shared] * len(texts)
            scores = [[0.0, *first[0]] for _ in texts]
        last, rest = self._prefill_in_chunks(texts, starts, [len(text) for text in texts], scored)
        return last, [begun + row for begun, row in zip(scores, rest, strict=True)] if scored else []

    def decode(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """Compute a few tokens of each of the first rows in one pass; return all final states, (bsz, seqlen, dim)."""
        return self._forward(tokens, start_pos)

    def truncate(self, start_pos: Sequence[int]) -> None:
        """Drop the cached tokens of the first rows from start_pos on: their positions are about to be overwritten."""
        for cached, start in zip(self.cached_tokens, start_pos, strict=False):
            del cached[start:]

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Add tokens that have just been cached to those of the first rows."""
        for cached, row in zip(self.cached_tokens, tokens, strict=False):
            cached.extend(row)
            self.n_computed += len(row)

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        """Copy the first `seqlen` positions of row `source` over row `target`."""
        self.cache.copy_row(source, target, seqlen)
        self.cached_tokens[target] = self.cached_tokens[source][:seqlen]

    def _prefill_in_chunks(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], stops: Sequence[int], scored: bool
    ) -> tuple[Tensor, list[list[float]]]:
        """Compute each text from its start to its stop, in chunks, so that activations stay small (see D27).

        Returns the final states of the last tokens, (bsz, dim), and if scored the log-probabilities of the tokens that
        follow the computed ones, up to the one at `stop`, if the text has it.
        """
        seqlen = max(stop - start for start, stop in zip(starts, stops, strict=True))
        # A short row near the end of the cache starts earlier, so that its padding has room.
        starts = [min(start, self.cache.max_seq_len - seqlen) for start in starts]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        last: dict[int, Tensor] = {}
        scores: list[list[float]] = [[] for _ in texts]
        chunk = max(1, backend_of(self.model).max_prefill_tokens // len(texts))
        for i in range(0, seqlen, chunk):
            begins = [start + i for start in starts]
            ends = [min(begin + min(chunk, seqlen - i), stop) for begin, stop in zip(begins, stops, strict=True)]
            tokens = [text[begin:end] for text, begin, end in zip(texts, begins, ends, strict=True)]
            hidden = self._forward(tokens, begins, lengths)
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                if begin < end == stops[row]:
                    last[row] = hidden[row, end - begin - 1].clone()  # a view would keep the whole chunk in memory
                if scored:
                    scores[row] += self._score(hidden[row], texts[row][begin + 1 : end + 1])
            del hidden  # before the next chunk is computed
        return torch.stack([last[row] for row in range(len(texts))]), scores

    def _forward(
        self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], lengths: Tensor | None = None
    ) -> Tensor:
        """Return the final states of tokens, (bsz, seqlen, dim), short rows padded on the right, and cache them."""
        seqlen = max(map(len, tokens))
        self.truncate(start_pos)
        # Any token will do as padding.
        padded = tokens if seqlen == min(map(len, tokens)) else [[*row, *[0] * (seqlen - len(row))] for row in tokens]
        hidden = self.model.hidden(
            torch.tensor(padded, device=self.device),
            torch.tensor(start_pos, device=self.device),
            self.cache,
            max(start_pos) + seqlen,
            lengths,
        )
        self.append(tokens)
        return hidden

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """Return the log-probability of each target, given the state before it in hidden (n_targets or more, dim)."""
        scores: list[float] = []
        for i in range(0, len(targets), MAX_SCORED_POSITIONS):
            chunk = torch.tensor(targets[i : i + MAX_SCORED_POSITIONS], device=self.device)
            scores += log_probs(self.model.logits(hidden[i : i + len(chunk)]), chunk).tolist()
        return scores


def common_prefix_len(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both texts begin with."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
