"""Decode steps captured once as CUDA graphs and replayed: the host launches a whole step at once, and one ahead.

A graph runs on fixed memory: the cache, and buffers here with each row's newest tokens, its position and its
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
from llama.cache import PAGE_SIZE, ForwardBatch, KVCache
from llama.distributed.job import collective
from llama.engine.runner import EagerRunner, SampledTokens, Scores, StepOutput, host_output
from llama.engine.sequence import Chunk
from llama.engine.sequence import Sequence as SequenceState
from llama.model import Transformer
from llama.sampling import MAX_TOP_LOGPROBS, SamplingParams, SamplingTensors

log = logging.getLogger("llama")

# Most tokens of a row in a step.
MAX_STEP_TOKENS = 8

# Graphs are captured for numbers of rows that are powers of two up to this one, and multiples of it beyond: see D37.
ROWS_MULTIPLE = 8

# Seconds from which on a capture is logged; with kernels that are compiled already it takes far less.
SLOW_CAPTURE = 1.0


class CudaGraphRunner(EagerRunner):
    """Replays a graph for each number of rows, number of tokens a row, and kind of sampling (see D37); see `Runner`.

    A step with tokens of prompts is not captured: it is computed at once, as by the base class.
    """

    runs_ahead = True

    def __init__(self, model: Transformer, cache: KVCache, capture: Capture, rows: int, width: int) -> None:
        """Bind the runner to a cache as it is; rows, width: the most sequences of a step, and pages of one."""
        super().__init__(model, cache)
        self._capture = capture
        self._graphs: dict[object, Callable[[], None]] = {}
        self._in_flight: deque[tuple[SampledTokens, torch.cuda.Event | None, Sequence[Chunk], int]] = deque()
        device = model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._tokens = zeros(rows, MAX_STEP_TOKENS)
        self._start_pos = zeros(rows)
        self._running = zeros(rows)  # 1, or 0 for rows that only pad a graph
        self._table = zeros(rows, width, dtype=torch.int32)
        self._uniforms = zeros(rows, width * PAGE_SIZE, dtype=torch.float32)  # of the token after each position
        self._temperature, self._top_p = (zeros(rows, dtype=torch.float32) for _ in range(2))
        self._announcing, self._told = zeros(1), 0
        # What a step has sampled, in memory that is the same for every graph.
        places = rows * MAX_STEP_TOKENS
        self._sampled = zeros(places + 1)
        self._logprobs = zeros(places, dtype=torch.float32)
        self._top_tokens = zeros(places, MAX_TOP_LOGPROBS)
        self._top_logprobs = zeros(places, MAX_TOP_LOGPROBS, dtype=torch.float32)
        # Of the rows, as far as their random numbers and parameters are on the device, and the kinds of these.
        self._sequences: list[SequenceState] = []
        self._n_pages: list[int] = []  # of each row, as far as they are on the device
        self._is_replayed = False  # whether the last step was captured, and has left the next one's tokens here
        self._kinds: frozenset[str] = frozenset()
        self._key: tuple[int, int, frozenset[str], Scores] = (0, 0, self._kinds, Scores())  # of the last graph

    def launch(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        assert not self._in_flight, "a step in flight is followed by launch_next"
        longest = max(len(chunk.tokens) for chunk in chunks)
        stop = max(chunk.start for chunk in chunks) + longest
        self._is_replayed = (
            longest <= (1 if self._is_dynamic else MAX_STEP_TOKENS)
            and stop <= self._table.shape[1] * PAGE_SIZE
            and not any(map(is_computed_at_once, chunks))
        )
        if not self._is_replayed:
            super().launch(chunks, announced)
            return
        bsz, width = len(chunks), self._table.shape[1]
        # A power of two, so that there are few graphs, unless a text may not be as long.
        seqlen = 1 << (longest - 1).bit_length()
        if max(chunk.start for chunk in chunks) + seqlen > width * PAGE_SIZE:
            seqlen = longest
        rows = self._rows(bsz)
        idle = rows - bsz
        padded = [[*chunk.tokens, *[0] * (seqlen - len(chunk.tokens))] for chunk in chunks] + [[0] * seqlen] * idle
        self._tokens[:rows, :seqlen] = self._upload(padded)
        self._start_pos[:rows] = self._upload([*(chunk.start for chunk in chunks), *[0] * idle])
        self._running[:rows] = self._upload([1] * bsz + [0] * idle)
        self._tell(announced)
        params = [chunk.sequence.params for chunk in chunks] + [chunks[0].sequence.params] * idle
        self._upload_sequences(chunks, params)
        self._table[bsz:rows] = 0  # the page of nobody
        self._upload_tables(chunks)
        self._key = rows, seqlen, self._kinds, Scores.of(params)
        self._replay(chunks, seqlen)

    def launch_next(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        if not self._is_replayed:
            super().launch_next(chunks, announced)
            return
        if announced != self._told:
            self._tell(announced)
        if [len(chunk.sequence.pages) for chunk in chunks] != self._n_pages:
            self._upload_tables(chunks)
        self._key = (self._key[0], 1, *self._key[2:])
        self._replay(chunks, 1)

    def wait(self) -> StepOutput:
        if self._outputs:
            return super().wait()
        sampled, event, chunks, seqlen = self._in_flight.popleft()
        if event is not None:
            collective(event.synchronize)  # on several ranks

        # What was sampled after the last tokens of each chunk, of `seqlen` places, some of which only pad it.
        ends = [i * seqlen + len(chunk.tokens) for i, chunk in enumerate(chunks)]
        spans = [slice(end - chunk.n_sampled, end) for chunk, end in zip(chunks, ends, strict=True)]
        return host_output(sampled, spans)

    def reset(self) -> None:
        super().reset()
        self._in_flight.clear()
        self._sequences, self._is_replayed = [], False

    def _rows(self, bsz: int) -> int:
        """Return the number of rows of the graph for bsz rows; those beyond bsz have no sequence."""
        rows = 1 << (bsz - 1).bit_length() if bsz <= ROWS_MULTIPLE else -(-bsz // ROWS_MULTIPLE) * ROWS_MULTIPLE
        return min(rows, len(self._running))

    def _upload_sequences(self, chunks: Sequence[Chunk], params: Sequence[SamplingParams]) -> None:
        """Have the sampling parameters and the random numbers of each row on the device."""
        sequences = [chunk.sequence for chunk in chunks]
        if sequences == self._sequences:
            return
        for row, sequence in enumerate(sequences):
            if row >= len(self._sequences) or self._sequences[row] is not sequence:
                first = len(sequence.prompt) - 1
                numbers = self._pinned(sequence.uniforms)
                self._uniforms[row, first : first + len(numbers)] = numbers
        given = SamplingTensors.of(params, "cpu")
        self._temperature[: len(params)] = self._pinned(given.temperature)
        self._top_p[: len(params)] = self._pinned(given.top_p)
        self._sequences, self._kinds = sequences, given.kinds

    def _upload_tables(self, chunks: Sequence[Chunk]) -> None:
        """Have the pages of each row on the device."""
        self._table[: len(chunks)] = self._pinned(torch.stack([chunk.sequence.table for chunk in chunks]))
        self._n_pages = [len(chunk.sequence.pages) for chunk in chunks]

    def _tell(self, announced: int) -> None:
        """Have what the first rank announces on the device."""
        self._announcing.copy_(self._upload([announced]))
        self._told = announced

    def _replay(self, chunks: Sequence[Chunk], seqlen: int) -> None:
        """Launch the graph of a step; capture it first if there is none yet."""
        rows, _, kinds, scores = self._key
        if self._key not in self._graphs:
            start = time.perf_counter()
            state = self._tokens.clone(), self._start_pos.clone()
            self._graphs[self._key] = self._capture(lambda: self._step(rows, seqlen, kinds, scores))
            self._tokens.copy_(state[0])
            self._start_pos.copy_(state[1])
            seconds = time.perf_counter() - start
            if seconds > SLOW_CAPTURE:
                log.info("compiled and captured a step in %.1f s; Triton caches compiled kernels", seconds)
        n, top = rows * seqlen, min(scores.top, self.model.args.vocab_size)
        outputs = SampledTokens(
            self._sampled[: n + 1],
            self._logprobs[:n] if scores.logprobs else None,
            self._top_tokens[:n, :top] if top else None,
            self._top_logprobs[:n, :top] if top else None,
        )
        with torch.cuda.device_of(self._announcing):
            self._graphs[self._key]()
            self._in_flight.append((*_download(outputs), chunks, seqlen))

    def _step(self, rows: int, seqlen: int, kinds: frozenset[str], scores: Scores) -> None:
        """Run what a graph captures: compute, sample, and store tokens and positions for a next step of one token."""
        tokens, start_pos = self._tokens[:rows, :seqlen], self._start_pos[:rows]
        batch = ForwardBatch.of_steps(self.cache, start_pos, seqlen, self._table[:rows])
        hidden = self.model.hidden(tokens.flatten(), batch)
        positions = batch.positions.view(rows, seqlen).clamp(max=self._uniforms.shape[1] - 1)
        uniform = self._uniforms[:rows].gather(1, positions)
        temperature, top_p = (each[:rows].repeat_interleave(seqlen) for each in (self._temperature, self._top_p))
        params = SamplingTensors(temperature, top_p, kinds)
        sampled = self._sampler(hidden, uniform.flatten(), params, self._announcing, scores)
        self._sampled[: len(sampled.tokens)] = sampled.tokens
        if sampled.logprobs is not None:
            self._logprobs[: rows * seqlen] = sampled.logprobs
        if sampled.top_tokens is not None and sampled.top_logprobs is not None:
            top = sampled.top_tokens.shape[1]
            self._top_tokens[: rows * seqlen, :top] = sampled.top_tokens
            self._top_logprobs[: rows * seqlen, :top] = sampled.top_logprobs
        self._tokens[:rows, 0] = sampled.tokens[:-1].view(rows, seqlen)[:, -1].clamp(min=0)
        self._start_pos[:rows] += seqlen * self._running[:rows]

    def _upload(self, values: Sequence[object], dtype: torch.dtype = torch.long) -> Tensor:
        """Copy numbers to the device, without waiting for it."""
        return self._pinned(torch.tensor(values, dtype=dtype, device="cpu"))

    def _pinned(self, values: Tensor) -> Tensor:
        """Copy a tensor of the host to the device, without waiting for it."""
        device = self._announcing.device
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def is_computed_at_once(chunk: Chunk) -> bool:
    """Tell whether a chunk is part of a prompt, of which there is no graph."""
    return chunk.n_sampled == 0 or chunk.sequence.in_prompt


def _download(sampled: SampledTokens) -> tuple[SampledTokens, torch.cuda.Event | None]:
    """Copy tensors to the host, where they are complete after the event, or at once if the event is None."""
    if sampled.tokens.device.type != "cuda":
        return sampled.map(torch.clone), None

    def copy(values: Tensor) -> Tensor:
        pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        return pinned.copy_(values, non_blocking=True)

    copies, event = sampled.map(copy), torch.cuda.Event()
    event.record()
    return copies, event
