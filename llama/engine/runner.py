"""Steps of a batch: the newest tokens of each row are read, and what follows each of them is chosen.

Knows nothing of guesses, of limits or of when rows end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.backends.cuda.available import LARGEST_VOCAB, has_triton
from llama.engine.context import Context
from llama.model import Transformer
from llama.sampling import SamplingParams, log_probs, sample


@dataclass(frozen=True)
class Picked:
    """What a step chose after each token that it read: a list for each row."""

    tokens: list[list[int]]  # INVALID where logits are NaN or infinite
    scores: list[list[float]] | None  # log-probabilities, if they were asked for
    note: int  # the first rank's


class Steps(Protocol):
    """Steps over the first rows of a context. What is launched is collected in the same order, on every rank alike."""

    context: Context
    runs_ahead: bool  # whether a step may be launched before the one before it is collected, and it pays

    def begin(self, params: SamplingParams, logprobs: bool, uniforms: Tensor) -> None:
        """Begin a batch. uniforms: (bsz, length), the number that chooses what follows a row's token at a position."""
        ...

    def choose(self, hidden: Tensor, start_pos: Sequence[int], note: int = 0) -> Picked:
        """What follows tokens that were read already: final states (bsz, seqlen, dim) from start_pos on."""
        ...

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], note: int = 0) -> None:
        """Read a few tokens of each row from start_pos on; what is chosen after a shorter row's last means nothing."""
        ...

    def go_on(self) -> None:
        """Launch a step that reads what the last one launched chose, after rows of as many tokens: a power of two."""
        ...

    def collect(self) -> Picked:
        """What the oldest step that was launched chose."""
        ...

    def move_row(self, source: int, target: int, length: int) -> None:
        """Put row `source`, of `length` tokens, in the place of row `target`; no step may be under way."""
        ...


def samples_on_gpu(model: Transformer) -> bool:
    """Whether tokens are chosen by kernels that let nobody wait."""
    return has_triton(model.device) and model.args.vocab_size <= LARGEST_VOCAB


class Chooser:
    """Chooses tokens from final states: on every rank those of the first, since rounding differs between ranks."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.params, self.logprobs = SamplingParams(), False
        # On the device, so that a recorded step serves all values.
        self._temperature, self._top_p = (torch.zeros((), device=model.device) for _ in range(2))
        self._on_gpu = samples_on_gpu(model)

    def set(self, params: SamplingParams, logprobs: bool) -> None:
        self.params, self.logprobs = params, logprobs
        self._temperature.fill_(params.temperature)
        self._top_p.fill_(params.top_p)

    @property
    def kind(self) -> tuple[bool, bool, bool]:
        """What decides which operations run; of the parameters all else is data."""
        greedy = self.params.temperature == 0
        return greedy, greedy or self.params.top_p == 1, self.logprobs

    def __call__(self, hidden: Tensor, uniform: Tensor, note: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (n,) and behind them the note (1,), together (n + 1,), and the tokens' log-probabilities (n,).

        hidden: (n, dim); uniform: (n,).
        """
        logits = self.model.logits(hidden)
        with torch.cuda.device_of(logits):
            tokens = self._sample(logits, uniform)
        picked = self.model.parallel.broadcast(torch.cat([tokens, note]))
        return picked, log_probs(logits, picked[:-1].clamp(min=0)) if self.logprobs else None

    def choose(self, hidden: Tensor, uniforms: Tensor, start_pos: Sequence[int], note: int) -> Picked:
        """See `Steps.choose`; uniforms as in `Steps.begin`."""
        bsz, seqlen, _ = hidden.shape
        starts, noted = (torch.tensor(values, device=hidden.device) for values in (start_pos, [note]))
        picked, scores = self(hidden.flatten(0, 1), uniforms_at(uniforms, starts, seqlen).flatten(), noted)
        return as_picked(picked.cpu(), None if scores is None else scores.cpu(), seqlen, bsz)

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        if not self._on_gpu:
            return sample(logits, self.params.temperature, self.params.top_p, uniform)
        from llama.backends.cuda import sampling

        if self.params.temperature == 0:
            return sampling.greedy(logits)
        if self.params.top_p == 1:
            return sampling.sample_all(logits, self._temperature, uniform)
        return sampling.sample(logits, self._temperature, self._top_p, uniform)


class PlainSteps:
    """Steps that are computed as they are launched."""

    runs_ahead = False

    def __init__(self, context: Context) -> None:
        self.context = context
        self._chooser = Chooser(context.model)
        self._picked: deque[Picked] = deque()
        self._end: list[int] = []  # positions that the last step launched read up to

    def begin(self, params: SamplingParams, logprobs: bool, uniforms: Tensor) -> None:
        self._chooser.set(params, logprobs)
        self._uniforms = uniforms.to(self.context.model.device)

    def choose(self, hidden: Tensor, start_pos: Sequence[int], note: int = 0) -> Picked:
        return self._chooser.choose(hidden, self._uniforms, start_pos, note)

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], note: int = 0) -> None:
        hidden = self.context.step(tokens, start_pos)
        self._picked.append(self.choose(hidden, start_pos, note))
        self._end = [start + hidden.shape[1] for start in start_pos]

    def go_on(self) -> None:
        self.launch([[max(row[-1], 0)] for row in self._picked[-1].tokens], self._end)

    def collect(self) -> Picked:
        return self._picked.popleft()

    def move_row(self, source: int, target: int, length: int) -> None:
        self.context.move_row(source, target, length)
        self._uniforms[target] = self._uniforms[source]


def uniforms_at(uniforms: Tensor, start_pos: Tensor, seqlen: int) -> Tensor:
    """Of uniforms (rows, length), those of positions start_pos (bsz,) and after: (bsz, seqlen); padding gets any."""
    positions = start_pos[:, None] + torch.arange(seqlen, device=start_pos.device)
    return uniforms[: len(start_pos)].gather(1, positions.clamp(max=uniforms.shape[1] - 1))


def as_picked(picked: Tensor, scores: Tensor | None, seqlen: int, bsz: int) -> Picked:
    """What a Chooser gave, on the host: the first bsz rows of seqlen tokens."""
    tokens = picked[:-1].view(-1, seqlen)[:bsz].tolist()
    rows = None if scores is None else scores.view(-1, seqlen)[:bsz].tolist()
    return Picked(tokens, rows, int(picked[-1]))
