"""Products with weights, whatever they are stored in: floats, or quantized blocks at their own bits.

Knows nothing of ranks or of the model's architecture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.blocks import BlockType, dequantize
from llama.kernels import library as kernels

# Values of a quantized weight that are made dense at once, for many tokens.
DENSE_AT_ONCE = 1 << 22


class BlockWeight(nn.Module):
    """A matrix (out, in) of quantized blocks, raw as GGUF stores them; values are made dense where they are used."""

    blocks: Tensor  # uint8 (out, bytes of a row)

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        super().__init__()
        self.block_type = block_type
        self.register_buffer("blocks", blocks)
        self.shape = torch.Size((len(blocks), blocks.shape[1] // block_type.size * block_type.elements))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) times the matrix transposed: (..., out) in x's dtype."""
        parts = self.blocks.split(max(1, DENSE_AT_ONCE // self.shape[1]))
        return torch.cat([F.linear(x, dequantize(part, self.block_type).type_as(x)) for part in parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows (*ids.shape, in)."""
        return dequantize(F.embedding(ids, self.blocks), self.block_type)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class PackedWeight(nn.Module):
    """A matrix (out, in) of quantized blocks in the order that the CPU kernels read."""

    tiles: Tensor

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        super().__init__()
        self.block_type = block_type
        self.shape = torch.Size((len(blocks), blocks.shape[1] // block_type.size * block_type.elements))
        self.register_buffer("tiles", kernels.pack(blocks, block_type.name, self.shape[1]))

    def describe(self) -> kernels.Weight:
        return kernels.Weight(kernels.BLOCKS[self.block_type.name], *self.shape, 0, self.tiles.data_ptr(), None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) times the matrix transposed: (..., out) in x's dtype."""
        weight = self.describe()
        if _is_few(x):
            return kernels.multiply(weight, x).type_as(x)
        if x.dtype == torch.bfloat16 and kernels.has_matrix_unit():
            return kernels.multiply_many(weight, x)
        step = max(1, DENSE_AT_ONCE // self.shape[1] // kernels.TILE) * kernels.TILE
        spans = [(first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step)]
        parts = [torch.matmul(x, kernels.unpack(weight, *span, x.dtype)) for span in spans]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows (*ids.shape, in)."""
        return kernels.look_up(self.describe(), ids)

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


Weight = Tensor | BlockWeight | PackedWeight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out) in x's dtype."""
    if not isinstance(weight, Tensor):
        y = weight(x)
    elif torch.compiler.is_compiling():
        if weight.device.type == "cpu" and x.numel() == x.shape[-1]:
            # Inductor makes one loop of it, which reads twice as fast as the matrix product that it would call.
            y = (weight.float() * x.float()).sum(-1).type_as(x).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x.type_as(weight), weight).type_as(x)
    elif weight.device.type == "cpu" and _is_few(x) and kernels.library() is not None:
        y = kernels.multiply(kernels.float_weight(weight), x).type_as(x)
    elif weight.device.type == "cpu" and x.numel() == x.shape[-1]:
        # For one token a CPU's bf16 matrix product takes 1.5 to 2 times as long as its matrix-vector product.
        y = torch.mv(weight, x.view(-1).type_as(weight)).view(*x.shape[:-1], -1).type_as(x)
    else:
        y = F.linear(x.type_as(weight), weight).type_as(x)
    return y if bias is None else y + bias


def embed(ids: Tensor, weight: Weight) -> Tensor:
    """Rows of weight: (*ids.shape, in), in the weight's dtype, or fp32 from blocks."""
    return F.embedding(ids, weight) if isinstance(weight, Tensor) else weight.rows(ids)


def _is_few(x: Tensor) -> bool:
    return x.numel() <= kernels.FEW * x.shape[-1]
