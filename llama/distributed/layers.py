"""Linears and the embedding split over the ranks of a model (arXiv:1909.08053)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.distributed.groups import ModelParallel
from llama.quantization.weights import (
    LowRank,
    MatMul,
    QuantizedWeight,
    Weight,
    float_matmul,
    quantized_embedding,
    quantized_matmul,
)


class ColumnParallelLinear(nn.Module):
    """A linear whose output features are split over the ranks: each rank computes its own."""

    def __init__(self, in_features: int, local_out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = _empty(local_out_features, in_features)
        self.bias = _empty(local_out_features) if bias else None
        self.matmul: MatMul = float_matmul
        self.low_rank: LowRank | None = None  # adapters beside a quantized weight: see D65

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Apply the linear to x (..., in): (..., local out), in `dtype`, by default x's."""
        y = self.matmul(x, self.weight, dtype)
        if self.low_rank is not None:
            self.low_rank.add_to(y, x)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(nn.Module):
    """A linear whose input features are split over the ranks; their results are summed, and the bias is added once."""

    def __init__(self, local_in_features: int, out_features: int, parallel: ModelParallel, bias: bool = False) -> None:
        super().__init__()
        self.weight: Weight = _empty(out_features, local_in_features)
        self.bias = _empty(out_features) if bias else None
        self.matmul: MatMul = float_matmul
        self.low_rank: LowRank | None = None
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear to x (..., local in): (..., out), the same on every rank."""
        y = self.matmul(x, self.weight, None)
        if self.low_rank is not None:
            self.low_rank.add_to(y, x)
        y = self.parallel.all_reduce(y)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding table whose rows are split over the ranks; each adds zeros for the ids of other ranks."""

    def __init__(self, vocab_size: int, dim: int, parallel: ModelParallel) -> None:
        super().__init__()
        self.weight: Weight = _empty(parallel.part(vocab_size), dim)
        self.embedding: Callable[[Tensor, Any], Tensor] = F.embedding
        self.low_rank: LowRank | None = None
        self.parallel = parallel

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens (bsz, seqlen): (bsz, seqlen, dim), in the weight's dtype, fp32 of a quantized weight."""
        if self.parallel.size == 1:
            return self._rows(tokens)
        local = tokens - self.parallel.rank * self.weight.shape[0]
        is_local = (local >= 0) & (local < self.weight.shape[0])
        embedded = self._rows(local.where(is_local, 0)) * is_local[..., None]
        return self.parallel.all_reduce(embedded)

    def _rows(self, ids: Tensor) -> Tensor:
        rows = self.embedding(ids, self.weight)
        return rows if self.low_rank is None else rows + self.low_rank.rows(ids)


def set_quantized_weight(module: nn.Module, weight: QuantizedWeight, low_rank: LowRank | None = None) -> None:
    """Replace the Parameter of a linear or an embedding by a quantized weight, and what adapters add to it."""
    del module.weight
    module.weight = weight
    if isinstance(module, VocabParallelEmbedding):
        module.embedding = quantized_embedding
    else:
        assert isinstance(module, ColumnParallelLinear | RowParallelLinear), type(module)
        module.matmul = quantized_matmul
    module.low_rank = low_rank


def tie_output(output: ColumnParallelLinear, table: VocabParallelEmbedding) -> None:
    """Make the output projection use the embedding table's weight, quantized or not."""
    del output.weight
    output.weight = table.weight
    output.matmul = quantized_matmul if table.embedding is quantized_embedding else float_matmul


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
