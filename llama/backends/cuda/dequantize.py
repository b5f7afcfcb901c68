"""What stored codes mean, as functions inside kernels: codes and scales of groups of 32 values, in halves of 16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stored_values(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    at: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """fp32 values `at` the places (0 to 15) of both halves of groups; of F8_E4M3 without the row's scale."""
    lower, upper = stored_codes(codes_ptr, high_ptr, row, group * 32 + at, at, n_in, magic, KIND, 16, False)
    scale, upper_scale, low = stored_scales(scales_ptr, sub_scales_ptr, row, group, n_in, magic, KIND, False)
    lower *= scale
    upper *= upper_scale
    if KIND == "Q4_1" or KIND == "Q4_K":
        lower += low
        upper += low
    return lower, upper


@triton.jit
def stored_codes(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    at: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    GAP: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """fp32 codes of columns and of those GAP further on, less what their type subtracts from all.

    Of types with groups the columns are `at` the places (0 to 15) of a lower half, and GAP is 16, so that those of the
    upper half follow. EVEN: no column lies beyond n_in.
    """
    ok = (column < n_in) | EVEN
    if KIND == "FLOAT" or KIND == "F8_E4M3" or KIND == "Q8_0":
        codes = codes_ptr + row * n_in + column
        lower = tl.load(codes, mask=ok, other=0)
        upper = tl.load(codes + GAP, mask=(column + GAP < n_in) | EVEN, other=0)
        if KIND == "FLOAT":
            lower, upper = lower.to(tl.float32), upper.to(tl.float32)
        elif KIND == "F8_E4M3":
            lower, upper = _from_e4m3(lower), _from_e4m3(upper)
        else:
            lower = _whole(lower.to(tl.int32) ^ 128, magic, 128)
            upper = _whole(upper.to(tl.int32) ^ 128, magic, 128)
    else:
        group = column // 32
        codes = tl.load(codes_ptr + row * (n_in // 2) + group * 16 + at, mask=ok, other=0).to(tl.int32)
        # Upper halves stay where they are: under the exponent of 2^19 bits from the fourth on are whole numbers.
        in_place = magic - (4 << 23)
        if KIND == "Q6_K":
            high = tl.load(high_ptr + row * (n_in // 4) + group * 8 + at % 8, mask=ok, other=0).to(tl.int32)
            high = high << 4 - at // 8 * 2
            # Exclusive, so that the compiler keeps (codes & 15 | magic) together, and two instructions do.
            lower = _whole(high & 48 ^ (codes & 15 | magic), 0, 32)
            upper = (high & 768 ^ (codes & 240 | in_place)).to(tl.float32, bitcast=True) - (2.0**19 + 32)
        else:
            OFFSET: tl.constexpr = 8 if KIND == "Q4_0" else 0
            lower = _whole(codes & 15, magic, OFFSET)
            upper = (codes & 240 | in_place).to(tl.float32, bitcast=True) - (2.0**19 + OFFSET)
    return lower, upper


@triton.jit
def stored_scales(
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """fp32 scales of both halves of groups, and what is added to all their values; a row's own scale is not here."""
    ok = (group * 32 < n_in) | EVEN
    low = 0.0
    if KIND == "FLOAT" or KIND == "F8_E4M3":
        scale, upper_scale = 1.0, 1.0
    elif KIND == "Q4_0" or KIND == "Q8_0":
        scale = tl.load(scales_ptr + row * (n_in // 32) + group, mask=ok, other=0).to(tl.float32)
        upper_scale = scale
    elif KIND == "Q4_1":
        scale, low = _halves(tl.load(scales_ptr + row * (n_in // 32) + group, mask=ok, other=0))
        upper_scale = scale
    else:
        pair = tl.load(sub_scales_ptr + row * (n_in // 32) + group, mask=ok, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + row * (n_in // 256) + group // 8, mask=ok, other=0)
        if KIND == "Q4_K":
            scale, low = _halves(scale)
            scale *= _whole(pair & 255, magic, 0)
            low *= -_whole(pair >> 8 & 255, magic, 0)
            upper_scale = scale
        else:
            pair = pair ^ 0x8080
            upper_scale = scale.to(tl.float32) * _whole(pair >> 8 & 255, magic, 128)
            scale = scale.to(tl.float32) * _whole(pair & 255, magic, 128)
    return scale, upper_scale, low


@triton.jit
def _whole(codes: tl.tensor, magic: tl.tensor, offset: tl.constexpr) -> tl.tensor:
    """fp32 of whole numbers below 2^23, less offset: a logical operation and an exact subtraction."""
    return (codes | magic).to(tl.float32, bitcast=True) - (2.0**23 + offset)


@triton.jit
def _halves(pair: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """fp32 of the two fp16 values in int32 words, the lower one first."""
    lower = pair.to(tl.int16).to(tl.float16, bitcast=True)
    upper = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return lower.to(tl.float32), upper.to(tl.float32)


@triton.jit
def _from_e4m3(codes: tl.tensor) -> tl.tensor:
    """fp32 of e4m3 codes in bytes, which no GPU before Ada converts; subnormal ones too.

    With the sign at the top and 4 + 3 bits below an 8-bit exponent's upper half, only the exponent's bias differs.
    """
    bits = codes.to(tl.int32) << 24 >> 4 & 0x87F00000 - (1 << 32)
    return bits.to(tl.float32, bitcast=True) * 2.0**120
