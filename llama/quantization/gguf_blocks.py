"""Quantized weights as GGUF's blocks: groups of values along a row, each with its scale, as raw bytes on any device.

Knows the layouts of blocks and nothing of files, names or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """A type of quantized block. Rows of a tensor are whole blocks, so that they can be split between blocks."""

    name: str  # as in ggml
    elements: int  # values in a block
    size: int  # bytes of a block


# Types that models run in without conversion.
BLOCK_TYPES = {
    "Q4_0": BlockType("Q4_0", 32, 18),
    "Q4_1": BlockType("Q4_1", 32, 20),
    "Q8_0": BlockType("Q8_0", 32, 34),
    "Q4_K": BlockType("Q4_K", 256, 144),
    "Q6_K": BlockType("Q6_K", 256, 210),
}
# The block type of each mode of --quantize whose result can be stored.
QUANTIZE = {"int8": "Q8_0", "int4": "Q4_1"}
# 8-bit floats; each row has a scale besides. Used only where a GPU computes with them (planar.py): see D43.
F8_E4M3 = BlockType("F8_E4M3", 1, 1)

Q5_0_SIZE = 22
# Values quantized at once: their temporaries take some 32 MB, and torch's threads rarely wait for each other.
MAX_QUANTIZED_VALUES = 1 << 20
# Where the search for a Q4_1 group's scale begins (see D23), as fractions of the range of its values.
RANGES = (1.0, 0.9)
REFITS = 4
# Adding and subtracting this rounds to a whole number, as fp32 has no fractions there; torch.round would start threads
# even for a few thousand values.
ROUNDING = 1.5 * 2**23


def dequantize(blocks: Tensor, block_type: BlockType) -> Tensor:
    """Dequantize uint8 blocks (..., n_bytes) to fp32 values (..., n_values), to the bit as ggml does.

    Raise ValueError where rows are not whole blocks.
    """
    n_blocks, rest = divmod(blocks.shape[-1], block_type.size)
    if rest:
        raise ValueError(
            f"rows of {blocks.shape[-1]} bytes are not whole {block_type.name} blocks of {block_type.size}"
        )
    values = _DECODERS[block_type.name](blocks.unflatten(-1, (n_blocks, block_type.size)))
    return values.view(*blocks.shape[:-1], n_blocks * block_type.elements)


def quantize(values: Tensor, block_type: BlockType) -> Tensor:
    """Quantize values (..., n_values) of any floating dtype to uint8 blocks (..., n_bytes) of a type of QUANTIZE.

    Q8_0 is rounded as ggml does; for Q4_1 each group's scale and minimum are searched for the least squared error.
    Raise ValueError where rows are not whole blocks, or values are not finite or too large for a scale in fp16.
    """
    n_values = values.shape[-1]
    if n_values % block_type.elements:
        raise ValueError(
            f"rows of {n_values} values are not whole {block_type.name} blocks of {block_type.elements}: "
            "keep this tensor in floats"
        )
    groups = values.reshape(-1, block_type.elements)
    blocks = torch.empty(len(groups), block_type.size, dtype=torch.uint8, device=values.device)
    chunk_len = MAX_QUANTIZED_VALUES // block_type.elements
    for first in range(0, len(groups), chunk_len):
        chunk = groups[first : first + chunk_len].float()
        blocks[first : first + chunk_len], finite = _ENCODERS[block_type.name](chunk)
        if not finite:
            raise ValueError(
                f"values up to {chunk.abs().max():g} cannot be quantized to {block_type.name}, whose scales are "
                "float16: leave --quantize out"
            )
    return blocks.view(*values.shape[:-1], n_values // block_type.elements * block_type.size)


def requantize_exactly(blocks: Tensor) -> Tensor:
    """Convert Q5_0 blocks (..., n_bytes) to Q8_0 blocks of the same values: 5-bit codes less 16 fit into 8 bits."""
    assert blocks.shape[-1] % Q5_0_SIZE == 0, blocks.shape
    n_blocks = blocks.shape[-1] // Q5_0_SIZE
    scale, high, low = blocks.unflatten(-1, (n_blocks, Q5_0_SIZE)).split([2, 4, 16], dim=-1)
    bits = torch.stack([high >> i & 1 for i in range(8)], dim=-1).flatten(-2)  # (..., n_blocks, 32)
    codes = (_nibbles(low) | bits << 4).to(torch.int8) - 16
    return torch.cat([scale, codes.view(torch.uint8)], dim=-1).flatten(-2)


def _float(halves: Tensor) -> Tensor:
    """Convert n bytes of fp16 values, at any alignment, to fp32 values (..., n / 2)."""
    return halves.contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Return the 4-bit codes (..., 2 n) of n bytes: the lower halves of all bytes, then the upper halves."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


# Decoders take blocks (..., n_blocks, size) and return values (..., n_blocks, elements), or the same in groups. All
# products are exact in fp32, so only sums are rounded.


def _decode_q4_0(blocks: Tensor) -> Tensor:
    scale, codes = blocks.split([2, 16], dim=-1)
    return _float(scale) * (_nibbles(codes).to(torch.int8) - 8)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    scale, low, codes = blocks.split([2, 2, 16], dim=-1)
    return (_float(scale) * _nibbles(codes)).add_(_float(low))


def _decode_q8_0(blocks: Tensor) -> Tensor:
    scale, codes = blocks.split([2, 32], dim=-1)
    return _float(scale) * codes.view(torch.int8)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    """Decode 8 groups of 32 values, each with a 6-bit scale and minimum; the last 4 groups' are stored split."""
    scale, low, packed, codes = blocks.split([2, 2, 12, 128], dim=-1)
    a, b, c = packed.split(4, dim=-1)
    scales = torch.cat([a & 63, c & 15 | a >> 2 & 48], dim=-1)  # (..., 8)
    lows = torch.cat([b & 63, c >> 4 | b >> 2 & 48], dim=-1)
    values = _nibbles(codes.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # (..., 8, 32)
    return ((_float(scale) * scales).unsqueeze(-1) * values).sub_((_float(low) * lows).unsqueeze(-1))


def _decode_q6_k(blocks: Tensor) -> Tensor:
    """Decode 16 groups of 16 values with 8-bit scales; the lower 4 and the upper 2 bits of codes are stored apart."""
    low, high, scales, scale = blocks.split([128, 64, 16, 2], dim=-1)
    low = _nibbles(low.unflatten(-1, (2, 64)))  # (..., 2, 128)
    high = high.unflatten(-1, (2, 32))
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    codes = (low | high << 4).to(torch.int8) - 32
    return (_float(scale) * scales.view(torch.int8)).unsqueeze(-1) * codes.flatten(-2).unflatten(-1, (16, 16))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q8_0": _decode_q8_0,
    "Q4_K": _decode_q4_k,
    "Q6_K": _decode_q6_k,
}

# Encoders take fp32 groups (n_groups, elements), and return blocks (n_groups, size) and whether all scales are finite.


def _encode_q8_0(groups: Tensor) -> tuple[Tensor, bool]:
    scale = groups.abs().amax(dim=1, keepdim=True) / 127
    # Below the normal numbers the inverse would overflow; the scale is 0 in fp16 anyway.
    codes = groups * torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1 / scale)
    whole = codes.to(torch.int8)
    rounded = whole + (2 * (codes - whole)).to(torch.int8)  # halves away from 0, as ggml has it
    half = scale.half()
    blocks = torch.cat([half.view(torch.uint8), rounded.view(torch.uint8)], dim=1)
    return blocks, bool(half.isfinite().all())


def _encode_q4_1(groups: Tensor) -> tuple[Tensor, bool]:
    """Alternate between nearest codes and the scale and minimum that fit them best, and use the best result (see D23).

    Plain rounding is among the results, so that no group comes out worse than that.
    """
    x = groups.t().contiguous()  # (32, n_groups): sums over a group are sums of rows
    low, high = x.amin(dim=0), x.amax(dim=0)
    x = x - low  # more precise for groups that lie far from 0
    total = x.sum(dim=0)
    spread = high - low
    best_scale, best_low = torch.zeros_like(low), torch.zeros_like(low)
    best = torch.full_like(low, float("inf"))
    for fraction in RANGES:
        scale, offset = spread * (fraction / 15), spread * ((1 - fraction) / 2)
        for refit in range(REFITS + 1):
            # Round to fp16 first, so that the error is that of the stored values.
            scale, offset = _rounded(scale), _rounded(low + offset) - low
            codes = _codes(x, scale, offset)
            if refit in (0, REFITS):
                error = torch.addcmul(offset, codes, scale).sub_(x).square_().sum(dim=0)
                better = error < best
                best = torch.where(better, error, best)
                best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, offset, best_low)
            if refit < REFITS:
                scale, offset = _fitted(x, codes, total)
    codes = _codes(x, best_scale, best_low).to(torch.uint8)
    packed = (codes[:16] | codes[16:] << 4).t()
    halves = torch.stack([best_scale, best_low + low], dim=1).half().view(torch.uint8)  # (n_groups, 4)
    return torch.cat([halves, packed], dim=1), bool(best.isfinite().all())


def _rounded(values: Tensor) -> Tensor:
    """Round to fp16 and back."""
    return values.half().float()


def _codes(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return the nearest 4-bit codes, as fp32; all are 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return torch.addcmul(-offset * inverse, x, inverse).clamp_(0, 15).add_(ROUNDING).sub_(ROUNDING)


def _fitted(x: Tensor, codes: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and offset (n_groups,) that fit x best with these codes: 0 and the mean where all are equal."""
    n = len(x)
    sum_codes, sum_squares = codes.sum(dim=0), codes.square().sum(dim=0)
    determinant = n * sum_squares - sum_codes.square()  # integers, exact in fp32
    scale = (n * (codes * x).sum(dim=0) - sum_codes * total) / determinant
    scale = torch.where(determinant == 0, 0.0, scale)
    return scale, (total - scale * sum_codes) / n


_ENCODERS: dict[str, Callable[[Tensor], tuple[Tensor, bool]]] = {"Q8_0": _encode_q8_0, "Q4_1": _encode_q4_1}
