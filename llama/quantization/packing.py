"""Put the fields of blocks together as bytes: the inverse of taking them apart, as gguf_blocks does."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.quantization.gguf_blocks import LAYOUTS, BlockFields, BlockType, pack_codes


def put_together(fields: BlockFields, block_type: BlockType) -> Tensor:
    """Return the blocks (..., size) of fields, whose inverse is gguf_blocks.take_apart."""
    layout = LAYOUTS[block_type.name]
    parts = {"low": pack_codes(fields.codes, *layout.low), "scales": fields.scales.view(torch.uint8)}
    if layout.high:
        parts["high"] = pack_codes(fields.codes >> layout.low_bits, *layout.high)
    if fields.sub_scales is not None:
        parts["sub_scales"] = _pack_scales(fields.sub_scales, block_type.name)
    return torch.cat([parts[field] for field in layout.sizes], dim=-1)


def _pack_scales(sub_scales: Tensor, name: str) -> Tensor:
    """Return the bytes that hold the scales of groups (..., n_groups, 1 or 2)."""
    if sub_scales.shape[-1] == 2:
        scales, minima = sub_scales.unbind(-1)
        if name == "Q2_K":
            return scales | minima << 4
        (a, c), (b, d) = scales.split(4, dim=-1), minima.split(4, dim=-1)
        return torch.cat([a | c >> 4 << 6, b | d >> 4 << 6, c & 15 | d << 4], dim=-1)
    if name == "Q6_K":
        return sub_scales.squeeze(-1).view(torch.uint8)
    scales = (sub_scales.squeeze(-1) + 32).view(torch.uint8)
    if name == "Q3_K":
        return torch.cat([pack_codes(scales, 4, 8), pack_codes(scales >> 4, 2, 4)], dim=-1)
    return torch.cat([pack_codes(scales >> 4, 2, 1), pack_codes(scales, 4, 1)], dim=-1)
