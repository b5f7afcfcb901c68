"""Measure what a model's linears multiply: of each column, the sum of squares over the tokens of texts.

The model computes by its own modules, whatever kernels there are, as hooks are of modules: see `build_model`. Knows
nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama.cache import ForwardBatch
from llama.checkpoint.base import shard_dim
from llama.checkpoint.imatrix import ColumnSquares
from llama.checkpoint.load import part_span
from llama.checkpoint.shapes import global_shapes
from llama.distributed.job import collective
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.model import Transformer


class _Observer:
    """Add up the squares of what goes into a linear: (local in,), in fp64 where the device has it, else on the CPU."""

    def __init__(self, local_in_features: int, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.sums = torch.zeros(local_in_features, dtype=torch.float64, device=self.device)
        self.count = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        self.sums += x.float().square().to(self.device).sum(dim=0, dtype=torch.float64)
        self.count += len(x)


@torch.inference_mode()
def measure_squares(
    model: Transformer,
    windows: Sequence[Sequence[int]],
    shown: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, ColumnSquares]:
    """Return for each matrix of a layer, by Meta's names, the squares of its inputs over the tokens of all windows.

    Every rank of the job calls this with the same windows and gets the same: ranks that share a model compute together,
    and replicas of it share out the windows. shown: given this rank's windows, returns them, and may show progress.
    """
    world_size = dist.get_world_size()
    n_replicas = world_size // model.parallel.size
    own = windows[dist.get_rank() // model.parallel.size :: n_replicas]
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    observers = {name: _Observer(linear.weight.shape[1], model.device) for name, linear in linears.items()}
    hooks = [linear.register_forward_pre_hook(observers[name]) for name, linear in linears.items()]
    try:
        cache = model.new_cache(1, max(map(len, windows)))
        start_pos = torch.zeros(1, dtype=torch.long, device=model.device)
        for window in shown(own):
            tokens = torch.tensor(window, device=model.device)
            model.hidden(tokens, ForwardBatch.of_rows(cache, start_pos, len(window)))
    finally:
        for hook in hooks:
            hook.remove()
    shapes = global_shapes(model.args)
    return {name: _over_ranks(model, name, shapes[name][1], observer) for name, observer in observers.items()}


def _over_ranks(model: Transformer, name: str, columns: int, observer: _Observer) -> ColumnSquares:
    """Return sums over all replicas of all columns, of which each rank has all, or those of its part."""
    is_split = shard_dim(name) == 1
    start, stop = part_span(name, columns, model.parallel) if is_split else (0, columns)
    total = torch.zeros(columns + 1, dtype=torch.float64, device="cpu")
    if is_split or model.parallel.rank == 0:
        total[start:stop] = observer.sums[: stop - start].cpu()
    if model.parallel.rank == 0:
        total[-1] = observer.count
    if dist.get_world_size() > 1:
        collective(dist.all_reduce, total)
    return ColumnSquares(total[:-1], total[-1:])
