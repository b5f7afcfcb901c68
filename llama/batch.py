"""One batch from prompts to the last token: a prefill, then steps of one token for every running row.

Knows nothing of text; stop tokens are ids like any other.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.context import Context
from llama.predictions import FinishReason
from llama.sampling import INVALID, SamplingParams, log_probs, sample
from llama.statistics import Statistics


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


class Batch:
    """Rows that are completed together.

    The running rows are the first rows of the context, in order; the last takes the place of one that ends.
    """

    def __init__(
        self,
        context: Context,
        rows: list[Row],
        params: SamplingParams,
        stop_tokens: Collection[int],
        logprobs: bool,
        statistics: Statistics,
    ) -> None:
        self.context = context
        self.running = list(rows)
        self.params = params
        self.stop_tokens = stop_tokens
        self.logprobs = logprobs
        self.statistics = statistics

    def run(self, echo: bool) -> Iterator[Chosen]:
        """Complete the rows. With echo their prompts come first. NaN logits raise ValueError."""
        rows, start = list(self.running), time.perf_counter()
        hidden, scores = self.context.read_prompts([row.prompt for row in rows], scored=echo and self.logprobs)
        if self.params.max_gen_len == 0:
            self.running.clear()
        new = self._choose(hidden) if self.running else []
        self.statistics.prefill_seconds += time.perf_counter() - start
        self.statistics.prompt_tokens += sum(len(row.prompt) for row in rows)

        if echo:
            for i, row in enumerate(rows):
                for j, token in enumerate(row.prompt):
                    yield Chosen(row.place, token, scores[i][j] if scores else None)
        if not self.running:
            for row in rows:
                yield Chosen(row.place, None, finish_reason="length")
        while self.running:
            yield from self._take(new)
            if self.running:
                new = self._decode()

    def _take(self, new: list[tuple[int, float | None]]) -> Iterator[Chosen]:
        """Give each running row its new token, and end those that are complete."""
        ended = []
        for i, (row, (token, score)) in enumerate(zip(self.running, new, strict=True)):
            reason: FinishReason | None = "stop" if token in self.stop_tokens else None
            if reason is None:
                row.tokens.append(token)
                yield Chosen(row.place, token, score)
                reason = "length" if row.generated == row.limit else None
            if reason is not None:
                yield Chosen(row.place, None, finish_reason=reason)
                ended.append(i)
        for i in reversed(ended):
            moved = self.running.pop()
            if i < len(self.running):
                self.context.move_row(len(self.running), i, len(moved.tokens) - 1)
                self.running[i] = moved

    def _decode(self) -> list[tuple[int, float | None]]:
        """The next token of each running row, from its newest."""
        start = time.perf_counter()
        newest = [[row.tokens[-1]] for row in self.running]
        hidden = self.context.step(newest, [len(row.tokens) - 1 for row in self.running])
        new = self._choose(hidden[:, 0])
        self.statistics.decode_seconds += time.perf_counter() - start
        self.statistics.decode_steps += 1
        self.statistics.decoded_tokens += len(new)
        return new

    def _choose(self, hidden: Tensor) -> list[tuple[int, float | None]]:
        """The next token of each running row from its final state, hidden (bsz, dim), and its log-probability."""
        model, params = self.context.model, self.params
        logits = model.logits(hidden)
        uniform = torch.stack([row.uniforms[row.generated] for row in self.running])
        tokens = sample(logits, params.temperature, params.top_p, uniform.to(logits.device))
        tokens = model.parallel.broadcast(tokens)  # rounding may differ between ranks, their texts may not
        chosen = tokens.tolist()
        if INVALID in chosen:
            row = self.running[chosen.index(INVALID)]
            raise ValueError(
                f"the logits of prompt {row.place} are NaN or infinite after {len(row.tokens)} tokens: the weights are "
                "damaged, or too large for this dtype (try --dtype float32)"
            )
        scores = log_probs(logits, tokens).tolist() if self.logprobs else [None] * len(chosen)
        return list(zip(chosen, scores, strict=True))
