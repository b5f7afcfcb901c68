"""Blocks of the types that the `gguf` library only decodes, made by plain rounding: enough for random weights.

Knows nothing of files. What users' weights become is made with more care, in gguf_blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.quantization.gguf_blocks import IQ4_VALUES, LAYOUTS, BlockFields, BlockType, pack_codes

# The largest scale, and minimum, of a group by type; those without minima are signed, and a negative scale is not used.
LARGEST = {"Q2_K": 15, "Q3_K": 31, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127, "IQ4_XS": 31}
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16, "IQ4_XS": 8, "IQ4_NL": 1}
WITH_MINIMA = ("Q2_K", "Q4_K", "Q5_K")


def plain_blocks(values: Tensor, block_type: BlockType) -> Tensor:
    """Round fp32 values (n_blocks, elements) to blocks of a type of GROUPS: uint8 (n_blocks, size)."""
    name, layout = block_type.name, LAYOUTS[block_type.name]
    groups = values.unflatten(-1, (GROUPS[name], -1))
    largest_code = (1 << layout.low_bits + layout.high_bits) - 1
    if name in WITH_MINIMA:
        minima = groups.amin(dim=-1).clamp(max=0).neg()
        needed = torch.stack([(groups.amax(dim=-1).clamp(min=0) + minima) / largest_code, minima], dim=-1)
    else:
        needed = (groups.abs().amax(dim=-1) / (IQ4_VALUES[-1] if layout.is_table else layout.offset - 1)).unsqueeze(-1)
    sub_scales = None
    if name in LARGEST:
        scales = (needed.amax(dim=1) / LARGEST[name]).half()  # (n_blocks, 1 or 2)
        sub_scales = (needed / scales.float().unsqueeze(1)).nan_to_num(0).round().clamp(0, LARGEST[name])
        held = scales.float().unsqueeze(1) * sub_scales
        sub_scales = sub_scales.to(torch.uint8 if name in WITH_MINIMA else torch.int8)
    else:
        scales = needed.squeeze(1).half()
        held = scales.float().unsqueeze(1)
    steps = ((groups + held[..., 1:] if name in WITH_MINIMA else groups) / held[..., :1]).nan_to_num(0)
    if layout.is_table:
        table = torch.tensor(IQ4_VALUES, dtype=torch.float32)
        codes = torch.bucketize(steps, (table[1:] + table[:-1]) / 2)
    else:
        codes = steps.round().add(layout.offset).clamp(0, largest_code)
    return put_together(BlockFields(codes.to(torch.uint8).flatten(1), scales, sub_scales), block_type)


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
    if name in WITH_MINIMA:
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
