"""Quantized weights, which linears and embeddings have in place of a Parameter, and torch's products with both.

Knows nothing of ranks, of the model's architecture or of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.quantization.gguf_blocks import BlockType, dequantize

# Values of a quantized weight that are dequantized at once, for many tokens.
MAX_DEQUANTIZED_VALUES = 1 << 22

# A product in 16 bits on a CPU has at most so many tokens, and a multiple of these, of the first where they are fewer
# than the second: see D47.
MAX_TOKENS_AT_ONCE = 512
TOKEN_MULTIPLES = 8, 32


class QuantizedWeight(nn.Module):
    """A matrix (out, in) of quantized values. Subclasses differ in their layout in memory."""

    block_type: BlockType
    shape: torch.Size

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Multiply x (..., in) by the matrix transposed: (..., out) in `dtype`, by default x's."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows by index, as an embedding does: fp32 (*ids.shape, in)."""
        raise NotImplementedError

    @staticmethod
    def holds(block_type: BlockType) -> bool:
        """Tell whether this class holds blocks of a type of BLOCK_TYPES as they are; others become floats."""
        return True

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        """Return the bytes of a matrix of this class."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())


class BlockWeight(QuantizedWeight):
    """Blocks as GGUF stores them, on any device; torch dequantizes them at each use."""

    blocks: Tensor  # uint8 (out, bytes of a row)

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        super().__init__()
        self.block_type = block_type
        self.register_buffer("blocks", blocks)
        self.shape = matrix_shape(blocks, block_type)

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        return rows * columns // block_type.elements * block_type.size

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        parts = self.blocks.split(max(1, MAX_DEQUANTIZED_VALUES // self.shape[1]))
        y = torch.cat([dense_linear(x, dequantize(part, self.block_type).type_as(x)) for part in parts], dim=-1)
        return y.to(dtype or x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return dequantize(F.embedding(ids, self.blocks), self.block_type)


Weight = Tensor | QuantizedWeight
# Multiplies x (..., in) by a weight (out, in) transposed: (..., out) in the dtype given, by default x's.
MatMul = Callable[[Tensor, Any, torch.dtype | None], Tensor]


def quantized_matmul(x: Tensor, weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x (..., in) by a quantized weight (out, in) transposed: (..., out)."""
    return weight.forward(x, dtype)


def float_matmul(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x (..., in) by floats (out, in) transposed: (..., out), rounded once, to `dtype`, where torch can."""
    dtype = dtype or x.dtype
    if weight.device.type == "cpu" and x.numel() == x.shape[-1]:
        # Of one token, a matrix-vector product is faster than a matrix product, and Inductor's loop of a sum faster
        # still: see D6.
        if torch.compiler.is_compiling():
            y = (weight.float() * x.float()).sum(-1)
        else:
            y = torch.mv(weight, x.view(-1).type_as(weight))
        return y.view(*x.shape[:-1], -1).to(dtype)
    if dtype == torch.float32 and weight.dtype != dtype and x.device.type == "cuda" and torch.version.cuda is not None:
        y = torch.mm(x.reshape(-1, x.shape[-1]).type_as(weight), weight.t(), out_dtype=dtype)
        return y.view(*x.shape[:-1], -1)
    return dense_linear(x.type_as(weight), weight).to(dtype)


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (..., in) by floats (out, in) transposed: (..., out), all of one dtype.

    In 16 bits on a CPU, oneDNN compiles a product for each number of tokens and keeps it: there are few numbers here.
    """
    if x.device.type != "cpu" or x.dtype == torch.float32 or torch.compiler.is_compiling():
        return F.linear(x, weight)
    y = x.new_empty(*x.shape[:-1], len(weight))
    parts = (tokens.flatten(0, -2).split(MAX_TOKENS_AT_ONCE) for tokens in (x, y))
    for part, to in zip(*parts, strict=True):
        n = len(part)
        if padding := -n % TOKEN_MULTIPLES[n >= TOKEN_MULTIPLES[1]]:
            to.copy_(F.linear(F.pad(part, (0, 0, 0, padding)), weight)[:n])
        else:
            torch.mm(part, weight.t(), out=to)
    return y


class LowRank(nn.Module):
    """What adapters add to a quantized matrix (out, in), B A, beside it as two thin ones (arXiv:2106.09685)."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        """Hold a (r, in) and b (out, r), of one dtype; the adapters' scales are in b."""
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        self.matmul: MatMul = float_matmul
        self.add: Callable[[Tensor, Tensor], object] | None = None  # a kernel in the place of `add_to`

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add x (..., in) times B A transposed to y (..., out), in place."""
        if self.add is not None:
            self.add(y, x)
        else:
            y += self.matmul(self.matmul(x, self.a, None), self.b, y.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows of B A by index: fp32 (*ids.shape, in)."""
        return self.matmul(F.embedding(ids, self.b), self.a.t().contiguous(), torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        self.matmul, self.add = float_matmul, None  # a backend's kernels point at the memory that it had
        return super()._apply(fn, recurse)


def quantized_embedding(ids: Tensor, weight: QuantizedWeight) -> Tensor:
    """Look up rows of a quantized weight (n, dim) by index: fp32 (*ids.shape, dim)."""
    return weight.rows(ids)


def matrix_shape(blocks: Tensor, block_type: BlockType) -> torch.Size:
    """Return (out, in) of raw blocks (out, bytes of a row)."""
    rows, n_bytes = blocks.shape
    return torch.Size((rows, n_bytes // block_type.size * block_type.elements))
