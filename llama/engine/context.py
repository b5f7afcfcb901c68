"""A model with the cache of one batch, and which tokens the cache holds: reading texts on from there.

Knows nothing of sampling or of text; rows are lists of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.config import DynamicScaling
from llama.memory.estimate import SCORED_AT_ONCE, read_at_once
from llama.model import Transformer
from llama.sampling import log_probs

# Tokens of a common beginning from which it is read once and copied: see D26.
WORTH_SHARING = 16


class Context:
    """Rows of one batch as a model has read them, each from position 0.

    held: the tokens of each row whose keys and values are in the cache, true also after an interrupt.
    """

    def __init__(self, model: Transformer, bsz: int, length: int) -> None:
        self.model = model
        self.cache = model.new_cache(bsz, length)
        self.held: list[list[int]] = [[] for _ in range(bsz)]
        self.computed = 0  # tokens that were read, in all

    @property
    def steady(self) -> bool:
        """Whether a key depends on nothing after it, and is the same in a longer text or another row: see D28."""
        scaling = self.model.args.rope_scaling
        return not isinstance(scaling, DynamicScaling) or self.cache.max_seq_len <= scaling.old_context_len

    @property
    def bytes_in_use(self) -> int:
        """Of the cache; on a CPU what was never written takes no memory."""
        if self.model.device.type != "cpu":
            return self.cache.nbytes
        return self.cache.nbytes // self.cache.max_seq_len * max(len(held) for held in self.held)

    def has_room(self, bsz: int, length: int) -> bool:
        """Whether a batch of bsz rows of `length` positions fits into the cache."""
        return bsz <= len(self.held) and length <= self.cache.max_seq_len

    def make_room(self, length: int) -> None:
        """Let rows have `length` positions at least, and hold what they held."""
        if length > self.cache.max_seq_len:
            self.cache.grow(length, max(len(held) for held in self.held))

    def read(self, texts: Sequence[Sequence[int]], scored: bool = False) -> tuple[Tensor, list[list[float]]]:
        """Read what the rows do not hold yet of their texts, at least the last token, and what all share only once.

        Final states of the last tokens, (bsz, dim), and if scored the log-probability of each token given those
        before it; 0.0 stands for the first, which has none before it.
        """
        starts = [0] * len(texts)
        scores: list[list[float]] = [[0.0] for _ in texts]
        if self.steady and not scored:
            starts = [min(common(held, text), len(text) - 1) for held, text in zip(self.held, texts, strict=False)]
        # The token after the shared ones is the same for all, too: so are the scores.
        shared = min(common(texts[0], text) for text in texts) - 1
        if self.steady and not any(starts) and len(texts) > 1 and shared >= WORTH_SHARING:
            _, first = self._read(texts[:1], [0], [shared], scored)
            for row in range(1, len(texts)):
                self.move_row(0, row, shared)
            starts = [shared] * len(texts)
            scores = [[0.0, *first[0]] for _ in texts]
        last, rest = self._read(texts, starts, [len(text) for text in texts], scored)
        return last, [begun + row for begun, row in zip(scores, rest, strict=True)] if scored else []

    def step(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """Read a few tokens of each of the first rows in one pass; all final states, (bsz, seqlen, dim)."""
        return self._pass(tokens, start_pos)

    def forget(self, start_pos: Sequence[int]) -> None:
        """The first rows hold nothing from start_pos on: it is about to be written over."""
        for held, start in zip(self.held, start_pos, strict=False):
            del held[start:]

    def hold(self, tokens: Sequence[Sequence[int]]) -> None:
        """The first rows hold these tokens, too, behind those that they held."""
        for held, row in zip(self.held, tokens, strict=False):
            held.extend(row)
            self.computed += len(row)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of row `source` in the place of row `target`."""
        self.cache.copy_row(source, target, length)
        self.held[target] = self.held[source][:length]

    def _read(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], stops: Sequence[int], scored: bool
    ) -> tuple[Tensor, list[list[float]]]:
        """Read each text from its start to its stop, so many positions at once that activations stay small.

        Final states of the last tokens, (bsz, dim), and if scored the log-probabilities of the tokens that follow
        those read: up to the one at `stop`, if the text has it.
        """
        seqlen = max(stop - start for start, stop in zip(starts, stops, strict=True))
        # A short row near the end of the cache begins earlier, so that its padding has room.
        starts = [min(start, self.cache.max_seq_len - seqlen) for start in starts]
        lengths = torch.tensor([len(text) for text in texts], device=self.model.device)
        last: dict[int, Tensor] = {}
        scores: list[list[float]] = [[] for _ in texts]
        chunk = read_at_once(len(texts), self.model.device)
        for i in range(0, seqlen, chunk):
            begins = [start + i for start in starts]
            ends = [min(begin + min(chunk, seqlen - i), stop) for begin, stop in zip(begins, stops, strict=True)]
            tokens = [text[begin:end] for text, begin, end in zip(texts, begins, ends, strict=True)]
            hidden = self._pass(tokens, begins, lengths)
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                if begin < end == stops[row]:
                    last[row] = hidden[row, end - begin - 1].clone()  # a view would keep the rest
                if scored:
                    scores[row] += self._score(hidden[row], texts[row][begin + 1 : end + 1])
            del hidden  # before the next chunk is read
        return torch.stack([last[row] for row in range(len(texts))]), scores

    def _pass(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], lengths: Tensor | None = None) -> Tensor:
        """Final states of tokens, (bsz, seqlen, dim), short rows padded on the right; from here on they are held."""
        device, seqlen = self.model.device, max(len(row) for row in tokens)
        self.forget(start_pos)
        hidden = self.model.hidden(
            torch.tensor([[*row, *[0] * (seqlen - len(row))] for row in tokens], device=device),  # any token pads
            torch.tensor(start_pos, device=device),
            self.cache,
            max(start_pos) + seqlen,
            lengths,
        )
        self.hold(tokens)
        return hidden

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """Log-probability of each target under the final state before it, hidden (at least as many, dim)."""
        scores: list[float] = []
        for i in range(0, len(targets), SCORED_AT_ONCE):
            chunk = torch.tensor(targets[i : i + SCORED_AT_ONCE], device=hidden.device)
            scores += log_probs(self.model.logits(hidden[i : i + len(chunk)]), chunk).tolist()
        return scores


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
