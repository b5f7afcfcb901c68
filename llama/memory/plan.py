"""What a run takes of each rank's memory: arithmetic on headers, before any weight is read.

All figures are bytes of one rank. Whoever asks says which rank of how many it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from llama.backends.base import Backend, backend_of
from llama.checkpoint.base import Reading, StoredCheckpoint, shard_dim
from llama.checkpoint.load import WeightFormat, check_weights, part_length, part_span
from llama.checkpoint.names import module_name
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.job import agree, local_world_size
from llama.memory.available import free_bytes, readable
from llama.memory.estimate import BatchShape, activation_bytes, cache_bytes
from llama.model import Transformer
from llama.quantization.gguf_blocks import BlockType


@dataclass(frozen=True)
class Weights:
    total: int
    mapped: int  # of them, used where they lie in a mapped file: pages that the system may drop and read again
    tensor: int  # most that the host holds beside them while loading
    loading: int  # most on the device while loading


@dataclass(frozen=True)
class Plan:
    """What a batch takes of a rank that has `free` bytes."""

    weights: Weights
    cache: int
    activations: int
    free: int

    @property
    def needed(self) -> int:
        return max(self.weights.loading, self.weights.total + self.cache + self.activations)

    @property
    def fits(self) -> bool:
        """Whether all is in memory at once, mapped weights too: each token reads them."""
        return self.needed <= self.free

    @property
    def can_run(self) -> bool:
        """Whether it runs at all, with mapped weights read again and again."""
        return self.needed - self.weights.mapped <= self.free


@dataclass(frozen=True)
class Planner:
    """Plans batches of one rank that has `free` bytes. max_seq_len and max_batch_size of args are the limits."""

    checkpoint: StoredCheckpoint
    args: ModelArgs
    parallel: ModelParallel
    weight_format: WeightFormat
    backend: Backend
    free: int

    def plan(self, shape: BatchShape) -> Plan:
        cache = cache_bytes(self.args, self.parallel, self.dtype, shape)
        activations = activation_bytes(self.args, self.parallel, self.dtype, self.backend, shape)
        return Plan(self.weights, cache, activations, self.free)

    def limits(self, bsz: int | None = None, length: int | None = None) -> BatchShape:
        length = length or self.args.max_seq_len
        return BatchShape(bsz or self.args.max_batch_size, length, length)

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_format.dtype

    @cached_property
    def weights(self) -> Weights:
        """This rank's parameters, and what loading them holds on the way (see `load_weights`)."""
        with torch.device("meta"):
            model = Transformer(self.args, self.parallel)
        on_cpu = self.device.type == "cpu"
        total = mapped = tensor = loading = 0
        for name, shape in check_weights(self.checkpoint, self.args).items():
            parameter = model.get_parameter(name)
            block_type = self.weight_format.block_type(self.checkpoint, name, self.parallel)
            if block_type is not None:
                part, on_the_way = self._blocks(name, parameter.shape, block_type)
                is_mapped = False
            else:
                part = parameter.numel() * self.dtype.itemsize
                on_the_way, is_mapped = self._floats(name, shape, parameter.numel())
            total += part
            if on_cpu:
                mapped += part if is_mapped else 0
            if on_cpu or block_type is not None:  # a GPU takes blocks apart itself
                loading = max(loading, total + on_the_way)
            tensor = max(tensor, on_the_way if on_cpu else on_the_way + part)
        return Weights(total, mapped, tensor, max(loading, total))

    def _blocks(self, name: str, shape: torch.Size, block_type: BlockType) -> tuple[int, int]:
        """Bytes of a part held in blocks, and what making it takes on the way."""
        rows, columns = shape
        raw = rows * columns // block_type.elements * block_type.size
        held = self.weight_format.weight_cls.bytes_of(block_type, rows, columns)
        if self.checkpoint.block_type(name) == block_type:
            return held, raw
        read, _ = self._floats(name, self.checkpoint.shape(name), rows * columns)
        return held, raw + max(read, 4 * rows * columns)  # values are quantized from fp32

    def _floats(self, name: str, shape: tuple[int, ...], numel: int) -> tuple[int, bool]:
        """What reading a part as floats takes on the way, and whether it is used where it lies in a mapped file."""
        read_dtype, reading = self._reads_as(name, shape)
        on_the_way = 0
        if reading == "copy" and shard_dim(name) == 1 and self.parallel.size > 1:  # blocks of whole rows
            on_the_way = torch.Size(shape).numel() * read_dtype.itemsize
        elif reading == "copy" and read_dtype != self.dtype:
            on_the_way = numel * read_dtype.itemsize
        return on_the_way, reading == "zero_copy" and read_dtype == self.dtype

    def _reads_as(self, name: str, shape: tuple[int, ...]) -> tuple[torch.dtype, Reading]:
        """What this rank reads of a tensor (see `read_part`)."""
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
        """What would fit within other limits, or on more ranks with as much memory each; a part of a sentence."""
        args = self.args
        length = largest(lambda n: self.plan(self.limits(length=n)).fits, args.max_seq_len)
        bsz = largest(lambda n: self.plan(self.limits(bsz=n)).fits, args.max_batch_size)
        ways = [f"--max_seq_len {length}"] * (length > 0) + [f"--max_batch_size {bsz}"] * (bsz > 0)
        return " or ".join(ways + self.more_ranks(lambda planner: planner.plan(planner.limits()).fits))

    def more_ranks(self, fits: Callable[[Planner], bool]) -> list[str]:
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
        """ValueError when not even one token can be run. Larger batches are checked when they come: `check_room`."""
        one = BatchShape(1, 1, 1)
        plan = self.plan(one)
        if not plan.can_run:
            ways = self.more_ranks(lambda planner: planner.plan(one).can_run)
            raise ValueError(
                f"the model needs {readable(plan.needed - plan.weights.mapped)} of {self.device.type} memory per rank, "
                f"{readable(self.free)} are free: use {' or '.join(ways) or 'a smaller model'}"
            )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number below `limit` that fits, 0 when none does; whatever is larger than a misfit is one."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(planner: Planner, shapes: dict[str, BatchShape]) -> str:
    """Lay the plans of batches side by side, by their headings, and under it what the figures do not say."""
    plans = [planner.plan(shape) for shape in shapes.values()]
    weights, size = planner.weights, planner.parallel.size
    rows = [
        ["per rank", *shapes],
        ["prompts x tokens", *(f"{shape.bsz} x {shape.length}" for shape in shapes.values())],
        ["weights", *(readable(weights.total) for _ in plans)],
        ["KV cache", *(readable(plan.cache) for plan in plans)],
        ["peak activations", *(readable(plan.activations) for plan in plans)],
        ["needed", *(readable(plan.needed) for plan in plans)],
        ["free", *(readable(plan.free) for plan in plans)],
        ["fits", *("yes" if plan.fits else "no" for plan in plans)],
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
        lines.append(f"Would fit: {planner.advice() or 'nothing; use a smaller model or dtype'}.")
    return "\n".join(lines)


def check_room(model: Transformer, shape: BatchShape, in_use: int = 0, draft: Transformer | None = None) -> None:
    """ValueError, on every rank if on one, where a loaded model, and a draft model too, have no room for a batch.

    in_use: bytes of caches that are there already and serve the batch.
    """
    models = [model] if draft is None else [model, draft]

    def caches(shape: BatchShape) -> int:
        return sum(cache_bytes(each.args, each.parallel, each.dtype, shape) for each in models)

    def needed(shape: BatchShape) -> int:  # the larger model's activations
        return caches(shape) + activation_bytes(model.args, model.parallel, model.dtype, backend_of(model), shape)

    with agree():
        free = free_bytes(model.device, local_world_size()) + in_use
        if needed(shape) > free:
            bsz = largest(lambda n: needed(dataclasses.replace(shape, bsz=n)) <= free, shape.bsz)
            raise ValueError(
                f"{shape.bsz} prompts of up to {shape.prompt_len} tokens, {shape.length} with what follows, need "
                f"{readable(caches(shape))} of cache and {readable(needed(shape))} in all per rank, "
                f"{readable(free)} are free: use " + (f"--max_batch_size {bsz}" if bsz else "a smaller --max_seq_len")
            )
