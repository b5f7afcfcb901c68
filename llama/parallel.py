"""Where a rank computes and with whom: device, dtype, threads, process groups, and the layers split over ranks.

Every job has a control group (gloo) for errors and words, and model-parallel groups, kept by fairscale, whose backend
suits the device. Knows nothing of the model's architecture or of checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama.linear import Weight, embed, linear
from llama.threads import share_cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# One tensor for all parts: a CUDA graph holds it. Its name until torch 2.12 warns in later ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# A chat may wait for its user over a weekend; a dead rank is torchrun's to notice, not a timeout's.
CONTROL_TIMEOUT = timedelta(days=7)


# --- the job -------------------------------------------------------------------------------------------------------


def local_rank() -> int:
    """This process's number on its host; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the job this host runs; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_job() -> None:
    """Make the control group: torchrun's ranks, or this process alone. One that exists already is used."""
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=CONTROL_TIMEOUT)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    share_cores(local_world_size())


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Make a user's error on any rank an error on every rank, so that none waits for one that gave up.

    Every rank must pass through the same `agree` blocks, and no block may hold a collective operation.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def from_first_rank(value: Any) -> Any:
    """The job's first rank's value, on every rank: a small object, sent through the control group."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in rank order: small objects, sent through the control group."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# --- device and dtype ----------------------------------------------------------------------------------------------


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of this rank: as named, else CUDA, then MPS, then CPU. ValueError when it cannot be had."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cuda, mps or cpu, got {str(name)!r}") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but this machine or torch build has no MPS: use --device cpu")
    if device.type == "cuda":
        return _choose_cuda_device(device)
    if device.type not in ("mps", "cpu"):
        raise ValueError(f"device must be cuda, mps or cpu, got {str(name)!r}")
    return device


def _choose_cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device: use --device cpu")
    ranks, found = local_world_size(), torch.cuda.device_count()
    if ranks > found:
        raise ValueError(f"{ranks} ranks on this host, but {found} CUDA devices: start {found}, or use --device cpu")
    index = local_rank() if ranks > 1 or device.index is None else device.index
    if index >= found:
        raise ValueError(f"device cuda:{index} was asked for, but this host has {found} CUDA devices, from cuda:0")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(name: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in: as named, else the best the device has for weights stored in `stored`."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.bfloat16 if stored == torch.bfloat16 and _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- the ranks that share one model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelParallel:
    """This rank's place among the ranks that hold one model together; the default is a rank alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    block: int = 1  # hidden features of feed-forwards are dealt out in multiples of it: whole quantized blocks

    def span(self, total: int, block: int = 1) -> tuple[int, int]:
        """The [start, stop) of `total` rows that are this rank's; the last ranks' may be short or empty."""
        part = self.part(total, block)
        return min(self.rank * part, total), min((self.rank + 1) * part, total)

    def part(self, total: int, block: int = 1) -> int:
        """Rows per rank when `total` rows are split evenly, in multiples of `block`, the last part padded."""
        return total if self.size == 1 else -(-total // (self.size * block)) * block

    def heads(self, n_heads: int) -> int:
        """Query heads per rank. Heads are never padded, so a size that does not divide them is a ValueError."""
        if n_heads % self.size:
            sizes = ", ".join(str(size) for size in range(1, n_heads + 1) if n_heads % size == 0)
            raise ValueError(f"{n_heads} heads cannot be split over {self.size} ranks: use one of {sizes}")
        return n_heads // self.size

    def kv_heads(self, n_heads: int, n_kv_heads: int) -> list[int]:
        """The KV head of each of this rank's KV slots; every slot serves the same number of its query heads.

        Heads repeat where ranks outnumber them, and where a rank's query heads do not start on a group's edge.
        """
        local, group = self.heads(n_heads), n_heads // n_kv_heads
        per_slot = math.gcd(local, group)
        first = self.rank * local
        return [head // group for head in range(first, first + local, per_slot)]

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; x itself may be overwritten."""
        if self.size > 1:
            staged = self._stage(x)
            dist.all_reduce(staged, group=self.group)
            x = staged.to(x.device)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x (n, ..., size), joined along the last dimension in rank order."""
        if self.size > 1:
            staged = self._stage(x.contiguous())
            parts = staged.new_empty(self.size * staged.shape[0], *staged.shape[1:])
            _gather(parts, staged, group=self.group)
            x = parts.unflatten(0, (self.size, -1)).movedim(0, -2).flatten(-2).to(x.device)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x; x itself may be overwritten."""
        if self.size > 1:
            staged = self._stage(x)
            dist.broadcast(staged, group_src=0, group=self.group)
            x = staged.to(x.device)
        return x

    def share(self, value: Any) -> Any:
        """The first rank's value, a small object."""
        if self.size > 1:
            values = [value]
            dist.broadcast_object_list(values, group_src=0, group=self.group)
            value = values[0]
        return value

    def _stage(self, x: Tensor) -> Tensor:
        """x where the group's backend can reach it: gloo cannot read MPS memory."""
        return x.cpu() if x.device.type == "mps" else x


def join_model_parallel(size: int | None, device: torch.device) -> ModelParallel:
    """Split the job into model-parallel groups of `size` consecutive ranks; None means all ranks.

    NCCL where every rank of the host has a CUDA device of its own, gloo otherwise. ValueError when `size` does not
    divide the world. Called again with another size it regroups the ranks; models built before keep their groups.
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
            initialize.initialize_model_parallel(
                size, model_parallel_backend=backend, pipeline_backend=backend, ddp_backend=backend
            )
    return ModelParallel(
        rank=initialize.get_model_parallel_rank(),
        size=initialize.get_model_parallel_world_size(),
        group=initialize.get_model_parallel_group(),
    )


def _are_grouped(size: int, backend: str) -> bool:
    """Whether fairscale has such groups already, of process groups that are still there."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized():
        return False
    try:
        group = initialize.get_model_parallel_group()
        return dist.get_world_size(group) == size and dist.get_backend(group) == backend
    except (ValueError, RuntimeError):  # groups of a job that was ended since
        return False


# --- layers --------------------------------------------------------------------------------------------------------


class ColumnParallelLinear(nn.Module):
    """A linear whose output features are split over the ranks: each rank yields its own."""

    def __init__(self, in_features: int, local_out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = _weight(local_out_features, in_features)
        self.bias = _weight(local_out_features) if bias else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, dtype)


class RowParallelLinear(nn.Module):
    """A linear whose input features are split over the ranks, which add up their shares; the bias is added once."""

    def __init__(self, local_in_features: int, out_features: int, parallel: ModelParallel, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = _weight(out_features, local_in_features)
        self.bias = _weight(out_features) if bias else None
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.parallel.all_reduce(linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding table whose rows are split over the ranks; ids of other ranks add zero here."""

    def __init__(self, vocab_size: int, dim: int, parallel: ModelParallel) -> None:
        super().__init__()
        self.weight: Weight = _weight(parallel.part(vocab_size), dim)
        self.parallel = parallel

    def forward(self, tokens: Tensor) -> Tensor:
        if self.parallel.size == 1:
            return embed(tokens, self.weight)
        local = tokens - self.parallel.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        embedded = embed(local.where(mine, 0), self.weight) * mine[..., None]
        return self.parallel.all_reduce(embedded)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
