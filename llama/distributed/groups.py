"""Model parallelism: which part of a tensor belongs to which rank, and the collectives over activations.

fairscale holds the process groups; their backend suits the device. Knows nothing of the model's architecture.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama.distributed.job import NO_TIMEOUT, TIMEOUT, collective

# Gathers all parts into one tensor, which a CUDA graph can hold. The name up to torch 2.12 warns in later versions.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class ModelParallel:
    """This rank among the ranks that share one model; by default it is alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ffn_multiple: int = 1  # hidden features are split in multiples of this: whole quantized blocks, see D33

    def span(self, total: int, multiple: int = 1) -> tuple[int, int]:
        """Return this rank's [start, stop) of `total` rows; those of the last ranks may be short or empty."""
        part = self.part(total, multiple)
        return min(self.rank * part, total), min((self.rank + 1) * part, total)

    def part(self, total: int, multiple: int = 1) -> int:
        """Return the rows per rank when `total` are split evenly, in multiples of `multiple`, the last part padded."""
        return total if self.size == 1 else -(-total // (self.size * multiple)) * multiple

    def heads(self, n_heads: int) -> int:
        """Return the query heads per rank; raise ValueError where ranks do not divide them, as heads are not padded."""
        if n_heads % self.size:
            sizes = ", ".join(str(size) for size in range(1, n_heads + 1) if n_heads % size == 0)
            raise ValueError(f"{n_heads} heads cannot be split over {self.size} ranks: use one of {sizes}")
        return n_heads // self.size

    def kv_heads(self, n_heads: int, n_kv_heads: int) -> list[int]:
        """Return the KV head of each of this rank's KV slots, which all serve the same number of its query heads.

        A KV head repeats where ranks outnumber KV heads, and where a rank's query heads start inside a group (see D3).
        """
        local, group = self.heads(n_heads), n_heads // n_kv_heads
        per_slot = math.gcd(local, group)
        first = self.rank * local
        return [head // group for head in range(first, first + local, per_slot)]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks; x itself may be overwritten."""
        if self.size > 1:
            staged = self._stage(x)
            collective(dist.all_reduce, staged, group=self.group)
            x = staged.to(x.device)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's x (n, ..., size), joined along the last dimension in rank order."""
        if self.size > 1:
            staged = self._stage(x.contiguous())
            parts = staged.new_empty(self.size * staged.shape[0], *staged.shape[1:])
            collective(_gather, parts, staged, group=self.group)
            x = parts.unflatten(0, (self.size, -1)).movedim(0, -2).flatten(-2).to(x.device)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the first rank's x; x itself may be overwritten."""
        if self.size > 1:
            staged = self._stage(x)
            collective(dist.broadcast, staged, group_src=0, group=self.group)
            x = staged.to(x.device)
        return x

    def least(self, value: int) -> int:
        """Return the least of all ranks' values."""
        if self.size > 1:
            values = [value] * self.size
            collective(dist.all_gather_object, values, value, group=self.group)
            value = min(values)
        return value

    def share(self, value: Any) -> Any:
        """Return the first rank's value, a small object."""
        if self.size > 1:
            values = [value]
            collective(dist.broadcast_object_list, values, group_src=0, group=self.group)
            value = values[0]
        return value

    def _stage(self, x: Tensor) -> Tensor:
        """Return x in memory that the group's backend can read: gloo cannot read an MPS device's."""
        return x.cpu() if x.device.type == "mps" else x


def join_model_parallel(size: int | None, device: torch.device, timeout: float = TIMEOUT) -> ModelParallel:
    """Split the job into model-parallel groups of `size` consecutive ranks; None means all ranks.

    The backend is NCCL on CUDA devices, gloo otherwise. Raise ValueError where `size` does not divide the number of
    ranks. A later call with another size regroups the ranks; models built before keep their groups.
    """
    from fairscale.nn.model_parallel import initialize

    world_size = dist.get_world_size()
    size = world_size if size is None else size
    if type(size) is not int or size < 1 or world_size % size:
        raise ValueError(f"model_parallel_size must divide the {world_size} ranks of this job, got {size!r}")
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if not _are_grouped(size, backend):
        initialize.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines that help nobody
            collective(
                initialize.initialize_model_parallel,
                size,
                model_parallel_backend=backend,
                pipeline_backend=backend,
                ddp_backend=backend,
            )
    # NCCL watches itself. gloo, which by itself gives a slow rank 30 minutes, is watched by the job.
    limit = timedelta(seconds=timeout) if backend == "nccl" else NO_TIMEOUT
    dist.distributed_c10d._set_pg_timeout(limit, initialize.get_model_parallel_group())
    return ModelParallel(
        rank=initialize.get_model_parallel_rank(),
        size=initialize.get_model_parallel_world_size(),
        group=initialize.get_model_parallel_group(),
    )


def _are_grouped(size: int, backend: str) -> bool:
    """Tell whether fairscale already has groups of this size and backend, in a job that still runs."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized():
        return False
    try:
        group = initialize.get_model_parallel_group()
        return dist.get_world_size(group) == size and dist.get_backend(group) == backend
    except (ValueError, RuntimeError):  # the groups are those of a job that has ended
        return False
