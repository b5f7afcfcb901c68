"""Linears and the embedding split over the ranks of a model (arXiv:1909.08053)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.distributed.groups import ModelParallel
from llama.quantization.linear import Weight, embed, linear


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
