"""Decode steps captured once as CUDA graphs and replayed: the host launches a whole step at once, and one ahead.

A graph runs on fixed memory: the cache, and buffers here with each row's newest tokens, its position and its
random numbers. A step updates them for the next one, so that steps can follow each other without the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.backends.base import Capture
from llama.cache import PAGE_SIZE, ForwardBatch, KVCache
from llama.distributed.job import collective
from llama.engine.logit_changes import LogitChanges
from llama.engine.runner import EagerRunner, host_output
from llama.engine.sequence import Chunk
from llama.engine.sequence import Sequence as SequenceState
from llama.engine.step_data import SampledTokens, Scores, StepOutput, StepParams
from llama.model import Transformer
from llama.sampling import MAX_TOP_LOGPROBS, FilterTensors, SamplingParams, SamplingTensors

log = logging.getLogger("llama")

# Most tokens of a row in a step.
MAX_STEP_TOKENS = 8

# Graphs are captured for numbers of rows that are powers of two up to this one, and multiples of it beyond: see D37.
ROWS_MULTIPLE = 8

# Seconds from which on a capture is logged; with kernels that are compiled already it takes far less.
SLOW_CAPTURE = 1.0


# The fields of filters that are a number of each row.
FILTER_NUMBERS = ("top_k", "top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold")

# Of filters: to look at a few of the greatest logits alone, the host would wait for whether they are enough.
ANY_WIDTH = 0


@dataclass(frozen=True)
class StepKinds:
    """What a graph is captured for: kinds of draws and of filters, and scores."""

    draws: frozenset[str]
    filters: frozenset[str] | None
    scores: Scores

    @staticmethod
    def of(params: StepParams) -> StepKinds:
        """Return the kinds of the rows of a step."""
        filters = None if params.filters is None else params.filters.kinds
        return StepKinds(params.tensors.kinds, filters, params.scores)


class CudaGraphRunner(EagerRunner):
    """Replays a graph for each number of rows, number of tokens a row, and kind of sampling (see D37); see `Runner`.

    A step with tokens of prompts is not captured: it is computed at once, as by the base class.
    """

    runs_ahead = True

    def __init__(
        self, model: Transformer, cache: KVCache, capture: Capture, rows: int, width: int, is_draft: bool = False
    ) -> None:
        """Bind the runner to a cache as it is; rows, width: the most sequences of a step, and pages of one."""
        super().__init__(model, cache, is_draft)
        self._capture = capture
        self._graphs: dict[object, Callable[[], None]] = {}
        self._states: dict[object, Tensor] = {}  # final states, where a graph does not sample
        self._in_flight: deque[tuple[SampledTokens, torch.cuda.Event | None, Sequence[Chunk], int]] = deque()
        device = model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._tokens = zeros(rows, MAX_STEP_TOKENS)
        self._start_pos = zeros(rows)
        self._running = zeros(rows)  # 1, or 0 for rows that only pad a graph
        self._table = zeros(rows, width, dtype=torch.int32)
        self._uniforms = zeros(rows, width * PAGE_SIZE, dtype=torch.float32)  # of the token after each position
        self._xtc_uniforms: Tensor | None = None  # the same of XTC, from the first request on that asks for it
        self._temperature, self._top_p = (zeros(rows, dtype=torch.float32) for _ in range(2))
        self._filters = {field: zeros(rows, dtype=torch.float32) for field in FILTER_NUMBERS}
        self._is_filtered = zeros(rows, dtype=torch.bool)
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
        self._kinds = StepKinds(frozenset(), None, Scores())
        self._key = (0, 0, self._kinds)  # of the last step: its rows, and the tokens of each

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
        self._key = rows, seqlen, self._kinds
        self._is_controlled = self._has_controls(chunks)
        self._replay(chunks, seqlen)

    def launch_next(self, chunks: Sequence[Chunk], announced: int = 0) -> None:
        if not self._is_replayed:
            super().launch_next(chunks, announced)
            return
        if announced != self._told:
            self._tell(announced)
        if [len(chunk.sequence.pages) for chunk in chunks] != self._n_pages:
            self._upload_tables(chunks)
        self._key = self._key[0], 1, self._kinds
        self._replay(chunks, 1)

    def wait(self) -> StepOutput:
        if self._outputs:
            return super().wait()
        sampled, event, chunks, seqlen = self._in_flight.popleft()
        if event is not None:
            collective(event.synchronize)  # on several ranks

        return host_output(sampled, [slice(end - chunk.n_sampled, end) for chunk, end in _ends(chunks, seqlen)])

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
                if sequence.params.xtc_probability > 0:
                    numbers = self._pinned(sequence.xtc_uniforms)
                    if self._xtc_uniforms is None:
                        self._xtc_uniforms = torch.zeros_like(self._uniforms)
                    self._xtc_uniforms[row, first : first + len(numbers)] = numbers
        n, given = len(params), StepParams.of(params, torch.device("cpu"))
        self._temperature[:n] = self._pinned(given.tensors.temperature)
        self._top_p[:n] = self._pinned(given.tensors.top_p)
        if given.filters is not None:
            for field, values in self._filters.items():
                values[:n] = self._pinned(getattr(given.filters, field))
            self._is_filtered[:n] = self._pinned(given.filters.is_filtered)
        self._sequences, self._kinds = sequences, StepKinds.of(given)

    def _upload_tables(self, chunks: Sequence[Chunk]) -> None:
        """Have the pages of each row on the device."""
        self._table[: len(chunks)] = self._pinned(torch.stack([chunk.sequence.table for chunk in chunks]))
        self._n_pages = [len(chunk.sequence.pages) for chunk in chunks]

    def _tell(self, announced: int) -> None:
        """Have what the first rank announces on the device."""
        self._announcing.copy_(self._upload([announced]))
        self._told = announced

    def _replay(self, chunks: Sequence[Chunk], seqlen: int) -> None:
        """Launch the graph of a step; capture it first if there is none yet.

        Where requests have controls, the graph only computes final states, and what follows them is sampled after it.
        """
        rows, scores = self._key[0], self._kinds.scores
        graph: object = (rows, seqlen) if self._is_controlled else self._key
        changes = None
        if self._is_controlled and self._changes is not None:
            changes = self._changes.begin(chunks, [end - c.n_sampled for c, end in _ends(chunks, seqlen)])
        if graph not in self._graphs:
            self._graphs[graph] = self._captured(graph, seqlen)
        n, top = rows * seqlen, min(scores.top, self.model.args.vocab_size)
        outputs = SampledTokens(
            self._sampled[: n + 1],
            self._logprobs[:n] if scores.logprobs else None,
            self._top_tokens[:n, :top] if top else None,
            self._top_logprobs[:n, :top] if top else None,
        )
        with torch.cuda.device_of(self._announcing):
            self._graphs[graph]()
            if self._is_controlled:
                self._sample_rows(self._states[graph], seqlen, changes() if changes is not None else None)
            self._in_flight.append((*_download(outputs), chunks, seqlen))

    def _captured(self, graph: object, seqlen: int) -> Callable[[], None]:
        """Capture a step of the rows and the kind that the key says, and leave tokens and positions as they were."""
        rows, start = self._key[0], time.perf_counter()
        state = self._tokens.clone(), self._start_pos.clone()

        def step() -> None:
            hidden = self._compute_rows(rows, seqlen)
            if self._is_controlled:
                self._states[graph] = hidden
            else:
                self._sample_rows(hidden, seqlen)

        captured = self._capture(step)
        self._tokens.copy_(state[0])
        self._start_pos.copy_(state[1])
        seconds = time.perf_counter() - start
        if seconds > SLOW_CAPTURE:
            log.info("compiled and captured a step in %.1f s; Triton caches compiled kernels", seconds)
        return captured

    def _compute_rows(self, rows: int, seqlen: int) -> Tensor:
        """Return the final states of a step's tokens, (rows * seqlen, dim)."""
        tokens, start_pos = self._tokens[:rows, :seqlen], self._start_pos[:rows]
        batch = ForwardBatch.of_steps(self.cache, start_pos, seqlen, self._table[:rows])
        return self.model.hidden(tokens.flatten(), batch)

    def _sample_rows(self, hidden: Tensor, seqlen: int, changes: LogitChanges | None = None) -> None:
        """Sample after final states, and store tokens and positions for a next step of one token."""
        rows, _, kinds = self._key
        start_pos = self._start_pos[:rows]
        positions = start_pos[:, None] + torch.arange(seqlen, device=start_pos.device)
        positions = positions.clamp(max=self._uniforms.shape[1] - 1)
        uniform, xtc_uniform = self._uniforms[:rows].gather(1, positions).flatten(), None

        def of_places(values: Tensor) -> Tensor:
            return values[:rows].repeat_interleave(seqlen)

        filters = None
        if kinds.filters is not None:
            numbers = {field: of_places(values) for field, values in self._filters.items()}
            filters = FilterTensors(
                **numbers, is_filtered=of_places(self._is_filtered), kinds=kinds.filters, width=ANY_WIDTH
            )
            if "xtc" in kinds.filters:
                assert self._xtc_uniforms is not None, "they come with a request's parameters"
                xtc_uniform = self._xtc_uniforms[:rows].gather(1, positions).flatten()
        tensors = SamplingTensors(of_places(self._temperature), of_places(self._top_p), kinds.draws)
        params = StepParams(tensors, filters, kinds.scores, xtc_uniform is not None)
        sampled = self._sampler(hidden, (uniform, xtc_uniform), params, self._announcing, changes)
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


def _ends(chunks: Sequence[Chunk], seqlen: int) -> list[tuple[Chunk, int]]:
    """Return each chunk with the place after its last token in a step of `seqlen` places a row, some only padding."""
    return [(chunk, i * seqlen + len(chunk.tokens)) for i, chunk in enumerate(chunks)]


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
