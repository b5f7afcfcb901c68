"""Decode steps of a batch: each computes the newest tokens of every row, and samples a token after each of them.

Knows nothing of draft tokens, of limits or of when sequences end.
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
    """The tokens that a step sampled, one after each token that it computed: a list for each row."""

    tokens: list[list[int]]  # INVALID where logits are NaN or infinite
    logprobs: list[list[float]] | None  # where the sampling parameters ask for them
    draft_len: int  # that the first rank launched the step with


class Runner(Protocol):
    """Runs steps over the first rows of a context, which are launched and waited for in the same order on every rank.

    Each step carries along a draft_len, the number of draft tokens in the next step, so that all ranks use the first
    rank's.
    """

    context: Context
    runs_ahead: bool  # whether it pays to launch a step before the previous one is waited for: see D35

    def begin(self, params: SamplingParams, uniforms: Tensor) -> None:
        """Begin a batch. uniforms: (bsz, seqlen), the random number of the token after each position of a row."""
        ...

    def sample(self, hidden: Tensor, start_pos: Sequence[int], draft_len: int = 0) -> StepOutput:
        """Sample the tokens that follow final states hidden (bsz, seqlen, dim) at positions from start_pos on."""
        ...

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], draft_len: int = 0) -> None:
        """Launch a step that computes a few tokens of each row from start_pos on.

        Tokens that are sampled beyond the end of a shorter row mean nothing.
        """
        ...

    def launch_next(self) -> None:
        """Launch a step that computes the newest tokens that the previous step samples.

        All rows of the previous step had the same number of tokens, a power of two.
        """
        ...

    def wait(self) -> StepOutput:
        """Wait for the oldest step in flight, and return what it sampled."""
        ...

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        """Copy row `source`, of `seqlen` tokens, over row `target`; no step may be in flight."""
        ...


class Sampler:
    """Samples tokens from final states; every rank gets the first rank's, since rounding differs between ranks."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.params = SamplingParams()
        self._draw = backend_of(model).token_sampler()

    def begin(self, params: SamplingParams) -> None:
        self.params = params
        self._draw.begin(params)

    def __call__(self, hidden: Tensor, uniform: Tensor, draft_len: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return tokens (n,) with draft_len (1,) appended, (n + 1,), and their log-probabilities (n,), if asked for.

        hidden: (n, dim), final states; uniform: (n,), random numbers.
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
    """Computes each step when it is launched; see `Runner`."""

    runs_ahead = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self._sampler = Sampler(context.model)
        self._outputs: deque[StepOutput] = deque()
        self._end: list[int] = []  # of each row: the position after those of the last step

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
    """Return uniforms (rows, n) at the seqlen positions from start_pos (bsz,) on: (bsz, seqlen); any for padding."""
    positions = start_pos[:, None] + torch.arange(seqlen, device=start_pos.device)
    return uniforms[: len(start_pos)].gather(1, positions.clamp(max=uniforms.shape[1] - 1))


def step_output(tokens: Tensor, logprobs: Tensor | None, seqlen: int, bsz: int) -> StepOutput:
    """Convert a Sampler's results on the host to lists: the first bsz rows of seqlen tokens."""
    rows = tokens[:-1].view(-1, seqlen)[:bsz].tolist()
    scores = None if logprobs is None else logprobs.view(-1, seqlen)[:bsz].tolist()
    return StepOutput(rows, scores, int(tokens[-1]))
