"""What stored codes mean, as functions inside kernels: words of four bytes become floats of 16 bits, two at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from llama.quantization.gguf_blocks import IQ4_VALUES

# The bytes of IQ4_VALUES plus 128, in words.
TABLE_0, TABLE_1, TABLE_2, TABLE_3 = (
    tl.constexpr(int.from_bytes(bytes(value + 128 for value in IQ4_VALUES[i : i + 4]), "little", signed=True))
    for i in range(0, 16, 4)
)
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
    """Words of codes (rows, groups, 8), or of types of fewer bits (.., 4), and of their upper bits, if they lie apart.

    Of IQ4_NL and IQ4_XS the codes are looked up already: in the second words are those of the other two bytes of each.
    row and group broadcast to (rows, groups, 1).
    """
    high = 0
    if KIND == "F8_E4M3" or KIND == "Q8_0":
        words = _in_pairs(_load_words(codes_ptr, row, group, ok, n_groups, 8))
    elif KIND == "IQ4_NL" or KIND == "IQ4_XS":
        codes = _load_words(codes_ptr, row, group, ok, n_groups, 4)
        words, high = looked_up(codes), looked_up(codes >> 16)
    else:
        words = _spread_words(codes_ptr, row, group, ok, n_groups, 2 if KIND == "Q2_K" or KIND == "Q3_K" else 4)
        if high_ptr is not None:
            high = _spread_words(high_ptr, row, group, ok, n_groups, 2 if KIND == "Q6_K" else 1)
    return words, high


@triton.jit
def _load_words(
    ptr: tl.tensor, row: tl.tensor, group: tl.tensor, ok: tl.tensor, n_groups: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """The words (rows, groups, BITS) of a plane of that many bits a code."""
    at = tl.arange(0, BITS)[None, None, :]
    return tl.load(ptr + row * (n_groups * BITS) + group * BITS + at, mask=ok, other=0)


@triton.jit
def _spread_words(
    ptr: tl.tensor, row: tl.tensor, group: tl.tensor, ok: tl.tensor, n_groups: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Words (rows, groups, 4) with a code of BITS bits, 4 at most, in each byte of the lower half, above other bits.

    Codes of the upper half are 4 bits further up. Bytes are exchanged as by _in_pairs.
    """
    words = _in_pairs(_load_words(ptr, row, group, ok, n_groups, BITS))
    if BITS == 2:
        words = tl.permute(tl.join(words, words >> 2), [0, 1, 3, 2])
        words = tl.reshape(words, [words.shape[0], words.shape[1], 4])
    elif BITS == 1:
        words = words >> tl.arange(0, 4)[None, None, :]
    return words


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
    elif KIND == "IQ4_NL" or KIND == "IQ4_XS":
        return _from_bits(words & 0x00FF00FF, high & 0x00FF00FF, 128, DTYPE)
    else:
        return _from_parts(words, high, KIND, DTYPE)


@triton.jit
def upper_codes(words: tl.tensor, high: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes (rows, groups, 16) of the upper halves of groups of types of fewer bits; otherwise as lower_codes."""
    if KIND == "IQ4_NL" or KIND == "IQ4_XS":
        return _from_bits(words >> 8 & 0x00FF00FF, high >> 8 & 0x00FF00FF, 128, DTYPE)
    else:
        return _from_parts(words >> 4, high >> 4, KIND, DTYPE)


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
def _from_parts(words: tl.tensor, high: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Of the lower two or four bits of each byte, and above them the lowest one or two of those of high."""
    LOW: tl.constexpr = 2 if KIND == "Q2_K" or KIND == "Q3_K" else 4
    HIGH: tl.constexpr = 2 if KIND == "Q6_K" else 1
    MASK: tl.constexpr = 0x00010001 * (2**LOW - 1)
    HIGH_MASK: tl.constexpr = 0x00010001 * (2**HIGH - 1 << LOW)
    even = words & MASK
    odd = words >> 8 & MASK
    if KIND == "Q3_K" or KIND == "Q5_0" or KIND == "Q5_1" or KIND == "Q5_K" or KIND == "Q6_K":
        even = even | high << LOW & HIGH_MASK
        odd = odd | high >> 8 - LOW & HIGH_MASK
    OFFSET: tl.constexpr = (
        4 if KIND == "Q3_K" else 8 if KIND == "Q4_0" else 16 if KIND == "Q5_0" else 32 if KIND == "Q6_K" else 0
    )
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
def looked_up(codes: tl.tensor) -> tl.tensor:
    """The values of IQ4_NL and IQ4_XS, plus 128, of the four 4-bit codes in the lower half of each word: its bytes."""
    low_0, low_1 = tl.full([], TABLE_0, tl.int32), tl.full([], TABLE_1, tl.int32)
    high_0, high_1 = tl.full([], TABLE_2, tl.int32), tl.full([], TABLE_3, tl.int32)
    lower = _byte_permute(low_0, low_1, codes & 0x7777)
    upper = _byte_permute(high_0, high_1, codes & 0x7777)
    return _byte_permute(lower, upper, 0x3210 | codes >> 1 & 0x4444)


@triton.jit
def _byte_permute(a: tl.tensor, b: tl.tensor, places: tl.tensor) -> tl.tensor:
    """Four of the eight bytes of a and b, a's first: at the places, 0 to 7, in the lower half of a word."""
    if INTERPRETED:
        eight = b.to(tl.int64) << 32 | a.to(tl.int64) & 0xFFFFFFFF
        word = places * 0
        for i in tl.static_range(4):
            byte = eight >> (places >> 4 * i & 7) * 8 & 255
            word = word | byte.to(tl.int32) << 8 * i
        return word
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, places], dtype=tl.int32, is_pure=True, pack=1
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
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """fp32 scales of both halves of groups, and what is added to all values of each; a row's own scale is not here."""
    low, upper_low = 0.0, 0.0
    MINIMA: tl.constexpr = scales_ptr.dtype.element_ty == tl.int32
    if sub_scales_ptr is None:
        scale = tl.load(scales_ptr + row * n_groups + group, mask=ok, other=0)
        if MINIMA:
            scale, low = fp16_pair(scale)
        else:
            scale = scale.to(tl.float32)
        upper_scale, upper_low = scale, low
    else:
        pair = tl.load(sub_scales_ptr + row * n_groups + group, mask=ok, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + row * (n_groups // 8) + group // 8, mask=ok, other=0)
        if KIND == "Q2_K":
            whole, whole_low = fp16_pair(scale)
            scale = whole * (pair & 15).to(tl.float32)
            low = -whole_low * (pair >> 4 & 15).to(tl.float32)
            upper_scale = whole * (pair >> 8 & 15).to(tl.float32)
            upper_low = -whole_low * (pair >> 12 & 15).to(tl.float32)
        elif MINIMA:
            scale, low = fp16_pair(scale)
            scale *= (pair & 255).to(tl.float32)
            low *= -(pair >> 8 & 255).to(tl.float32)
            upper_scale, upper_low = scale, low
        elif KIND == "IQ4_XS":
            scale = scale.to(tl.float32) * pair.to(tl.float32)
            upper_scale = scale
        else:
            scale = scale.to(tl.float32)
            upper_scale = scale * (pair >> 8).to(tl.int8).to(tl.float32)
            scale = scale * pair.to(tl.int8).to(tl.float32)
    return scale, upper_scale, low, upper_low


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
