"""Steps: each computes chunks of tokens of several sequences in one pass, and samples a token after some of them.

Knows nothing of limits, of when sequences end or of who gets which page.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llama.backends.base import backend_of
from llama.cache import ForwardBatch, KVCache
from llama.engine.logit_changes import ChangesOfSteps, LogitChanges, WaitForChanges
from llama.engine.sequence import Chunk
from llama.engine.step_data import SampledTokens, StepOutput, StepParams
from llama.memory.estimate import MAX_SCORED_POSITIONS
from llama.model import Transformer
from llama.rope_scaling import LengthScaling
from llama.sampling import SamplingParams, log_probs, top_log_probs


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
        self,
        hidden: Tensor,
        uniforms: tuple[Tensor, Tensor | None],
        params: StepParams,
        announced: Tensor,
        changes: LogitChanges | None = None,
    ) -> SampledTokens:
        """Return a token for each final state, with `announced` (1,) appended, and the scores that are asked for.

        hidden: (n, dim), final states; uniforms: (n,) each, the random numbers that draw tokens, and XTC's; changes: of
        logits, before tokens are drawn.
        """
        logits, scores = self.model.logits(hidden), params.scores
        changed = logits if changes is None else changes.apply(logits)
        if params.filters is not None:
            changed = self._draw.filter(changed, params.filters, params.tensors.temperature, uniforms[1])
        tokens = torch.cat([self._draw(changed, uniforms[0], params.tensors), announced])
        if self.model.parallel.size > 1:
            tokens = self.model.parallel.broadcast(tokens)
        logprobs = log_probs(logits, tokens[:-1].clamp(min=0)) if scores.logprobs else None
        return SampledTokens(tokens, logprobs, *(top_log_probs(logits, scores.top) if scores.top else ()))


class EagerRunner:
    """Computes each step when it is launched; see `Runner`."""

    runs_ahead = False

    def __init__(self, model: Transformer, cache: KVCache, is_draft: bool = False) -> None:
        """Bind the runner to a model and its cache; a draft model samples without the controls of requests."""
        self.model, self.cache = model, cache
        self.device = model.device
        self._sampler = Sampler(model)
        self._is_draft, self._is_controlled = is_draft, False
        # Every rank gets the first rank's tokens, so only its logits are changed.
        self._changes = ChangesOfSteps(self.device, model.args.vocab_size) if model.parallel.rank == 0 else None
        self._outputs: deque[StepOutput] = deque()
        # Of the last step: its batch, if a next one can follow it, its tokens, and its rows' sampling parameters.
        self._batch: ForwardBatch | None = None
        self._newest: list[list[int]] = []
        self._params: list[SamplingParams] = []
        self._is_dynamic = isinstance(model.args.rope_scaling, LengthScaling)

    def launch(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        self._is_controlled = self._has_controls(chunks)
        changes = self._begin_changes(chunks) if self._is_controlled else None
        hidden = self._compute(chunks)
        sampled = [chunk for chunk in chunks if chunk.n_sampled]
        if not sampled:
            self._outputs.append(StepOutput([[] for _ in chunks]))
            return
        params = [chunk.sequence.params for chunk in sampled for _ in range(chunk.n_sampled)]
        if params != self._params:
            # In this order: after an interrupt they are not taken for those of the tensors.
            self._step_params = StepParams.of(params, self.device)
            self._params = params
        self._sample(self._sampled_states(hidden, chunks), chunks, announced, changes)

    def launch_next(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        """See `Runner`. What the step before has looked up of the rows is used again: their pages are the same."""
        newest = [max(tokens[-1], 0) for tokens in self._newest]
        if self._batch is None or len(newest) != len(self._batch.positions):
            known = [Chunk(c.sequence, c.start, [token], 1) for c, token in zip(chunks, newest, strict=True)]
            self.launch(known, announced)
            return
        self._batch = self._batch.next_positions()
        changes = self._begin_changes(chunks) if self._is_controlled else None
        hidden = self.model.hidden(torch.tensor(newest, device=self.device), self._batch)
        self._sample(hidden, chunks, announced, changes)

    def wait(self) -> StepOutput:
        return self._outputs.popleft()

    def reset(self) -> None:
        self._outputs.clear()

    def _has_controls(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether a request of a step has controls that this runner heeds."""
        return not self._is_draft and any(chunk.sequence.controls is not None for chunk in chunks)

    def _begin_changes(self, chunks: Sequence[Chunk]) -> WaitForChanges | None:
        """Have the changes of a step's logits worked out, and return what waits for them."""
        if self._changes is None:
            return None
        rows = itertools.accumulate((chunk.n_sampled for chunk in chunks[:-1]), initial=0)
        return self._changes.begin(chunks, list(rows))

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

    def _sample(self, hidden: Tensor, chunks: Sequence[Chunk], announced: int, changes: WaitForChanges | None) -> None:
        """Sample the tokens that follow final states hidden (n_sampled of all chunks, dim)."""
        uniform: list[float] = []
        for chunk in chunks:
            uniform += uniforms_of(chunk, chunk.sequence.uniforms)
        numbers, xtc_numbers = torch.tensor(uniform, dtype=torch.float32, device=self.device), None
        if self._step_params.has_xtc:
            each = [uniforms_of(chunk, chunk.sequence.xtc_uniforms) for chunk in chunks]
            xtc_numbers = torch.tensor(
                list(itertools.chain.from_iterable(each)), dtype=torch.float32, device=self.device
            )
        told = torch.tensor([announced], device=self.device)
        spans, start = [], 0
        for chunk in chunks:
            spans.append(slice(start, start + chunk.n_sampled))
            start += chunk.n_sampled
        changed = changes() if changes is not None else None
        sampled = self._sampler(hidden, (numbers, xtc_numbers), self._step_params, told, changed)
        output = host_output(sampled, spans)
        self._newest = output.tokens
        self._outputs.append(output)

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """Return the log-probability of each target, given the state before it in hidden (n_targets or more, dim)."""
        scores: list[float] = []
        for i in range(0, len(targets), MAX_SCORED_POSITIONS):
            part = torch.tensor(targets[i : i + MAX_SCORED_POSITIONS], device=self.device)
            scores += log_probs(self.model.logits(hidden[i : i + len(part)]), part).tolist()
        return scores


def uniforms_of(chunk: Chunk, of_sequence: Tensor) -> list[float]:
    """Return the random numbers of the tokens that a chunk samples, from those of all new tokens of its sequence.

    Those beyond the limit of a sequence are any.
    """
    first = chunk.start + len(chunk.tokens) - chunk.n_sampled + 1 - len(chunk.sequence.prompt)
    numbers: list[float] = of_sequence[first : first + chunk.n_sampled].tolist()
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
