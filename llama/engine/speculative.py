"""Speculation: guesses of how rows go on, which the model checks in one pass, and whether they pay.

Tokens are the same with and without it: a guess only says which positions are computed together
(arXiv:2211.17192, with a random number fixed for each token).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from llama.engine.context import common
from llama.engine.runner import Steps
from llama.sampling import SamplingParams

# Most tokens guessed for one row: with its newest they are 8, which the CPU kernels take in one pass.
MOST_PROPOSED = 7

# Plain steps after guesses that cost more than they gave, when that happens for the first time.
FIRST_REST = 32


def check_speculation(speculate: str | None, draft: object, draft_quantize: str | None = None) -> None:
    """ValueError unless there is one way of guessing at most, and a known one."""
    if draft_quantize is not None and draft is None:
        raise ValueError(f"draft_quantize {draft_quantize} needs a draft model: give --draft_ckpt_dir, too")
    if speculate not in (None, "lookup"):
        raise ValueError(f"speculate must be lookup, or left out, got {speculate!r}")
    if speculate is not None and draft is not None:
        raise ValueError(f"speculate {speculate} and a draft model both guess tokens: give one of them")


class Proposer(Protocol):
    """Guesses the next tokens of rows; the running rows are the first ones, in the order of the batch."""

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None: ...

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """At most `count` tokens for each text; the same on every rank."""
        ...

    def move_row(self, source: int, target: int, length: int) -> None: ...


class Lookup:
    """What followed when a text last held its newest tokens: prompt lookup, for texts that repeat themselves."""

    longest = 3  # tokens to find again; two may do
    window = 8192  # tokens to search, from the end: 0.5 ms

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None:
        pass

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [self._continuation(text, count) for text in texts]

    def move_row(self, source: int, target: int, length: int) -> None:
        pass

    def _continuation(self, text: Sequence[int], count: int) -> list[int]:
        best, after = 1, 0
        for end in range(len(text) - 1, max(len(text) - self.window, best), -1):
            if text[end - 1] != text[-1] or text[end - 2] != text[-2]:
                continue
            length = 2
            while length < self.longest and length < end and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best:
                best, after = length, end
            if best == self.longest:
                break
        period = len(text) - after  # a text that goes in circles may go on so
        return [text[after + i % period] for i in range(count)] if after else []


class Draft:
    """What a smaller model of the same vocabulary says, drawn with the random numbers that the model will use."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None:
        self.steps.begin(params, False, uniforms)
        self.steps.context.read(prompts)

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        context = self.steps.context
        new = max(len(text) - common(held, text) for held, text in zip(context.held, texts, strict=False))
        new = 1 << max(new - 1, 0).bit_length()  # what a recorded step reads without padding
        if new > MOST_PROPOSED + 1 or new > min(len(text) for text in texts):  # after a rest, or much was accepted
            context.read([text[:-1] for text in texts])
            new = 1
        # Of as many tokens each, some of which are held already.
        self.steps.launch([text[-new:] for text in texts], [len(text) - new for text in texts])
        for _ in range(count - 1):
            self.steps.go_on()
        picked = [self.steps.collect() for _ in range(count)]
        return [[max(each.tokens[i][-1], 0) for each in picked] for i in range(len(texts))]

    def move_row(self, source: int, target: int, length: int) -> None:
        self.steps.move_row(source, target, min(length, len(self.steps.context.held[source])))


class Pace:
    """How many tokens to guess in the next step, from what the last steps took and gave.

    Guesses that cost more than they give rest, twice as long each time until they gain again. Clocks differ between
    ranks, so what the first rank's pace says holds for all.
    """

    def __init__(self) -> None:
        self._count = 4
        self._plain: deque[float] = deque(maxlen=9)  # seconds of a step
        self._guessed: deque[tuple[float, float]] = deque(maxlen=12)  # seconds of a step, tokens that a row got
        self._steps = 0
        self._rest = FIRST_REST
        self._resting = 0  # steps left
        self.resting = False

    def next_count(self) -> int:
        """Tokens to guess for each row in the next step; 0 is a plain step, some of which tell the plain speed."""
        self._steps += 1
        self.resting = self._resting > 0
        if self.resting:
            self._resting -= 1
            return 0
        return 0 if len(self._plain) < 3 or self._steps % 16 == 0 else self._count

    def record(self, seconds: float, bsz: int, proposed: int, accepted: int) -> None:
        """Learn from a step of bsz rows."""
        if proposed == 0:
            self._plain.append(seconds)
            return
        self._count = min(self._count + 2, MOST_PROPOSED) if accepted == proposed else max(self._count - 1, 1)
        self._guessed.append((seconds, 1 + accepted / bsz))
        if not self._plain or len(self._guessed) < 4:
            return
        if self._gain() < 1:
            self._resting, self._rest = self._rest, 2 * self._rest
            self._guessed.clear()
        elif len(self._guessed) == self._guessed.maxlen:
            self._rest = FIRST_REST

    def _gain(self) -> float:
        """Speed of the last guessed steps, against plain ones."""
        seconds, tokens = (sum(values) for values in zip(*self._guessed, strict=True))
        return tokens * statistics.median(self._plain) / seconds
