"""Steps recorded once as CUDA graphs and replayed: the host launches a whole step at once, and one ahead.

A graph runs on fixed memory: the context's cache, and buffers here that hold each row's newest tokens, its position and
its random numbers. A step leaves them as the next one needs them, so a step can follow another without the host.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llama.backends.inductor import has_own_kernels
from llama.engine.context import Context
from llama.engine.runner import Chooser, Picked, as_picked, samples_on_gpu, uniforms_at
from llama.model import Transformer
from llama.sampling import SamplingParams

log = logging.getLogger("llama")

# Most tokens of a row in a step.
MOST_TOKENS = 8

# From here on graphs are made for multiples of it, below it for powers of two.
ROWS = 8

# Seconds; with kernels that are compiled already recording takes far less.
WORTH_TELLING = 1.0

# Takes what a step does on the device and runs it once; the result runs it again, on the same memory.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def can_record(model: Transformer) -> bool:
    """Whether a step of this model can be a CUDA graph: its kernels must find lengths on the device, as NCCL does."""
    together = model.parallel.group if model.parallel.size > 1 else None
    return samples_on_gpu(model) and has_own_kernels(model) and (not together or dist.get_backend(together) == "nccl")


class CudaGraphs:
    """Records work as CUDA graphs, which share one pool of memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            stream, current = _side_stream(self._device), torch.cuda.current_stream()
            # Compiles kernels, and lets libraries allocate what they keep: neither may happen during a capture.
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    run()
            finally:
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are watched: those of others, NCCL's watchdog for one, may do what they like.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                run()
        return graph.replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


class GraphSteps:
    """See `Steps`. A graph serves a number of rows, a number of tokens a row and a kind of sampling."""

    runs_ahead = True

    def __init__(self, context: Context, record: Record) -> None:
        """Steps of the context's cache as it is: one that has grown needs others."""
        self.context = context
        self._record = record
        self._chooser = Chooser(context.model)
        self._graphs: dict[tuple[object, ...], Callable[[], None]] = {}
        self._under_way: deque[tuple[list[Tensor], torch.cuda.Event | None, int, int]] = deque()
        _, rows, length, *_ = context.cache.keys.shape
        device = context.model.device
        self._tokens = torch.zeros(rows, MOST_TOKENS, dtype=torch.long, device=device)
        self._start_pos = torch.zeros(rows, dtype=torch.long, device=device)
        self._running = torch.zeros(rows, dtype=torch.long, device=device)  # 1, or 0 for rows that only fill up a graph
        self._note = torch.zeros(1, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(rows, length, device=device)
        self._picked = torch.zeros(rows * MOST_TOKENS + 1, dtype=torch.long, device=device)
        self._scores = torch.zeros(rows * MOST_TOKENS, device=device)

    def begin(self, params: SamplingParams, logprobs: bool, uniforms: Tensor) -> None:
        self._under_way.clear()  # of a batch that was interrupted
        self._chooser.set(params, logprobs)
        self._uniforms[: uniforms.shape[0], : uniforms.shape[1]] = uniforms.to(self._uniforms.device)

    def choose(self, hidden: Tensor, start_pos: Sequence[int], note: int = 0) -> Picked:
        return self._chooser.choose(hidden, self._uniforms, start_pos, note)

    def launch(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], note: int = 0) -> None:
        assert not self._under_way, "only what was chosen on the device can be read ahead"
        bsz, longest = len(tokens), max(len(row) for row in tokens)
        # As few graphs as the room behind the longest row allows.
        seqlen = 1 << (longest - 1).bit_length()
        if max(start_pos) + seqlen > self.context.cache.max_seq_len:
            seqlen = longest
        idle = self._rows(bsz) - bsz
        padded = [[*row, *[0] * (seqlen - len(row))] for row in tokens] + [[0] * seqlen] * idle
        self._tokens[: bsz + idle, :seqlen] = self._upload(padded)
        self._start_pos[: bsz + idle] = self._upload([*start_pos, *[0] * idle])
        self._running[: bsz + idle] = self._upload([1] * bsz + [0] * idle)
        self._note.copy_(self._upload([note]))
        self.context.forget([*start_pos, *[0] * idle])
        self._replay(bsz, seqlen)
        self.context.hold(tokens)  # only now: recording takes time, in which a user may interrupt

    def go_on(self) -> None:
        self._replay(self._under_way[-1][2], 1)

    def collect(self) -> Picked:
        (picked, *scores), event, bsz, seqlen = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        chosen = as_picked(picked, scores[0] if scores else None, seqlen, bsz)
        if self._under_way:  # by steps that have read these tokens
            self.context.hold([[max(row[-1], 0)] for row in chosen.tokens])
        return chosen

    def move_row(self, source: int, target: int, length: int) -> None:
        self.context.move_row(source, target, length)
        self._uniforms[target] = self._uniforms[source]

    def _rows(self, bsz: int) -> int:
        """Rows of the graph for bsz rows: those beyond them are rows of the cache that nobody needs any more."""
        rows = 1 << (bsz - 1).bit_length() if bsz <= ROWS else -(-bsz // ROWS) * ROWS
        return min(rows, len(self._running))

    def _replay(self, bsz: int, seqlen: int) -> None:
        rows = self._rows(bsz)
        key = (rows, seqlen, *self._chooser.kind)
        if key not in self._graphs:
            start = time.perf_counter()
            state = self._tokens.clone(), self._start_pos.clone()
            self._graphs[key] = self._record(lambda: self._step(rows, seqlen))
            self._tokens.copy_(state[0])
            self._start_pos.copy_(state[1])
            seconds = time.perf_counter() - start
            if seconds > WORTH_TELLING:
                log.info("compiled and recorded a step in %.1f s; Triton keeps what it compiles", seconds)
        found = [self._picked[: rows * seqlen + 1]]
        if self._chooser.logprobs:
            found.append(self._scores[: rows * seqlen])
        with torch.cuda.device_of(self._note):
            self._graphs[key]()
            self._under_way.append((*_download(found), bsz, seqlen))

    def _step(self, rows: int, seqlen: int) -> None:
        """What a graph does: read, choose, and leave the newest tokens and their positions for a step of one token."""
        model, cache = self.context.model, self.context.cache
        tokens, start_pos = self._tokens[:rows, :seqlen], self._start_pos[:rows]
        hidden = model.hidden(tokens, start_pos, cache, cache.max_seq_len)
        uniform = uniforms_at(self._uniforms, start_pos, seqlen)
        picked, scores = self._chooser(hidden.flatten(0, 1), uniform.flatten(), self._note)
        self._picked[: len(picked)] = picked
        if scores is not None:
            self._scores[: rows * seqlen] = scores
        self._tokens[:rows, 0] = picked[:-1].view(rows, seqlen)[:, -1].clamp(min=0)
        self._start_pos[:rows] += seqlen * self._running[:rows]

    def _upload(self, values: Sequence[object]) -> Tensor:
        device = self._note.device
        return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _download(tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies on the host, which are there when the event is; None: they are there."""
    if tensors[0].device.type != "cuda":
        return [tensor.clone() for tensor in tensors], None
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copies, event
