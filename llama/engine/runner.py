"""Decode steps of a batch: the newest tokens of each row are read, and what follows each of them is sampled.

Knows nothing of proposals, of limits or of when sequences end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.backends.base import backend_of
from llama.engine.context import Context
from llama.model import Transformer
from llama.sampling import SamplingParams, log_probs


@dataclass(frozen=True)
class StepOutput:
    """What a step sampled after each token that it read: a list for each row."""

    tokens: list[list[int]]  # INVALID where logits are NaN or infinite
    logprobs: list[list[float]] | None  # if they were asked for
    draft_len: int  # what the first rank said when it launched the step


class Runner(Protocol):
    """Runs steps over the first rows of a context. Steps are waited for in the order of launch, on every rank alike."""

    context: Context
    runs_ahead: bool  # whether a step may be launched before the one before it is waited for, and it pays

    def begin(self, params: SamplingParams, uniforms: Tensor) -> None:
        """Begin a batch. uniforms: (bsz, seqlen), what samples the token that follows a row's position."""
        ...

    def sample(self, hidden: Tensor, start_pos: Sequence[int], draft_len: int = 0) -> StepOutput:
        """Sample what follows tokens that were read already: final states (bsz, seqlen, dim) from start_pos on."""
        ...

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], draft_len: int = 0) -> None:
        """Read a few tokens of each row from start_pos on; what is sampled after a shorter row's last means nothing."""
        ...

    def launch_next(self) -> None:
        """Launch a step that reads what the last one launched sampled; its rows had as many tokens: a power of two."""
        ...

    def wait(self) -> StepOutput:
        """Return what the oldest step in flight sampled."""
        ...

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        """Copy row `source`, of `seqlen` tokens, over row `target`; no step may be in flight."""
        ...


class Sampler:
    """Samples tokens from final states: on every rank those of the first, since rounding differs between ranks."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.params = SamplingParams()
        self._draw = backend_of(model).token_sampler()

    def begin(self, params: SamplingParams) -> None:
        self.params = params
        self._draw.begin(params)

    def __call__(self, hidden: Tensor, uniform: Tensor, draft_len: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample tokens (n,), which come with draft_len (1,) behind them, (n + 1,), and their log-probabilities (n,).

        hidden: (n, dim); uniform: (n,).
        """
        logits = self.model.logits(hidden)
        tokens = torch.cat([self._draw(logits, uniform), draft_len])
        if self.model.parallel.size > 1:
            tokens = self.model.parallel.broadcast(tokens)
        return tokens, log_probs(logits, tokens[:-1].clamp(min=0)) if self.params.logprobs else None

    def sample(self, hidden: Tensor, uniforms: Tensor, start_pos: Sequence[int], draft_len: int) -> StepOutput:
        """See `Runner.sample`; uniforms as in `Runner.begin`."""
        bsz, seqlen, _ = hidden.shape
        starts = torch.tensor(start_pos, device=hidden.device)
        uniform = uniforms_at(uniforms, starts, seqlen).flatten()
        tokens, logprobs = self(hidden.flatten(0, 1), uniform, torch.tensor([draft_len], device=hidden.device))
        return step_output(tokens.cpu(), None if logprobs is None else logprobs.cpu(), seqlen, bsz)


class EagerRunner:
    """Computes steps as they are launched."""

    runs_ahead = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self._sampler = Sampler(context.model)
        self._outputs: deque[StepOutput] = deque()
        self._end: list[int] = []  # positions that the last step launched read up to

    def begin(self, params: SamplingParams, uniforms: Tensor) -> None:
        self._outputs.clear()
        self._sampler.begin(params)
        self._uniforms = uniforms.to(self.context.device)

    def sample(self, hidden: Tensor, start_pos: Sequence[int], draft_len: int = 0) -> StepOutput:
        return self._sampler.sample(hidden, self._uniforms, start_pos, draft_len)

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], draft_len: int = 0) -> None:
        hidden = self.context.decode(tokens, start_pos)
        self._outputs.append(self._sampler.sample(hidden, self._uniforms, start_pos, draft_len))
        self._end = [start + hidden.shape[1] for start in start_pos]

    def launch_next(self) -> None:
        self.launch([[max(row[-1], 0)] for row in self._outputs[-1].tokens], self._end)

    def wait(self) -> StepOutput:
        return self._outputs.popleft()

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        self.context.copy_row(source, target, seqlen)
        self._uniforms[target] = self._uniforms[source]


def uniforms_at(uniforms: Tensor, start_pos: Tensor, seqlen: int) -> Tensor:
    """Of uniforms (rows, n), those of positions start_pos (bsz,) and after: (bsz, seqlen); padding gets any."""
    positions = start_pos[:, None] + torch.arange(seqlen, device=start_pos.device)
    return uniforms[: len(start_pos)].gather(1, positions.clamp(max=uniforms.shape[1] - 1))


def step_output(tokens: Tensor, logprobs: Tensor | None, seqlen: int, bsz: int) -> StepOutput:
    """What a Sampler gave, on the host: the first bsz rows of seqlen tokens."""
    rows = tokens[:-1].view(-1, seqlen)[:bsz].tolist()
    scores = None if logprobs is None else logprobs.view(-1, seqlen)[:bsz].tolist()
    return StepOutput(rows, scores, int(tokens[-1]))
