"""Products with weights, whatever they are stored in: floats, or quantized blocks at their own bits.

Knows nothing of ranks or of the model's architecture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.blocks import BlockType, dequantize
from llama.gpu.available import has_triton
from llama.gpu.planes import FEW, Fp8Weight, PlanarWeight, times, times_alike
from llama.kernels import operations as kernels
from llama.kernels.compile import library

# Values of a quantized weight that are made dense at once, for many tokens.
DENSE_AT_ONCE = 1 << 22


class BlockWeight(nn.Module):
    """A matrix (out, in) of quantized blocks, raw as GGUF stores them; values are made dense where they are used."""

    blocks: Tensor  # uint8 (out, bytes of a row)

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        super().__init__()
        self.block_type = block_type
        self.register_buffer("blocks", blocks)
        self.shape = _matrix_shape(blocks, block_type)

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        """What a matrix takes."""
        return rows * columns // block_type.elements * block_type.size

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
        self.shape = _matrix_shape(blocks, block_type)
        self.register_buffer("tiles", kernels.pack(blocks, block_type.name, self.shape[1]))

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        """What a matrix takes."""
        return kernels.packed_bytes(block_type.name, rows, columns)

    def describe(self) -> kernels.Weight:
        return kernels.Weight(kernels.BLOCKS[self.block_type.name], *self.shape, self.tiles.data_ptr(), None)

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


Quantized = BlockWeight | PackedWeight | PlanarWeight | Fp8Weight
Weight = Tensor | Quantized


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out) in `dtype`, or else in x's."""
    if isinstance(weight, PlanarWeight | Fp8Weight):
        y = weight(x, dtype)
    else:
        y = (_times_floats(x, weight, dtype) if isinstance(weight, Tensor) else weight(x)).to(dtype or x.dtype)
    return y if bias is None else y + bias


def _times_floats(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    on_cpu, compiling = weight.device.type == "cpu", torch.compiler.is_compiling()
    if on_cpu and not compiling and _is_few(x) and library() is not None:
        return kernels.multiply(kernels.float_weight(weight), x)
    if on_cpu and x.numel() == x.shape[-1]:
        # For one token a CPU's bf16 matrix product takes 1.5 to 2 times as long as its matrix-vector product, and that
        # twice as long as the one loop that Inductor makes of a sum.
        y = (weight.float() * x.float()).sum(-1) if compiling else torch.mv(weight, x.view(-1).type_as(weight))
        return y.view(*x.shape[:-1], -1)
    if not on_cpu and not compiling and x.numel() <= FEW * x.shape[-1] and has_triton(weight.device):
        # Summed in fp32: in its own dtype torch may round sums of parts of a row.
        y = times_alike(x.reshape(-1, x.shape[-1]), weight, torch.float32)
        return y.view(*x.shape[:-1], -1).to(dtype or x.dtype)
    return times(x, weight, dtype or x.dtype)


def embed(ids: Tensor, weight: Weight) -> Tensor:
    """Rows of weight: (*ids.shape, in), in the weight's dtype, or fp32 from blocks."""
    return F.embedding(ids, weight) if isinstance(weight, Tensor) else weight.rows(ids)


def _matrix_shape(blocks: Tensor, block_type: BlockType) -> torch.Size:
    """(out, in) of raw blocks (out, bytes of a row)."""
    rows, n_bytes = blocks.shape
    return torch.Size((rows, n_bytes // block_type.size * block_type.elements))


def _is_few(x: Tensor) -> bool:
    return x.numel() <= kernels.FEW * x.shape[-1]
