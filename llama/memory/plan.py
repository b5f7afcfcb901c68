"""The plan of a run's memory on each rank, computed from the headers of files before any weight is read.

All figures are bytes of one rank; the caller says which rank of how many it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from llama.backends.base import Backend, backend_of
from llama.cache import PAGE_SIZE, pages_for
from llama.checkpoint.base import Reading, StoredCheckpoint, shard_dim
from llama.checkpoint.load import WeightFormat, check_weights, part_length, part_span
from llama.checkpoint.lora import AdaptedCheckpoint
from llama.checkpoint.names import module_name
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.job import local_world_size
from llama.memory.available import free_bytes, readable
from llama.memory.estimate import BatchShape, activation_bytes, cache_bytes
from llama.model import Transformer
from llama.quantization.gguf_blocks import BlockType


@dataclass(frozen=True)
class Weights:
    """Bytes of a rank's weights, and of loading them."""

    total: int
    mapped: int  # of the total, used inside a mapped file: pages that the system may drop and read again
    tensor: int  # most host memory beside the weights while loading
    loading: int  # most device memory while loading


@dataclass(frozen=True)
class Plan:
    """The memory that a batch needs on a rank with `free` bytes."""

    weights: Weights
    cache: int
    activations: int
    free: int

    @property
    def needed(self) -> int:
        """The peak, while weights are loaded or while the batch runs."""
        return max(self.weights.loading, self.weights.total + self.cache + self.activations)

    @property
    def fits(self) -> bool:
        """Whether everything is in memory at once, mapped weights included: each token reads them."""
        return self.needed <= self.free

    @property
    def can_run(self) -> bool:
        """Whether the batch runs at all, if only by reading mapped weights again for each token."""
        return self.needed - self.weights.mapped <= self.free


@dataclass(frozen=True)
class Planner:
    """Plans batches on one rank with `free` bytes, within the max_seq_len and max_batch_size of args."""

    checkpoint: StoredCheckpoint
    args: ModelArgs
    parallel: ModelParallel
    weight_format: WeightFormat
    backend: Backend
    free: int

    def plan(self, shape: BatchShape) -> Plan:
        """Plan one batch."""
        cache = cache_bytes(self.args, self.parallel, self.dtype, shape)
        activations = activation_bytes(self.args, self.parallel, self.dtype, self.backend, shape)
        return Plan(self.weights, cache, activations, self.free)

    def at_once(self, shape: BatchShape) -> int:
        """Return how many of a batch's requests have room at once; the others wait until one of these ends."""
        return largest(lambda n: self.plan(dataclasses.replace(shape, bsz=n)).fits, shape.bsz + 1)

    def limits(self, bsz: int | None = None, length: int | None = None) -> BatchShape:
        """Return the largest batch within the limits, or within others that are given."""
        length = length or self.args.max_seq_len
        return BatchShape(bsz or self.args.max_batch_size, length, length)

    def longest(self) -> int:
        """Return up to how many tokens a text of one request may have, at most max_seq_len; 0 where nothing can run.

        All is in memory at once or, where it never is, mapped weights are read again.
        """
        limit = self.args.max_seq_len + 1
        fitting = largest(lambda n: self.plan(self.limits(1, n)).fits, limit)
        return fitting or largest(lambda n: self.plan(self.limits(1, n)).can_run, limit)

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_format.dtype

    @cached_property
    def weights(self) -> Weights:
        """Bytes of this rank's weights, and of loading them (see `load_weights`)."""
        with torch.device("meta"):
            model = Transformer(self.args, self.parallel)
        on_cpu = self.device.type == "cpu"
        total = mapped = tensor = loading = 0
        for name, shape in check_weights(self.checkpoint, self.args).items():
            parameter = model.get_parameter(name)
            block_type = self.weight_format.block_type(self.checkpoint, name, self.parallel)
            if block_type is not None:
                part, on_the_way = self._blocks(name, parameter.shape, block_type)
                if isinstance(self.checkpoint, AdaptedCheckpoint):
                    rank = self.checkpoint.rank_beside(name, block_type)
                    part += rank * sum(parameter.shape) * self.dtype.itemsize
                is_mapped = False
            else:
                part = parameter.numel() * self.dtype.itemsize
                on_the_way, is_mapped = self._floats(name, shape, parameter.numel())
            total += part
            if on_cpu:
                mapped += part if is_mapped else 0
            if on_cpu or block_type is not None:  # a GPU takes quantized blocks apart itself
                loading = max(loading, total + on_the_way)
            tensor = max(tensor, on_the_way if on_cpu else on_the_way + part)
        return Weights(total, mapped, tensor, max(loading, total))

    def _blocks(self, name: str, shape: torch.Size, block_type: BlockType) -> tuple[int, int]:
        """Return the bytes of a quantized part, and the temporary bytes of making it."""
        rows, columns = shape
        raw = rows * columns // block_type.elements * block_type.size
        n_bytes = self.weight_format.weight_cls.bytes_of(block_type, rows, columns)
        if self.checkpoint.block_type(name) == block_type:
            return n_bytes, raw
        read, _ = self._floats(name, self.checkpoint.shape(name), rows * columns)
        return n_bytes, raw + max(read, 4 * rows * columns)  # values are quantized from fp32

    def _floats(self, name: str, shape: tuple[int, ...], numel: int) -> tuple[int, bool]:
        """Return the temporary bytes of reading a part as floats, and whether it is used inside a mapped file."""
        read_dtype, reading = self._reads_as(name, shape)
        on_the_way = 0
        if reading == "copy" and shard_dim(name) == 1 and self.parallel.size > 1:  # whole rows are read
            on_the_way = torch.Size(shape).numel() * read_dtype.itemsize
        elif reading == "copy" and read_dtype != self.dtype:
            on_the_way = numel * read_dtype.itemsize
        return on_the_way, reading == "zero_copy" and read_dtype == self.dtype

    def _reads_as(self, name: str, shape: tuple[int, ...]) -> tuple[torch.dtype, Reading]:
        """Return the dtype of what this rank reads of a tensor, and how it is read (see `read_part`)."""
        dim, parallel = shard_dim(name), self.parallel
        if dim is None or parallel.size == 1:
            return self.checkpoint.reads_as(name)
        start, stop = part_span(name, shape[dim], parallel)
        whole = stop - start == part_length(name, shape[dim], parallel)  # not padded
        if module_name(name) in ("wk", "wv"):
            heads, head_dim = parallel.kv_heads(self.args.n_heads, self.args.n_kv_heads), self.args.head_dim
            start, stop, whole = heads[0] * head_dim, (heads[-1] + 1) * head_dim, len(heads) == 1 + heads[-1] - heads[0]
        dtype, reading = self.checkpoint.reads_as(name, dim, start, stop)
        return dtype, reading if whole else "copy"

    def advice(self) -> str:
        """Say, as a part of a sentence, which lower limits or how many ranks with as much memory would fit."""
        args = self.args
        length = largest(lambda n: self.plan(self.limits(length=n)).fits, args.max_seq_len)
        bsz = largest(lambda n: self.plan(self.limits(bsz=n)).fits, args.max_batch_size)
        ways = [f"--max_seq_len {length}"] * (length > 0) + [f"--max_batch_size {bsz}"] * (bsz > 0)
        return " or ".join(ways + self.more_ranks(lambda planner: planner.plan(planner.limits()).fits))

    def more_ranks(self, fits: Callable[[Planner], bool]) -> list[str]:
        """Return a phrase with the smallest larger number of ranks that fits; no phrase where none does."""
        n_heads = self.args.n_heads
        for size in range(self.parallel.size + 1, n_heads + 1):
            # The last rank is the one with padding.
            other = dataclasses.replace(
                self, parallel=ModelParallel(size - 1, size, ffn_multiple=self.parallel.ffn_multiple)
            )
            if n_heads % size == 0 and fits(other):
                return [f"{size} ranks with as much memory each"]
        return []

    def check_can_run(self) -> None:
        """Raise ValueError where not even one token can be run; more is checked later, by `page_limit`."""
        one = BatchShape(1, 1, 1)
        plan = self.plan(one)
        if not plan.can_run:
            ways = self.more_ranks(lambda planner: planner.plan(one).can_run)
            raise ValueError(
                f"the model needs {readable(plan.needed - plan.weights.mapped)} of {self.device.type} memory per rank, "
                f"{readable(self.free)} are free: use {' or '.join(ways) or 'a smaller model'}"
            )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number below `limit` that fits, or 0; no number above one that does not fit may fit."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(planner: Planner, shapes: dict[str, BatchShape]) -> str:
    """Format the plans of batches side by side, under their headings, with notes below."""
    plans = [planner.plan(shape) for shape in shapes.values()]
    weights, size = planner.weights, planner.parallel.size
    rows = [
        ["per rank", *shapes],
        ["requests x tokens", *(f"{shape.bsz} x {shape.length}" for shape in shapes.values())],
        ["weights", *(readable(weights.total) for _ in plans)],
        ["KV cache", *(readable(plan.cache) for plan in plans)],
        ["peak activations", *(readable(plan.activations) for plan in plans)],
        ["needed", *(readable(plan.needed) for plan in plans)],
        ["free", *(readable(plan.free) for plan in plans)],
        ["fits", *(_fits(planner.at_once(shape), shape.bsz) for shape in shapes.values())],
    ]
    lines = [
        f"{planner.checkpoint.path}: {size} rank{'s' * (size > 1)}, {str(planner.dtype).removeprefix('torch.')}, "
        f"{planner.device.type}",
        *("".join(f"{cell:<18}" if i == 0 else f"{cell:>20}" for i, cell in enumerate(row)) for row in rows),
        f"Loading holds {readable(weights.tensor)} of host memory beside the weights.",
    ]
    if weights.mapped:
        lines.append(f"{readable(weights.mapped)} of the weights are pages of the file, read again if memory is short.")
    if not plans[-1].fits:
        lines.append(f"Would fit at once: {planner.advice() or 'nothing; use a smaller model or dtype'}.")
    return "\n".join(lines)


def _fits(at_once: int, bsz: int) -> str:
    return "yes" if at_once == bsz else f"{at_once} at once" if at_once else "no"


class NoRoomError(ValueError):
    """There is no memory for the pages of a prompt and of what is to follow it."""


def page_limit(
    model: Transformer,
    shape: BatchShape,
    n_pages: int = 0,
    draft: Transformer | None = None,
    least: int | None = None,
) -> int:
    """Return how many pages a model and its draft model have room for, beside what a batch needs at once.

    The same on every rank. n_pages: those that are in memory already. Raise NoRoomError where not even one of the
    batch's sequences has room, or `least` of its tokens.
    """
    models = [model] if draft is None else [model, draft]
    page = sum(cache_bytes(each.args, each.parallel, each.dtype, BatchShape(1, 1, PAGE_SIZE)) for each in models)
    free = free_bytes(model.device, local_world_size()) + n_pages * page

    def pages(shape: BatchShape) -> int:  # beside the larger model's activations
        activations = activation_bytes(model.args, model.parallel, model.dtype, backend_of(model), shape)
        return model.parallel.least((free - activations) // page)

    limit = pages(shape)
    if limit < pages_for(shape.length) and shape.bsz > 1:
        shape = dataclasses.replace(shape, bsz=1)
        limit = pages(shape)
    if limit < pages_for(shape.length) and least is not None and least < shape.length:
        one = shape

        def shorter(length: int) -> BatchShape:
            return dataclasses.replace(one, length=length)

        shape = shorter(max(least, largest(lambda n: pages(shorter(n)) >= pages_for(n), one.length)))
        limit = pages(shape)
    if limit < pages_for(shape.length):
        raise NoRoomError(
            f"a prompt of {shape.prompt_len} tokens, {shape.length} with what follows, needs "
            f"{readable(pages_for(shape.length) * page)} of cache per rank, there is room for "
            f"{readable(max(0, limit) * page)}: shorten the prompt, or use a smaller --max_gen_len"
        )
    return limit
