"""Speculative decoding (arXiv:2211.17192): draft tokens that the model verifies in one pass, and whether they pay.

Texts are the same with and without it: draft tokens only decide which positions are computed together, as the random
number of each token is fixed (see D24 and D25).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

from llama.engine.metrics import Metrics
from llama.engine.page_pool import common_prefix_len
from llama.engine.room import Room
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import Chunk
from llama.engine.step_data import StepOutput
from llama.memory.estimate import MAX_SPECULATIVE_POSITIONS

# Most draft tokens of one sequence: with its newest token they are 8, which the kernels compute in one pass.
MAX_DRAFT_LEN = 7

# Plain steps after speculation has lost for the first time.
FIRST_BACKOFF = 32


class Proposer(Protocol):
    """Proposes the next tokens of sequences that generate."""

    def propose(self, chunks: Sequence[Chunk], count: int) -> list[list[int]]:
        """Propose at most `count` tokens to follow each chunk, the same on every rank; there are pages for them."""
        ...


class NgramProposer:
    """Prompt lookup: proposes the tokens that followed when a text last had its newest two or three tokens."""

    longest = 3  # most tokens to find again; the least is 2
    window = 8192  # tokens to search, from the end: 0.5 ms

    def propose(self, chunks: Sequence[Chunk], count: int) -> list[list[int]]:
        return [self.continuation(chunk.sequence.tokens, count) for chunk in chunks]

    def continuation(self, text: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens that follow the last of the longest matches of the newest tokens; none without one."""
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
        period = len(text) - after  # beyond the end of the text, repeat it from the match on
        return [text[after + i % period] for i in range(count)] if after else []


class DraftModelProposer:
    """Proposes the tokens that a smaller model of the same vocabulary samples with the same random numbers.

    Its keys are in the same pages as the model's, of a cache of its own. Where another text's pages were found, it may
    not have computed them all: its proposals are worse then, and no text changes.
    """

    def __init__(self, room: Room) -> None:
        self._room = room

    def propose(self, chunks: Sequence[Chunk], count: int) -> list[list[int]]:
        runner = self._room.runners[1]
        texts = [chunk.sequence.tokens for chunk in chunks]
        drafted = [common_prefix_len(chunk.sequence.drafted, chunk.sequence.tokens) for chunk in chunks]
        known = [min(n, len(text) - 1) for n, text in zip(drafted, texts, strict=True)]
        new = max(len(text) - n for text, n in zip(texts, known, strict=True))
        new = 1 << (new - 1).bit_length()  # what a captured step computes without padding
        if new > MAX_DRAFT_LEN + 1 or new > min(len(text) for text in texts):  # a prompt, or after backing off
            self._compute(chunks, known)
            new = 1
        # All rows have the same number of tokens, some of which may be cached already.
        step = [Chunk(c.sequence, len(text) - new, text[-new:], 1) for c, text in zip(chunks, texts, strict=True)]
        runner.launch(step)
        for i in range(count - 1):
            runner.launch_next([Chunk(chunk.sequence, chunk.stop + i, [0], 1) for chunk in step])
        outputs = [[max(tokens[-1], 0) for tokens in runner.wait().tokens] for _ in range(count)]
        proposals = [list(tokens) for tokens in zip(*outputs, strict=True)]
        for chunk, proposal in zip(chunks, proposals, strict=True):
            chunk.sequence.drafted = [*chunk.sequence.tokens, *proposal[:-1]]
        return proposals

    def _compute(self, chunks: Sequence[Chunk], known: Sequence[int]) -> None:
        """Compute all tokens but the newest of each sequence, as many at once as a step may."""
        runner, most = self._room.runners[1], self._room.max_step_tokens
        for chunk, start in zip(chunks, known, strict=True):
            tokens = chunk.sequence.tokens
            for first in range(start, len(tokens) - 1, most):
                runner.launch([Chunk(chunk.sequence, first, tokens[first : min(first + most, len(tokens) - 1)], 0)])
                runner.wait()


class DraftLengthController:
    """Decides how many draft tokens the next step has, from the time and the tokens of the last steps.

    Where speculation is slower than plain steps it backs off, each time for twice as many steps until it gains again.
    Clocks differ between ranks, so the first rank's controller decides for all.
    """

    def __init__(self) -> None:
        self._draft_len = 4
        self._plain: deque[float] = deque(maxlen=9)  # seconds of a step
        self._speculative: deque[tuple[float, float]] = deque(maxlen=12)  # seconds of a step, mean tokens of a row
        self._steps = 0
        self._backoff = FIRST_BACKOFF
        self._steps_left = 0
        self.backs_off = False

    def next_draft_len(self) -> int:
        """Return the number of draft tokens in the next step; 0 is a plain step, also to measure the speed of these."""
        self._steps += 1
        self.backs_off = self._steps_left > 0
        if self.backs_off:
            self._steps_left -= 1
            return 0
        return 0 if len(self._plain) < 3 or self._steps % 16 == 0 else self._draft_len

    def record(self, seconds: float, bsz: int, proposed: int, accepted: int) -> None:
        """Add a step of bsz rows to the statistics; proposed, accepted: draft tokens of all rows together."""
        if proposed == 0:
            self._plain.append(seconds)
            return
        longer, shorter = min(self._draft_len + 2, MAX_DRAFT_LEN), max(self._draft_len - 1, 1)
        self._draft_len = longer if accepted == proposed else shorter
        self._speculative.append((seconds, 1 + accepted / bsz))
        if not self._plain or len(self._speculative) < 4:
            return
        if self._gain() < 1:
            self._steps_left, self._backoff = self._backoff, 2 * self._backoff
            self._speculative.clear()
        elif len(self._speculative) == self._speculative.maxlen:
            self._backoff = FIRST_BACKOFF

    def _gain(self) -> float:
        """Return the speed of the last speculative steps divided by that of plain steps."""
        seconds, tokens = (sum(values) for values in zip(*self._speculative, strict=True))
        return tokens * statistics.median(self._plain) / seconds


class Speculation:
    """Draft tokens of the sequences that generate: a step verifies them, and accepts those that it samples, too."""

    def __init__(self, proposer: Proposer, metrics: Metrics) -> None:
        self.proposer, self._metrics = proposer, metrics
        self.controller = DraftLengthController()
        self.draft_len = 0  # of the next step
        self._began = 0.0
        self._backs_off = False

    @staticmethod
    def of(speculate: str | None, room: Room, metrics: Metrics) -> Speculation | None:
        """Return the speculation that was asked for: by lookup, or by the room's draft model."""
        if room.draft is not None:
            return Speculation(DraftModelProposer(room), metrics)
        return Speculation(NgramProposer(), metrics) if speculate == "lookup" else None

    def next_draft_len(self) -> int:
        """Return the draft_len to launch the next step with: the number of draft tokens in the step after it."""
        return self.controller.next_draft_len()

    def with_drafts(self, chunks: Sequence[Chunk], scheduler: Scheduler) -> list[Chunk]:
        """Return the chunks of sequences that generate, with draft tokens: none beyond the limit of a sequence."""
        self._began, self._backs_off = time.perf_counter(), self.controller.backs_off
        count = min(self.draft_len, MAX_SPECULATIVE_POSITIONS // len(chunks) - 1)
        if not all(scheduler.shares_pages(chunk.sequence) for chunk in chunks):
            count = 0  # draft tokens would change the rotation of earlier keys
        while count > 0 and not all(scheduler.try_grow(chunk.sequence, chunk.stop + count) for chunk in chunks):
            count -= 1
        if count < 1:
            return list(chunks)
        return [
            chunk.with_drafts(proposal[: chunk.sequence.max_len - len(chunk.sequence.tokens) - 1])
            for chunk, proposal in zip(chunks, self.proposer.propose(chunks, count), strict=True)
        ]

    def accept(self, chunks: Sequence[Chunk], output: StepOutput) -> StepOutput:
        """Return the tokens of a step up to each sequence's first draft token that was not sampled."""
        if any(chunk.n_sampled <= chunk.n_drafts or chunk.sequence.in_prompt for chunk in chunks):
            return output  # a step with tokens of prompts has no draft tokens
        lengths = []
        for chunk, sampled in zip(chunks, output.tokens, strict=True):
            drafts = chunk.tokens[len(chunk.tokens) - chunk.n_drafts :]
            lengths.append(accepted_len(drafts, sampled, chunk.sequence.stop_tokens) + 1)
        proposed, accepted = sum(chunk.n_drafts for chunk in chunks), sum(lengths) - len(chunks)
        seconds = time.perf_counter() - self._began
        self.controller.record(seconds, len(chunks), proposed, accepted)
        self._metrics.add_speculation(seconds, len(chunks), proposed, accepted, self._backs_off)
        return output.cut(lengths)


def accepted_len(proposal: Sequence[int], sampled: Sequence[int], stop_tokens: Collection[int]) -> int:
    """Count the first tokens of a proposal that were sampled, too, up to a stop token, which is not counted."""
    pairs = zip(proposal, sampled, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other or one in stop_tokens), len(proposal))
