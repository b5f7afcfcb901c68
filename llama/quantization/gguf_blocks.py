"""Quantized weights as GGUF's blocks: groups of values along a row, each with its scale, as raw bytes on any device.

Knows the layouts of blocks and nothing of files, names or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """A type of quantized block. Rows of a tensor are whole blocks, so that they can be split between blocks."""

    name: str  # as in ggml
    elements: int  # values in a block
    size: int  # bytes of a block


# Types that are decoded here; a backend's class of weights says which of them it holds without conversion.
BLOCK_TYPES = {
    "Q4_0": BlockType("Q4_0", 32, 18),
    "Q4_1": BlockType("Q4_1", 32, 20),
    "Q5_0": BlockType("Q5_0", 32, 22),
    "Q5_1": BlockType("Q5_1", 32, 24),
    "Q8_0": BlockType("Q8_0", 32, 34),
    "Q2_K": BlockType("Q2_K", 256, 84),
    "Q3_K": BlockType("Q3_K", 256, 110),
    "Q4_K": BlockType("Q4_K", 256, 144),
    "Q5_K": BlockType("Q5_K", 256, 176),
    "Q6_K": BlockType("Q6_K", 256, 210),
    "IQ4_NL": BlockType("IQ4_NL", 32, 18),
    "IQ4_XS": BlockType("IQ4_XS", 256, 136),
}
# The block type of each mode of --quantize whose result can be stored.
QUANTIZE = {"int8": "Q8_0", "int4": "Q4_1"}
# 8-bit floats; each row has a scale besides. Used only where a GPU computes with them (planar.py): see D43.
F8_E4M3 = BlockType("F8_E4M3", 1, 1)

# What the 4-bit codes of IQ4_NL and IQ4_XS stand for: close together where most values lie.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
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
    fields = take_apart(blocks.unflatten(-1, (n_blocks, block_type.size)), block_type)
    return values_of(fields, block_type).view(*blocks.shape[:-1], n_blocks * block_type.elements)


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


class BlockFields(NamedTuple):
    """What blocks (..., n_blocks, size) say, apart."""

    codes: Tensor  # uint8 (..., n_blocks, elements): one for each value, in their order
    scales: Tensor  # fp16 (..., n_blocks, 1), or (.., 2) of types with minima: scale and minimum
    # 8-bit integers (..., n_blocks, n_groups, 1 or 2), or None: what the scale, and the minimum, of each group is times
    # those of its block.
    sub_scales: Tensor | None


def take_apart(blocks: Tensor, block_type: BlockType) -> BlockFields:
    """Return the fields of uint8 blocks (..., n_blocks, size)."""
    layout = LAYOUTS[block_type.name]
    parts = dict(zip(layout.sizes, blocks.split(list(layout.sizes.values()), dim=-1), strict=True))
    codes = unpack_codes(parts["low"], *layout.low)
    if layout.high:
        codes |= unpack_codes(parts["high"], *layout.high) << layout.low_bits
    sub_scales = layout.sub_scales(parts["sub_scales"]) if layout.sub_scales else None
    return BlockFields(codes, parts["scales"].contiguous().view(torch.float16), sub_scales)


def values_of(fields: BlockFields, block_type: BlockType) -> Tensor:
    """Return the fp32 values (..., n_blocks, elements) of fields: products are exact, so only sums are rounded."""
    layout = LAYOUTS[block_type.name]
    if layout.is_table:
        table = torch.tensor(IQ4_VALUES, dtype=torch.int8, device=fields.codes.device)
        codes = table[fields.codes.int()]
    else:
        codes = fields.codes.view(torch.int8)
        codes = codes - layout.offset if layout.offset else codes
    scales = fields.scales.float().unsqueeze(-2)  # (..., n_blocks, 1, 1 or 2)
    if fields.sub_scales is not None:
        scales = scales * fields.sub_scales
    n_groups, numbers = scales.shape[-2:]
    values = scales[..., :1] * codes.unflatten(-1, (n_groups, block_type.elements // n_groups))
    if numbers == 2:
        values.add_(scales[..., 1:], alpha=1 if fields.sub_scales is None else -1)
    return values.flatten(-2)


def unpack_codes(packed: Tensor, bits: int, run: int) -> Tensor:
    """Return the codes (..., 8 / bits * n) of n bytes, `bits` bits each.

    Of each run of bytes, the codes in their lowest bits come first, then those in the next ones.
    """
    if bits == 8:
        return packed
    runs = packed.unflatten(-1, (packed.shape[-1] // run, run))
    mask = (1 << bits) - 1
    return torch.cat([runs >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)


def pack_codes(codes: Tensor, bits: int, run: int) -> Tensor:
    """Return the bytes (..., n / 8 * bits) of the lowest bits of n codes: see unpack_codes."""
    places = (codes & (1 << bits) - 1).unflatten(-1, (codes.shape[-1] * bits // 8 // run, 8 // bits, run))
    packed = places[..., 0, :]
    for place in range(1, 8 // bits):
        packed = packed | places[..., place, :] << place * bits
    return packed.flatten(-2)


def _six_bits(packed: Tensor) -> Tensor:
    """Return 8 scales and minima (..., 8, 2) of 6 bits in 12 bytes; the upper bits of the last 4 lie with the first."""
    a, b, c = packed.split(4, dim=-1)
    scales = torch.cat([a & 63, c & 15 | a >> 2 & 48], dim=-1)
    return torch.stack([scales, torch.cat([b & 63, c >> 4 | b >> 2 & 48], dim=-1)], dim=-1)


def _four_bits(packed: Tensor) -> Tensor:
    """Return a scale and a minimum for each byte: (..., n, 2)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1)


def _q3_k_scales(packed: Tensor) -> Tensor:
    """Return 16 scales (..., 16, 1), of 6 bits less 32: the lower 4 bits in 8 bytes, the upper 2 in 4 more."""
    low, high = packed.split([8, 4], dim=-1)
    return _less_32(unpack_codes(low, 4, 8) | unpack_codes(high, 2, 4) << 4)


def _iq4_xs_scales(packed: Tensor) -> Tensor:
    """Return 8 scales (..., 8, 1), of 6 bits less 32: the upper 2 bits in 2 bytes, the lower 4 in 4 more."""
    high, low = packed.split([2, 4], dim=-1)
    return _less_32(unpack_codes(low, 4, 1) | unpack_codes(high, 2, 1) << 4)


def _less_32(scales: Tensor) -> Tensor:
    return (scales.view(torch.int8) - 32).unsqueeze(-1)


def _bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.int8).unsqueeze(-1)


@dataclass(frozen=True)
class Layout:
    """Where a block's bytes have its fields."""

    sizes: dict[str, int]  # bytes of scales, sub_scales, and of the low and high bits of codes, in the order they have
    low: tuple[int, int]  # bits of a code in `low`, and the run of bytes in which they alternate: see unpack_codes
    high: tuple[int, int] | None = None  # and of its upper bits, in `high`
    offset: int = 0  # what is subtracted from each code
    sub_scales: Callable[[Tensor], Tensor] | None = None  # what BlockFields has, of their bytes
    is_table: bool = False  # codes are places in IQ4_VALUES

    @property
    def low_bits(self) -> int:
        return self.low[0]

    @property
    def high_bits(self) -> int:
        return self.high[0] if self.high else 0


_SCALED, _WITH_MINIMUM = {"scales": 2}, {"scales": 4}
_LOW, _HIGH = {"low": 16}, {"high": 4}
LAYOUTS = {
    "Q4_0": Layout(_SCALED | _LOW, (4, 16), offset=8),
    "Q4_1": Layout(_WITH_MINIMUM | _LOW, (4, 16)),
    "Q5_0": Layout(_SCALED | _HIGH | _LOW, (4, 16), (1, 1), 16),
    "Q5_1": Layout(_WITH_MINIMUM | _HIGH | _LOW, (4, 16), (1, 1)),
    "Q8_0": Layout(_SCALED | {"low": 32}, (8, 32)),
    "Q2_K": Layout({"sub_scales": 16, "low": 64, "scales": 4}, (2, 32), None, 0, _four_bits),
    "Q3_K": Layout({"high": 32, "low": 64, "sub_scales": 12, "scales": 2}, (2, 32), (1, 32), 4, _q3_k_scales),
    "Q4_K": Layout({"scales": 4, "sub_scales": 12, "low": 128}, (4, 32), None, 0, _six_bits),
    "Q5_K": Layout({"scales": 4, "sub_scales": 12, "high": 32, "low": 128}, (4, 32), (1, 32), 0, _six_bits),
    "Q6_K": Layout({"low": 128, "high": 64, "sub_scales": 16, "scales": 2}, (4, 64), (2, 32), 32, _bytes),
    "IQ4_NL": Layout(_SCALED | _LOW, (4, 16), is_table=True),
    "IQ4_XS": Layout({"scales": 2, "sub_scales": 6, "low": 128}, (4, 16), None, 0, _iq4_xs_scales, is_table=True),
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
