"""Steps: each computes chunks of tokens of several sequences in one pass, and samples a token after some of them.

Knows nothing of limits, of when sequences end or of who gets which page.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llama.backends.base import backend_of
from llama.cache import ForwardBatch, KVCache
from llama.config import DynamicScaling
from llama.engine.sequence import Chunk
from llama.memory.estimate import MAX_SCORED_POSITIONS
from llama.model import Transformer
from llama.outputs import TopTokens
from llama.sampling import SamplingParams, SamplingTensors, log_probs, top_log_probs


@dataclass(frozen=True)
class Scores:
    """What a step tells of its tokens' probabilities; a graph is captured for each."""

    logprobs: bool = False
    top: int = 0  # how many of the likeliest tokens

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> Scores:
        """Return what all of the rows need together."""
        return Scores(any(each.needs_logprobs for each in params), max(each.top_logprobs for each in params))


class SampledTokens(NamedTuple):
    """Tensors that a sampler returns for n final states; those that are not asked for are None.

    tokens: (n + 1,), of which the last is what the first rank announces; logprobs: (n,); top_tokens, top_logprobs:
    (n, k), likeliest first.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> SampledTokens:
        """Return what a function makes of each tensor."""
        rest = [None if each is None else function(each) for each in self[1:]]
        return SampledTokens(function(self.tokens), *rest)


@dataclass(frozen=True)
class StepOutput:
    """The tokens that a step sampled: a list for each chunk."""

    tokens: list[list[int]]  # INVALID where logits are NaN or infinite
    logprobs: list[list[float]] | None = None  # where a chunk's sampling parameters ask for them
    announced: int | None = None  # what the first rank launched the step with; None if nothing was sampled
    top_logprobs: list[list[TopTokens]] | None = None  # as many as any chunk's sampling parameters ask for

    def cut(self, lengths: Sequence[int]) -> StepOutput:
        """Return the first tokens of each chunk, with their scores."""

        def first(values: list[list[Any]]) -> list[list[Any]]:
            return [each[:n] for each, n in zip(values, lengths, strict=True)]

        return StepOutput(
            first(self.tokens),
            first(self.logprobs) if self.logprobs else None,
            self.announced,
            first(self.top_logprobs) if self.top_logprobs else None,
        )


class Runner(Protocol):
    """Runs steps, which are launched and waited for in the same order on every rank.

    Each step that samples carries a number from the first rank to all: what it has decided on for the next step.
    """

    model: Transformer
    cache: KVCache
    runs_ahead: bool  # whether it pays to launch a step before the previous one is waited for: see D35

    def launch(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        """Launch a step."""
        ...

    def launch_next(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        """Launch a step of the tokens that the previous one samples, one a sequence; theirs in `chunks` are unknown."""
        ...

    def wait(self) -> StepOutput:
        """Wait for the oldest step in flight, and return what it sampled."""
        ...

    def reset(self) -> None:
        """Forget the steps in flight."""
        ...


class Sampler:
    """Samples tokens from final states; every rank gets the first rank's, since rounding differs between ranks."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._draw = backend_of(model).token_sampler()

    def __call__(
        self, hidden: Tensor, uniform: Tensor, rows: SamplingTensors, announced: Tensor, scores: Scores
    ) -> SampledTokens:
        """Return a token for each final state, with `announced` (1,) appended, and the scores that are asked for.

        hidden: (n, dim), final states; uniform: (n,), random numbers.
        """
        logits = self.model.logits(hidden)
        tokens = torch.cat([self._draw(logits, uniform, rows), announced])
        if self.model.parallel.size > 1:
            tokens = self.model.parallel.broadcast(tokens)
        logprobs = log_probs(logits, tokens[:-1].clamp(min=0)) if scores.logprobs else None
        return SampledTokens(tokens, logprobs, *(top_log_probs(logits, scores.top) if scores.top else ()))


class EagerRunner:
    """Computes each step when it is launched; see `Runner`."""

    runs_ahead = False

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.device
        self._sampler = Sampler(model)
        self._outputs: deque[StepOutput] = deque()
        # Of the last step: its batch, if a next one can follow it, its tokens, and its rows' sampling parameters.
        self._batch: ForwardBatch | None = None
        self._newest: list[list[int]] = []
        self._params: list[SamplingParams] = []
        self._is_dynamic = isinstance(model.args.rope_scaling, DynamicScaling)

    def launch(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        hidden = self._compute(chunks)
        sampled = [chunk for chunk in chunks if chunk.n_sampled]
        if not sampled:
            self._outputs.append(StepOutput([[] for _ in chunks]))
            return
        params = [chunk.sequence.params for chunk in sampled for _ in range(chunk.n_sampled)]
        if params != self._params:
            # The parameters last: after an interrupt they are not taken for those of the tensors.
            self._scores, self._sampling = Scores.of(params), SamplingTensors.of(params, self.device)
            self._params = params
        self._sample(self._sampled_states(hidden, chunks), chunks, announced)

    def launch_next(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        """See `Runner`. What the step before has looked up of the rows is used again: their pages are the same."""
        newest = [max(tokens[-1], 0) for tokens in self._newest]
        if self._batch is None or len(newest) != len(self._batch.positions):
            known = [Chunk(c.sequence, c.start, [token], 1) for c, token in zip(chunks, newest, strict=True)]
            self.launch(known, announced)
            return
        self._batch = self._batch.next_positions()
        hidden = self.model.hidden(torch.tensor(newest, device=self.device), self._batch)
        self._sample(hidden, chunks, announced)

    def wait(self) -> StepOutput:
        return self._outputs.popleft()

    def reset(self) -> None:
        self._outputs.clear()

    def _compute(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the final states of all tokens, (n_tokens, dim), cache them, and score prompts that are scored."""
        counts = [len(chunk.tokens) for chunk in chunks]
        # On a GPU the whole width: how attention is split follows from it, and with it the last bits.
        width = max(len(chunk.sequence.pages) for chunk in chunks) if self.device.type == "cpu" else None
        table = torch.stack([chunk.sequence.table[:width] for chunk in chunks])
        batch = ForwardBatch.of(
            self.cache,
            table if self.device.type == "cpu" else table.to(self.device),
            [chunk.start for chunk in chunks],
            counts,
            [chunk.sequence.first_page for chunk in chunks],
            self._lengths(chunks) if self._is_dynamic else None,
        )
        self._batch = None if self._is_dynamic or len(batch.groups) > 1 or max(counts) > 1 else batch
        tokens = list(itertools.chain.from_iterable(chunk.tokens for chunk in chunks))
        hidden = self.model.hidden(torch.tensor(tokens, device=self.device), batch)
        if any(chunk.sequence.is_scored for chunk in chunks):
            for chunk, states in zip(chunks, hidden.split(counts), strict=True):
                if chunk.sequence.is_scored:
                    targets = chunk.sequence.prompt[chunk.start + 1 : chunk.start + len(states) + 1]
                    chunk.sequence.scores[chunk.start + 1 :] = self._score(states, targets)
        return hidden

    def _lengths(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the length that each token's rotation is stretched by: its prompt's, or as far as it had come."""
        return torch.tensor(
            [
                max(len(chunk.sequence.prompt), chunk.start + i + 1)
                for chunk in chunks
                for i in range(len(chunk.tokens))
            ],
            device=self.device,
        )

    def _sampled_states(self, hidden: Tensor, chunks: Sequence[Chunk]) -> Tensor:
        """Return the final states that tokens are sampled after: the last of each chunk."""
        if all(len(chunk.tokens) == chunk.n_sampled for chunk in chunks):
            return hidden
        stops = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
        at = [i for chunk, stop in zip(chunks, stops, strict=True) for i in range(stop - chunk.n_sampled, stop)]
        return hidden[torch.tensor(at, device=self.device)]

    def _sample(self, hidden: Tensor, chunks: Sequence[Chunk], announced: int) -> None:
        """Sample the tokens that follow final states hidden (n_sampled of all chunks, dim)."""
        uniform = []
        for chunk in chunks:
            uniform += uniforms_of(chunk)
        numbers = torch.tensor(uniform, dtype=torch.float32, device=self.device)
        told = torch.tensor([announced], device=self.device)
        spans, start = [], 0
        for chunk in chunks:
            spans.append(slice(start, start + chunk.n_sampled))
            start += chunk.n_sampled
        output = host_output(self._sampler(hidden, numbers, self._sampling, told, self._scores), spans)
        self._newest = output.tokens
        self._outputs.append(output)

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """Return the log-probability of each target, given the state before it in hidden (n_targets or more, dim)."""
        scores: list[float] = []
        for i in range(0, len(targets), MAX_SCORED_POSITIONS):
            part = torch.tensor(targets[i : i + MAX_SCORED_POSITIONS], device=self.device)
            scores += log_probs(self.model.logits(hidden[i : i + len(part)]), part).tolist()
        return scores


def uniforms_of(chunk: Chunk) -> list[float]:
    """Return the random numbers of the tokens that a chunk samples: any for those beyond the limit of a sequence."""
    sequence = chunk.sequence
    first = chunk.start + len(chunk.tokens) - chunk.n_sampled + 1 - len(sequence.prompt)
    numbers: list[float] = sequence.uniforms[first : first + chunk.n_sampled].tolist()
    return numbers + [0.0] * (chunk.n_sampled - len(numbers))


def host_output(sampled: SampledTokens, spans: Sequence[slice]) -> StepOutput:
    """Convert what was sampled to lists; spans: the places of each chunk in it."""
    *tokens, announced = sampled.tokens.tolist()
    of_chunks, logprobs, top = [tokens[span] for span in spans], None, None
    if sampled.logprobs is not None:
        scores = sampled.logprobs.tolist()
        logprobs = [scores[span] for span in spans]
    if sampled.top_tokens is not None and sampled.top_logprobs is not None:
        ids, scores = sampled.top_tokens.tolist(), sampled.top_logprobs.tolist()
        rows = [tuple(zip(*row, strict=True)) for row in zip(ids, scores, strict=True)]
        top = [rows[span] for span in spans]
    return StepOutput(of_chunks, logprobs, announced, top)
