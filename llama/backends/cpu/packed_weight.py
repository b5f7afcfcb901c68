"""Quantized weights in the layout of the CPU kernels: tiles of 16 rows, with one row in a vector lane (see D31)."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.backends.cpu import ops, structures
from llama.quantization.gguf_blocks import BlockType
from llama.quantization.weights import QuantizedWeight, matrix_shape


class PackedWeight(QuantizedWeight):
    """A matrix (out, in) of quantized blocks, packed once from GGUF's layout."""

    tiles: Tensor  # uint8 (bytes,), as pack.h lays them out

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        """Pack blocks: uint8 (out, bytes of a row)."""
        super().__init__()
        self.block_type = block_type
        self.shape = matrix_shape(blocks, block_type)
        self.register_buffer("tiles", ops.pack(blocks, block_type.name, self.shape[1]))

    @staticmethod
    def holds(block_type: BlockType) -> bool:
        return block_type.name in structures.BLOCK_TYPE_IDS

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        return ops.packed_bytes(block_type.name, rows, columns)

    def describe(self) -> structures.WeightView:
        """Return the C structure that the kernels take; it points at memory of this object."""
        return ops.packed_weight(self.tiles, self.block_type.name, *self.shape)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        weight, dtype = self.describe(), dtype or x.dtype
        is_few = x.numel() <= ops.max_few_tokens() * x.shape[-1]
        if is_few or x.dtype == torch.float16 or not ops.has_matrix_unit():
            return ops.multiply(weight, x, dtype)
        return ops.gemm(weight, x).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return ops.embedding(self.describe(), ids)
