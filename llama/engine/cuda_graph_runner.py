"""Decode steps captured once as CUDA graphs and replayed: the host launches a whole step at once, and one ahead.

A graph runs on fixed memory: the context's cache, and buffers here with each row's newest tokens, its position and its
random numbers. A step updates them for the next one, so that steps can follow each other without the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama.backends.base import Capture
from llama.distributed.job import collective
from llama.engine.context import Context
from llama.engine.runner import Sampler, StepOutput, step_output, uniforms_at
from llama.sampling import SamplingParams

log = logging.getLogger("llama")

# Most tokens of a row in a step.
MAX_STEP_TOKENS = 8

# Graphs are captured for numbers of rows that are powers of two up to this one, and multiples of it beyond: see D37.
ROWS_MULTIPLE = 8

# Seconds from which on a capture is logged; with kernels that are compiled already it takes far less.
SLOW_CAPTURE = 1.0


class CudaGraphRunner:
    """Replays a graph for each number of rows, number of tokens a row, and kind of sampling (see D37); see `Runner`."""

    runs_ahead = True

    def __init__(self, context: Context, capture: Capture) -> None:
        """Bind the runner to the context's cache as it is: a cache that has grown needs another runner."""
        self.context = context
        self._capture = capture
        self._sampler = Sampler(context.model)
        self._graphs: dict[tuple[int | bool, ...], Callable[[], None]] = {}
        self._in_flight: deque[tuple[list[Tensor], torch.cuda.Event | None, int, int]] = deque()
        _, rows, length, *_ = context.cache.keys.shape
        device = context.model.device
        self._tokens = torch.zeros(rows, MAX_STEP_TOKENS, dtype=torch.long, device=device)
        self._start_pos = torch.zeros(rows, dtype=torch.long, device=device)
        self._running = torch.zeros(rows, dtype=torch.long, device=device)  # 1, or 0 for rows that only pad a graph
        self._draft_len = torch.zeros(1, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(rows, length, dtype=torch.float32, device=device)
        self._sampled = torch.zeros(rows * MAX_STEP_TOKENS + 1, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(rows * MAX_STEP_TOKENS, dtype=torch.float32, device=device)

    def begin(self, params: SamplingParams, uniforms: Tensor) -> None:
        self._in_flight.clear()  # left by a batch that was interrupted
        self._sampler.begin(params)
        self._uniforms[: uniforms.shape[0], : uniforms.shape[1]] = uniforms.to(self._uniforms.device)

    def sample(self, hidden: Tensor, start_pos: Sequence[int], draft_len: int = 0) -> StepOutput:
        return self._sampler.sample(hidden, self._uniforms, start_pos, draft_len)

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], draft_len: int = 0) -> None:
        assert not self._in_flight, "a step in flight is followed by launch_next"
        bsz, longest = len(tokens), max(len(row) for row in tokens)
        # A power of two, so that there are few graphs, unless the cache ends before.
        seqlen = 1 << (longest - 1).bit_length()
        if max(start_pos) + seqlen > self.context.cache.max_seq_len:
            seqlen = longest
        idle = self._rows(bsz) - bsz
        padded = [[*row, *[0] * (seqlen - len(row))] for row in tokens] + [[0] * seqlen] * idle
        self._tokens[: bsz + idle, :seqlen] = self._upload(padded)
        self._start_pos[: bsz + idle] = self._upload([*start_pos, *[0] * idle])
        self._running[: bsz + idle] = self._upload([1] * bsz + [0] * idle)
        self._draft_len.copy_(self._upload([draft_len]))
        self.context.truncate([*start_pos, *[0] * idle])
        self._replay(bsz, seqlen)
        self.context.append(tokens)  # only now: capturing takes time, in which a user may interrupt

    def launch_next(self) -> None:
        self._replay(self._in_flight[-1][2], 1)

    def wait(self) -> StepOutput:
        (tokens, *logprobs), event, bsz, seqlen = self._in_flight.popleft()
        if event is not None:
            collective(event.synchronize)  # on several ranks
        output = step_output(tokens, logprobs[0] if logprobs else None, seqlen, bsz)
        if self._in_flight:  # the step after it has read these tokens
            self.context.append([[max(row[-1], 0)] for row in output.tokens])
        return output

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        self.context.copy_row(source, target, seqlen)
        self._uniforms[target] = self._uniforms[source]

    def _rows(self, bsz: int) -> int:
        """Return the number of rows of the graph for bsz rows; the cache's rows beyond bsz have no sequence."""
        rows = 1 << (bsz - 1).bit_length() if bsz <= ROWS_MULTIPLE else -(-bsz // ROWS_MULTIPLE) * ROWS_MULTIPLE
        return min(rows, len(self._running))

    def _replay(self, bsz: int, seqlen: int) -> None:
        """Launch the graph of a step; capture it first if there is none yet."""
        rows = self._rows(bsz)
        params = self._sampler.params
        # All that decides which operations run; other parameters are data on the device.
        key = (rows, seqlen, params.is_greedy, params.is_greedy or params.top_p == 1, params.logprobs)
        if key not in self._graphs:
            start = time.perf_counter()
            state = self._tokens.clone(), self._start_pos.clone()
            self._graphs[key] = self._capture(lambda: self._step(rows, seqlen))
            self._tokens.copy_(state[0])
            self._start_pos.copy_(state[1])
            seconds = time.perf_counter() - start
            if seconds > SLOW_CAPTURE:
                log.info("compiled and captured a step in %.1f s; Triton caches compiled kernels", seconds)
        outputs = [self._sampled[: rows * seqlen + 1]]
        if self._sampler.params.logprobs:
            outputs.append(self._logprobs[: rows * seqlen])
        with torch.cuda.device_of(self._draft_len):
            self._graphs[key]()
            self._in_flight.append((*_download(outputs), bsz, seqlen))

    def _step(self, rows: int, seqlen: int) -> None:
        """Run what a graph captures: compute, sample, and store tokens and positions for a next step of one token."""
        model, cache = self.context.model, self.context.cache
        tokens, start_pos = self._tokens[:rows, :seqlen], self._start_pos[:rows]
        hidden = model.hidden(tokens, start_pos, cache, cache.max_seq_len)
        uniform = uniforms_at(self._uniforms, start_pos, seqlen)
        sampled, logprobs = self._sampler(hidden.flatten(0, 1), uniform.flatten(), self._draft_len)
        self._sampled[: len(sampled)] = sampled
        if logprobs is not None:
            self._logprobs[: rows * seqlen] = logprobs
        self._tokens[:rows, 0] = sampled[:-1].view(rows, seqlen)[:, -1].clamp(min=0)
        self._start_pos[:rows] += seqlen * self._running[:rows]

    def _upload(self, values: Sequence[object]) -> Tensor:
        """Copy numbers to the device, without waiting for it."""
        device = self._draft_len.device
        return torch.tensor(values, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _download(tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copy tensors to the host, where they are complete after the event, or at once if the event is None."""
    if tensors[0].device.type != "cuda":
        return [tensor.clone() for tensor in tensors], None
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copies, event
