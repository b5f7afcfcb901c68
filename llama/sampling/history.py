"""What a sequence's own tokens make of its next logits: penalties, DRY, biases. On the host, a token at a time.

Knows the bytes of tokens, by a function, and nothing else of tokenizers.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama.sampling.params import SamplingParams
from llama.sampling.passages import RepeatedPassages


@dataclass(frozen=True)
class TokenAdjustments:
    """What becomes of the logits of some tokens of one row, see `SparseAdjustments`: all of the same length.

    tokens: ids, each once. bias is -inf where a token cannot come.
    """

    tokens: array[int]
    bias: array[float]
    factor: array[float]
    subtract: array[float]


class TokenHistory:
    """Counts a sequence's tokens, and says what they make of the logits at its end.

    A token more or less costs the same however long the text is, but for DRY's search (see `RepeatedPassages`).
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        end_tokens: Collection[int] = (),
        token_bytes: Callable[[int], bytes] = lambda token: b"",
    ) -> None:
        """Begin after a prompt.

        end_tokens: those that end a completion, which min_tokens and ignore_eos hold back. token_bytes: the bytes that
        a token adds to a text, in which DRY's breakers are looked for.
        """
        self._params = params
        self._text: list[int] = []
        self._n_prompt = len(prompt)
        self._end_tokens = dict.fromkeys(end_tokens)
        self._in_text: Counter[int] = Counter()  # within penalty_last_n
        self._in_completion: Counter[int] = Counter()
        # One place for each token that ever had an adjustment; most places change with one token of the text.
        self._places: dict[int, int] = {}
        self._tokens, self._bias = array("q"), array("f")
        self._factor, self._subtract = array("f"), array("f")
        for token, bias in (params.logit_bias or {}).items():
            self._bias[self._place(token)] = bias
        for token in params.banned_tokens:
            self._bias[self._place(token)] = -torch.inf
        self._end_places = [(place := self._place(token), self._bias[place]) for token in self._held_back()]
        self._passages = RepeatedPassages(params, token_bytes) if params.dry_multiplier > 0 else None
        for token in prompt:
            self.push(token)
        self._hold_back_ends()

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        """Tell whether any of this is asked for: a sequence without needs no history."""
        return bool(
            _has_penalties(params)
            or params.dry_multiplier > 0
            or params.logit_bias
            or params.banned_tokens
            or params.min_tokens
            or params.ignore_eos
        )

    def push(self, token: int) -> None:
        """Add a token to the text's end."""
        self._text.append(token)
        if _has_penalties(self._params):
            self._count(len(self._text) - 1, 1)
            if (left := self._before_window()) is not None:
                self._count(left, -1)
        if self._passages is not None:
            self._passages.push(token)
        self._hold_back_ends()

    def pop(self) -> None:
        """Take the last token back, as where it was only a draft."""
        assert len(self._text) > self._n_prompt, "the prompt stays"
        if _has_penalties(self._params):
            if (left := self._before_window()) is not None:
                self._count(left, 1)
            self._count(len(self._text) - 1, -1)
        self._text.pop()
        if self._passages is not None:
            self._passages.pop()
        self._hold_back_ends()

    def adjustments(self) -> TokenAdjustments | None:
        """Return what becomes of the next token's logits; None where nothing does."""
        subtract = self._subtract[:]
        if self._passages is not None:
            for token, penalty in self._passages.penalties().items():
                place = self._place(token)
                if place == len(subtract):
                    subtract.append(0.0)
                subtract[place] += penalty
        if not self._tokens:
            return None
        return TokenAdjustments(self._tokens[:], self._bias[:], self._factor[:], subtract)

    def _held_back(self) -> Collection[int]:
        return self._end_tokens if self._params.ignore_eos or self._params.min_tokens else ()

    def _hold_back_ends(self) -> None:
        if self._end_places:
            is_early = len(self._text) - self._n_prompt < self._params.min_tokens
            for place, bias in self._end_places:
                self._bias[place] = -torch.inf if is_early or self._params.ignore_eos else bias

    def _before_window(self) -> int | None:
        """Return the place in the text just before the last penalty_last_n tokens, if it is one."""
        last_n = self._params.penalty_last_n
        return None if last_n is None or len(self._text) <= last_n else len(self._text) - last_n - 1

    def _count(self, index: int, change: int) -> None:
        """Count the token at a place of the text once more, or once less."""
        token, params = self._text[index], self._params
        self._in_text[token] += change
        place = self._place(token)
        self._factor[place] = params.repetition_penalty if self._in_text[token] else 1.0
        if index >= self._n_prompt:
            self._in_completion[token] += change
            count = self._in_completion[token]
            self._subtract[place] = (params.presence_penalty if count else 0.0) + params.frequency_penalty * count

    def _place(self, token: int) -> int:
        """Return a token's place in the arrays; a new one changes nothing yet."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._bias.append(0.0)
            self._factor.append(1.0)
            self._subtract.append(0.0)
        return place


@dataclass(frozen=True)
class SparseAdjustments:
    """Adjustments of some tokens of some rows, on their device: all (n,), int64 or fp32.

    A logit x becomes x + bias; then x / factor if that is above 0, else x * factor; then subtract is subtracted.
    """

    rows: Tensor
    tokens: Tensor
    bias: Tensor
    factor: Tensor
    subtract: Tensor

    @staticmethod
    def of(adjustments: Sequence[tuple[int, TokenAdjustments]], device: torch.device | str) -> SparseAdjustments:
        """Take adjustments, each of the row with a number, to a device."""
        rows = torch.tensor([row for row, _ in adjustments], dtype=torch.int64, device="cpu")
        counts = torch.tensor([len(each.tokens) for _, each in adjustments], device="cpu")
        parts = [
            torch.cat([torch.frombuffer(getattr(each, field.name), dtype=dtype) for _, each in adjustments])
            for field, dtype in zip(fields(TokenAdjustments), (torch.int64, *[torch.float32] * 3), strict=True)
        ]
        return SparseAdjustments(*(each.to(device) for each in (rows.repeat_interleave(counts), *parts)))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the adjusted logits, (bsz, vocab_size); those that are given are left as they are."""
        at = self.rows, self.tokens
        x = logits[at] + self.bias
        return logits.index_put(at, torch.where(x > 0, x / self.factor, x * self.factor) - self.subtract)


def _has_penalties(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
