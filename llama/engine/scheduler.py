"""One batch from prompts to the last token: a prefill, then steps of a token or more for every running row.

Knows nothing of text; stop tokens are ids like any other.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama.engine.metrics import Statistics
from llama.engine.runner import Picked, Steps
from llama.engine.speculative import Pace, Proposer
from llama.memory.estimate import MOST_POSITIONS
from llama.outputs import FinishReason
from llama.sampling import INVALID, SamplingParams


@dataclass(frozen=True)
class Chosen:
    """A token of one row, or its end: then there is a reason and no token."""

    place: int
    token: int | None
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass
class Row:
    """A prompt and what has been generated for it so far."""

    place: int
    prompt: Sequence[int]
    limit: int  # most tokens to generate
    uniforms: Tensor  # (limit,), one random number a token
    tokens: list[int] = field(init=False)  # all; the newest is not in the cache: the model reads it to say what follows

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)


# Tokens that a row gets in one step, with their log-probabilities.
Run = list[tuple[int, float | None]]


class Batch:
    """Rows that are completed together.

    The running rows are the first rows of the context, in order; the last takes the place of one that ends.
    """

    def __init__(
        self,
        steps: Steps,
        rows: list[Row],
        params: SamplingParams,
        stop_tokens: Collection[int],
        logprobs: bool,
        statistics: Statistics,
        proposer: Proposer | None = None,
    ) -> None:
        self.steps, self.context = steps, steps.context
        self.running = list(rows)
        self.params = params
        self.stop_tokens = stop_tokens
        self.logprobs = logprobs
        self.statistics = statistics
        self.proposer = proposer if self.context.steady else None  # otherwise guesses would change the keys before them
        self.pace = Pace()
        self.count = 0  # tokens to guess for each row in the next step
        self.under_way = False  # a step was launched that is not collected
        self.began = 0.0  # when the host last had nothing to wait for

    def run(self, echo: bool) -> Iterator[Chosen]:
        """Complete the rows. With echo their prompts come first. NaN logits raise ValueError."""
        rows, start, computed = list(self.running), time.perf_counter(), self.context.computed
        prompts = [row.prompt for row in rows]
        uniforms = self._uniforms()
        self.steps.begin(self.params, self.logprobs, uniforms)
        hidden, scores = self.context.read(prompts, scored=echo and self.logprobs)
        computed = self.context.computed - computed
        if self.params.max_gen_len == 0:
            self.running.clear()
        new: list[Run] = []
        if self.running:
            picked = self.steps.choose(hidden[:, None], [len(prompt) - 1 for prompt in prompts], self._next_count())
            new = self._accept(picked, [[] for _ in rows])
            if self.proposer is not None:
                self.proposer.begin(prompts, self.params, uniforms)
        self.statistics.prefill_seconds += time.perf_counter() - start
        self.statistics.prompt_tokens += computed
        self.statistics.reused_tokens += sum(len(row.prompt) for row in rows) - computed

        if echo:
            for i, row in enumerate(rows):
                for j, token in enumerate(row.prompt):
                    yield Chosen(row.place, token, scores[i][j] if scores else None)
        if not self.running:
            for row in rows:
                yield Chosen(row.place, None, finish_reason="length")
        while self.running:
            ended = yield from self._take(new)
            # A step that was launched ahead has the rows that were running then.
            late = self._collect(go_on=False) if ended and self.under_way else None
            self._remove(ended, late)
            if self.running:
                new = self._decode(late)

    def _uniforms(self) -> Tensor:
        """Each row's random numbers, at the positions of the tokens after which they choose: (bsz, length)."""
        uniforms = torch.zeros(len(self.running), self.context.cache.max_seq_len)
        for numbers, row in zip(uniforms, self.running, strict=True):
            numbers[len(row.prompt) - 1 :][: row.limit] = row.uniforms
        return uniforms

    def _take(self, new: list[Run]) -> Generator[Chosen, None, list[int]]:
        """Give each running row its new tokens; which rows are complete now."""
        ended = []
        for i, (row, run) in enumerate(zip(self.running, new, strict=True)):
            reason: FinishReason | None = None
            for token, score in run:
                reason = "stop" if token in self.stop_tokens else None
                if reason is None:
                    row.tokens.append(token)
                    yield Chosen(row.place, token, score)
                    reason = "length" if row.generated == row.limit else None
            if reason is not None:
                yield Chosen(row.place, None, finish_reason=reason)
                ended.append(i)
        return ended

    def _remove(self, ended: list[int], picked: Picked | None) -> None:
        """End rows: the last running row takes the place of each, also in what a step chose before that was known."""
        columns: list[list[Any]] = [picked.tokens, picked.scores or []] if picked is not None else []
        for i in reversed(ended):
            moved, last = self.running.pop(), len(self.running)
            for values in filter(None, columns):
                values[i] = values[last]
                values.pop()
            if i < last:
                for rows in (self.steps, self.proposer):
                    if rows is not None:
                        rows.move_row(last, i, len(moved.tokens) - (picked is None))
                self.running[i] = moved

    def _decode(self, picked: Picked | None) -> list[Run]:
        """The next tokens of each running row: one from its newest, and one from each guess that was right.

        picked: what a step chose that was launched ahead, if it is collected already.
        """
        resting = self.pace.resting
        proposals: list[list[int]] = [[] for _ in self.running]
        if picked is None:
            if not self.under_way:
                self.began = time.perf_counter()
                proposals = self._launch()
            picked = self._collect(go_on=True)
        new = self._accept(picked, proposals)
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        tokens, proposed = sum(len(run) for run in new), sum(len(proposal) for proposal in proposals)
        self.pace.record(seconds, len(new), proposed, tokens - len(new))
        self.statistics.add_step(seconds, tokens, proposed, tokens - len(new), resting)
        return new

    def _launch(self) -> list[list[int]]:
        """Launch a step that reads each row's newest token and guesses of what follows it, which are returned."""
        proposals = self._propose()
        newest = [[row.tokens[-1], *proposal] for row, proposal in zip(self.running, proposals, strict=True)]
        self.steps.launch(newest, [len(row.tokens) - 1 for row in self.running], self._next_count())
        return proposals

    def _collect(self, go_on: bool) -> Picked:
        """What the step under way chose. go_on: the next one is launched before, where every row is sure to need it."""
        ahead = go_on and self.steps.runs_ahead and self.proposer is None
        ahead = ahead and all(row.generated + 1 < row.limit for row in self.running)
        if ahead:
            self.steps.go_on()
        self.under_way = ahead
        return self.steps.collect()

    def _next_count(self) -> int:
        """Tokens to guess after the step that is about to be launched; the first rank's holds, as clocks differ."""
        return 0 if self.proposer is None else self.pace.next_count()

    def _propose(self) -> list[list[int]]:
        """Guesses for each running row; none beyond its limit, nor where the cache has no room for all."""
        longest = max(len(row.tokens) for row in self.running)
        count = min(self.count, self.context.cache.max_seq_len - longest, MOST_POSITIONS // len(self.running) - 1)
        if self.proposer is None or count < 1:
            return [[] for _ in self.running]
        proposals = self.proposer.propose([row.tokens for row in self.running], count)
        return [
            proposal[: row.limit - row.generated - 1] for row, proposal in zip(self.running, proposals, strict=True)
        ]

    def _accept(self, picked: Picked, proposals: list[list[int]]) -> list[Run]:
        """The next tokens of each running row: those of its proposal that the model chooses, too, and one more."""
        self.count = picked.note
        new = []
        for i, (row, proposal) in enumerate(zip(self.running, proposals, strict=True)):
            chosen = picked.tokens[i][: agreed(proposal, picked.tokens[i], self.stop_tokens) + 1]
            if INVALID in chosen:
                length = len(row.tokens) + chosen.index(INVALID)
                raise ValueError(
                    f"the logits of prompt {row.place} are NaN or infinite after {length} tokens: the weights are "
                    "damaged, or too large for this dtype (try --dtype float32)"
                )
            scores = picked.scores[i] if picked.scores is not None else [None] * len(chosen)
            new.append(list(zip(chosen, scores, strict=False)))
        return new


def agreed(proposal: Sequence[int], chosen: Sequence[int], stop_tokens: Collection[int]) -> int:
    """How many tokens of a proposal were chosen, too, up to one that ends a row."""
    pairs = zip(proposal, chosen, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other or one in stop_tokens), len(proposal))
