"""What stored codes mean, as functions inside kernels: words of four bytes become floats of 16 bits, two at a time."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter computes with the bits of bfloat16 as if they were integers; floats of 32 bits it computes right.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def stored_words(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    ok: tl.tensor,
    n_groups: tl.tensor,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Words of codes (rows, groups, 8), or of 4-bit codes (.., 4), and Q6_K's of upper bits (.., 4).

    row and group broadcast to (rows, groups, 1).
    """
    high = 0
    if KIND == "F8_E4M3" or KIND == "Q8_0":
        at = tl.arange(0, 8)[None, None, :]
        words = _in_pairs(tl.load(codes_ptr + row * (n_groups * 8) + group * 8 + at, mask=ok, other=0))
    else:
        at = tl.arange(0, 4)[None, None, :]
        words = _in_pairs(tl.load(codes_ptr + row * (n_groups * 4) + group * 4 + at, mask=ok, other=0))
        if KIND == "Q6_K":
            at = tl.arange(0, 2)[None, None, :]
            high = _in_pairs(tl.load(high_ptr + row * (n_groups * 2) + group * 2 + at, mask=ok, other=0))
            high = tl.permute(tl.join(high, high >> 2), [0, 1, 3, 2])
            high = tl.reshape(high, [high.shape[0], high.shape[1], 4])
    return words, high


@triton.jit
def lower_codes(words: tl.tensor, high: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes (rows, groups, 16) of the lower halves of groups, or of byte-wide types (.., 32) of whole ones.

    As floats of 16 bits, DTYPE, in units of 2^-6 in bfloat16 and 2^-9 in float16, less what their type subtracts from
    all. Of F8_E4M3 without the row's scale, and in units of 1.
    """
    if KIND == "F8_E4M3":
        return _from_e4m3(words, DTYPE)
    elif KIND == "Q8_0":
        words = words ^ (0x80808080 - (1 << 32))
        return _from_bits(words & 0x00FF00FF, words >> 8 & 0x00FF00FF, 128, DTYPE)
    else:
        return _from_nibbles(words, high, KIND, DTYPE)


@triton.jit
def upper_codes(words: tl.tensor, high: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes (rows, groups, 16) of the upper halves of groups of 4-bit and 6-bit types; otherwise as lower_codes."""
    return _from_nibbles(words >> 4, high >> 4, KIND, DTYPE)


@triton.jit
def units(words: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A unit in the place of each code, (rows, groups, 16): made from words, so that it lies in threads as codes do."""
    BITS: tl.constexpr = 0x3C803C80 if tl.bfloat16 == DTYPE else 0x18001800
    if INTERPRETED:
        words = words * 0 + BITS
    else:
        words = tl.inline_asm_elementwise(
            f"mov.b32 $0, {BITS}; // $1", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        )
    return _floats(words, words, DTYPE)


@triton.jit
def _from_nibbles(words: tl.tensor, high: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Of the lower four bits of each byte, and of Q6_K the lower two of those of high above them."""
    even = words & 0x000F000F
    odd = words >> 8 & 0x000F000F
    if KIND == "Q6_K":
        even = even | high << 4 & 0x00300030
        odd = odd | high >> 4 & 0x00300030
    OFFSET: tl.constexpr = 8 if KIND == "Q4_0" else 32 if KIND == "Q6_K" else 0
    return _from_bits(even, odd, OFFSET, DTYPE)


@triton.jit
def _from_bits(even: tl.tensor, odd: tl.tensor, OFFSET: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Whole numbers up to 255 less OFFSET. As bits of a float they count its smallest step, also past the subnormal."""
    codes = _floats(even, odd, DTYPE)
    LARGE: tl.constexpr = 2.0**127 if tl.bfloat16 == DTYPE else 2.0**15
    UNIT: tl.constexpr = 2.0**-6 if tl.bfloat16 == DTYPE else 2.0**-9
    codes = codes * tl.full([], LARGE, codes.dtype)
    if OFFSET:
        codes = codes - tl.full([], OFFSET * UNIT, codes.dtype)
    return codes


@triton.jit
def _from_e4m3(words: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Of each byte, subnormal ones too: with the 4 + 3 bits at the end of a longer exponent only the bias differs."""
    even = words << 8
    SIGNS: tl.constexpr = 0x80008000 - (1 << 32)
    if tl.bfloat16 == DTYPE:
        codes = _floats(even & SIGNS | words << 4 & 0x07F007F0, words & SIGNS | words >> 4 & 0x07F007F0, DTYPE)
        return codes * tl.full([], 2.0**120, codes.dtype)
    else:
        codes = _floats(even & SIGNS | words << 7 & 0x3F803F80, words & SIGNS | words >> 1 & 0x3F803F80, DTYPE)
        return codes * tl.full([], 2.0**8, codes.dtype)


@triton.jit
def _floats(even: tl.tensor, odd: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """The floats (rows, groups, 4 n) in n words each of even and of odd bytes."""
    lower = tl.join(even.to(tl.int16), odd.to(tl.int16))
    upper = tl.join((even >> 16).to(tl.int16), (odd >> 16).to(tl.int16))
    bits = tl.join(lower, upper)
    bits = tl.reshape(bits, [bits.shape[0], bits.shape[1], bits.shape[2] * 4])
    if not INTERPRETED:
        return bits.to(DTYPE, bitcast=True)
    elif tl.bfloat16 == DTYPE:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _in_pairs(words: tl.tensor) -> tl.tensor:
    """Words with their two inner bytes exchanged: what lies 16 bits apart are then neighbours."""
    if INTERPRETED:
        return words & (0xFF0000FF - (1 << 32)) | words >> 8 & 0x0000FF00 | words << 8 & 0x00FF0000
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, 0x3120;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def stored_scales(
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    ok: tl.tensor,
    n_groups: tl.tensor,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """fp32 scales of both halves of groups, and what is added to all their values; a row's own scale is not here."""
    low = 0.0
    if KIND == "Q4_0" or KIND == "Q8_0":
        scale = tl.load(scales_ptr + row * n_groups + group, mask=ok, other=0).to(tl.float32)
        upper_scale = scale
    elif KIND == "Q4_1":
        scale, low = fp16_pair(tl.load(scales_ptr + row * n_groups + group, mask=ok, other=0))
        upper_scale = scale
    else:
        pair = tl.load(sub_scales_ptr + row * n_groups + group, mask=ok, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + row * (n_groups // 8) + group // 8, mask=ok, other=0)
        if KIND == "Q4_K":
            scale, low = fp16_pair(scale)
            scale *= (pair & 255).to(tl.float32)
            low *= -(pair >> 8 & 255).to(tl.float32)
            upper_scale = scale
        else:
            scale = scale.to(tl.float32)
            upper_scale = scale * (pair >> 8).to(tl.int8).to(tl.float32)
            scale = scale * pair.to(tl.int8).to(tl.float32)
    return scale, upper_scale, low


@triton.jit
def fp16_pair(pair: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """fp32 of the two fp16 values in int32 words, the lower one first."""
    lower = pair.to(tl.int16).to(tl.float16, bitcast=True)
    upper = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return lower.to(tl.float32), upper.to(tl.float32)


@triton.jit
def from_e4m3(codes: tl.tensor) -> tl.tensor:
    """fp32 of e4m3 codes in bytes, where a row has no whole words; see _from_e4m3."""
    bits = codes.to(tl.int32) << 24 >> 4 & 0x87F00000 - (1 << 32)
    return bits.to(tl.float32, bitcast=True) * 2.0**120
