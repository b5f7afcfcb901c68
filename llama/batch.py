"""One batch from prompts to the last token: a prefill, then steps of a token or more for every running row.

Knows nothing of text; stop tokens are ids like any other.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.context import Context
from llama.footprint import MOST_POSITIONS
from llama.predictions import FinishReason
from llama.sampling import INVALID, SamplingParams, log_probs, sample
from llama.speculation import Pace, Proposer
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

    def next_uniforms(self, count: int) -> Tensor:
        """The random numbers of the next `count` tokens, (count,); 0 for those beyond the limit."""
        uniforms = self.uniforms[self.generated : self.generated + count]
        return torch.nn.functional.pad(uniforms, (0, count - len(uniforms)))


# Tokens that a row gets in one step, with their log-probabilities.
Run = list[tuple[int, float | None]]


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
        proposer: Proposer | None = None,
    ) -> None:
        self.context = context
        self.running = list(rows)
        self.params = params
        self.stop_tokens = stop_tokens
        self.logprobs = logprobs
        self.statistics = statistics
        self.proposer = proposer if context.steady else None  # otherwise guesses would change the keys before them
        self.pace = Pace()
        self.count = 0  # tokens to guess for each row in the next step

    def run(self, echo: bool) -> Iterator[Chosen]:
        """Complete the rows. With echo their prompts come first. NaN logits raise ValueError."""
        rows, start, computed = list(self.running), time.perf_counter(), self.context.computed
        hidden, scores = self.context.read([row.prompt for row in rows], scored=echo and self.logprobs)
        computed = self.context.computed - computed
        if self.params.max_gen_len == 0:
            self.running.clear()
        new = self._choose(hidden[:, None], [[] for _ in rows]) if self.running else []
        if self.proposer is not None and self.running:
            self.proposer.begin([row.prompt for row in rows])
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
            yield from self._take(new)
            if self.running:
                new = self._decode()

    def _take(self, new: list[Run]) -> Iterator[Chosen]:
        """Give each running row its new tokens, and end those that are complete."""
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
        for i in reversed(ended):
            moved = self.running.pop()
            if i < len(self.running):
                for rows in (self.context, self.proposer):
                    if rows is not None:
                        rows.move_row(len(self.running), i, len(moved.tokens) - 1)
                self.running[i] = moved

    def _decode(self) -> list[Run]:
        """The next tokens of each running row: one from its newest, and one from each guess that was right."""
        start = time.perf_counter()
        proposals = self._propose()
        newest = [[row.tokens[-1], *proposal] for row, proposal in zip(self.running, proposals, strict=True)]
        resting = self.pace.resting
        hidden = self.context.step(newest, [len(row.tokens) - 1 for row in self.running])
        new = self._choose(hidden, proposals)
        seconds = time.perf_counter() - start
        tokens, proposed = sum(len(run) for run in new), sum(len(proposal) for proposal in proposals)
        self.pace.record(seconds, len(new), proposed, tokens - len(new))
        self.statistics.add_step(seconds, tokens, proposed, tokens - len(new), resting)
        return new

    def _propose(self) -> list[list[int]]:
        """Guesses for each running row; none beyond its limit, nor where the cache has no room for all."""
        longest = max(len(row.tokens) for row in self.running)
        count = min(self.count, self.context.cache.max_seq_len - longest, MOST_POSITIONS // len(self.running) - 1)
        if self.proposer is None or count < 1:
            return [[] for _ in self.running]
        uniforms = torch.stack([row.next_uniforms(count) for row in self.running])
        proposals = self.proposer.propose([row.tokens for row in self.running], uniforms, self.params)
        return [
            proposal[: row.limit - row.generated - 1] for row, proposal in zip(self.running, proposals, strict=True)
        ]

    def _choose(self, hidden: Tensor, proposals: list[list[int]]) -> list[Run]:
        """The next tokens of each running row: those of its proposal that the model chooses, too, and one more.

        hidden: (bsz, seqlen, dim), the final states of the newest tokens and of the proposals after them.
        """
        model, params = self.context.model, self.params
        bsz, seqlen, _ = hidden.shape
        logits = model.logits(hidden.flatten(0, 1))  # (bsz * seqlen, vocab_size)
        uniform = torch.cat([row.next_uniforms(seqlen) for row in self.running]).to(logits.device)
        tokens = sample(logits, params.temperature, params.top_p, uniform)
        if self.proposer is not None:
            tokens = torch.cat([tokens, tokens.new_tensor([self.pace.next_count()])])
        tokens = model.parallel.broadcast(tokens)  # rounding and clocks differ between ranks, their texts may not
        if self.proposer is not None:
            self.count = int(tokens[-1])
        tokens = tokens[: bsz * seqlen]
        scores = log_probs(logits, tokens.clamp(min=0)).tolist() if self.logprobs else [None] * len(tokens)
        chosen, new = tokens.tolist(), []
        for i, (row, proposal) in enumerate(zip(self.running, proposals, strict=True)):
            run = slice(i * seqlen, i * seqlen + agreed(proposal, chosen[i * seqlen :], self.stop_tokens) + 1)
            if INVALID in chosen[run]:
                length = len(row.tokens) + chosen[run].index(INVALID)
                raise ValueError(
                    f"the logits of prompt {row.place} are NaN or infinite after {length} tokens: the weights are "
                    "damaged, or too large for this dtype (try --dtype float32)"
                )
            new.append(list(zip(chosen[run], scores[run], strict=True)))
        return new


def agreed(proposal: Sequence[int], chosen: Sequence[int], stop_tokens: Collection[int]) -> int:
    """How many tokens of a proposal were chosen, too, up to one that ends a row."""
    pairs = zip(proposal, chosen, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other or one in stop_tokens), len(proposal))
