"""Products of one token with quantized weights, in Triton: a weight is read once, as stored, and decoded on the way.

Codes become fp32 on CUDA cores, where a single token is faster than by the tensor cores of gemm.py (see D41). All
kernels take a row of a weight as groups of 32 values in two halves of 16, which is how 4-bit codes lie in planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.backends.cuda.dequantize import fp16_pair, from_e4m3, looked_up
from llama.backends.cuda.elementwise import activated
from llama.config import Activation
from llama.quantization.planar import GROUP_SIZE, Fp8Weight, PlanarWeight

# Rows of a program: what is read of x serves them all. In fp32 more would spill registers.
ROWS = {2: 4, 4: 2}  # by the bytes of a value of x
# Warps that share those rows. With fewer rows than 8192 two would leave an H100's 132 multiprocessors without enough
# loads in flight; with more, four would spend a quarter of their instructions on the sums across them.
ROWS_FOR_TWO_WARPS = 8192
# The bits of 2^23: a float whose lowest bits are then a whole number. It is an argument, as an instruction takes one
# constant only, and (code & 15 | MAGIC) is one instruction when the other comes from a register.
MAGIC = 0x4B000000


def gemv(
    x: Tensor,
    weight: PlanarWeight | Fp8Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: Activation | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Multiply x (1, in) by weight (out, in) transposed and add bias (out,): (1, out), in out_dtype or else in x's.

    activation: of the result, one without a gate; slopes: its numbers, where it has any (see `elementwise.activate`).
    Nothing but the result is rounded to less than fp32.
    """
    y = torch.empty(1, weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y, activation, slopes)
    return y


def gated_gemv(x: Tensor, weight: PlanarWeight | Fp8Weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """Compute silu(x w1^T) * (x w3^T), (1, hidden), of weight (2 * hidden, in): w1 above w3. Otherwise as `gemv`."""
    y = torch.empty(1, weight.shape[0] // 2, dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, None, y, "silu")
    return y


def _launch(
    x: Tensor,
    weight: PlanarWeight | Fp8Weight,
    bias: Tensor | None,
    y: Tensor,
    activation: Activation | None,
    slopes: Tensor | None = None,
) -> None:
    n_in, n_rows = x.shape[1], weight.shape[0]
    assert x.shape == (1, weight.shape[1]) and x.stride(1) == 1, (x.shape, x.stride(), weight.shape)
    rows = ROWS[x.element_size()]
    num_warps = 2 if n_rows >= ROWS_FOR_TWO_WARPS or n_in <= 64 * GROUP_SIZE else 4
    lanes = 32 * num_warps
    kind, *planes = _planes(weight)
    _gemv_kernel[(triton.cdiv(n_rows, rows),)](
        x,
        *planes,
        bias,
        slopes,
        y,
        y.shape[1],
        n_in,
        MAGIC,
        KIND=kind,
        ACTIVATION=activation,
        ROWS=rows,
        LANES=lanes,
        # 16 bytes of x: more would be spread over several threads, and what is multiplied by it as well.
        VECTOR=16 // x.element_size(),
        EVEN=n_in % (GROUP_SIZE * lanes) == 0,
        num_warps=num_warps,
    )


def _planes(weight: PlanarWeight | Fp8Weight) -> tuple[str, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return (kind, codes, high, scales, sub_scales) as the kernel reads them: codes as bytes, pairs as one word."""
    codes = weight.codes.view(torch.uint8)
    if isinstance(weight, Fp8Weight):
        return "F8_E4M3", codes, None, weight.scales, None
    pairs = weight.scales.shape[-1] == 2
    scales = weight.scales.view(torch.int32) if pairs else weight.scales
    sub_scales = weight.sub_scales
    if sub_scales is not None and sub_scales.shape[-1] == 2:
        sub_scales = sub_scales.view(torch.int16)
    return weight.block_type.name, codes, weight.high, scales, sub_scales


@triton.jit(do_not_specialize=["magic"])
def _gemv_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Multiply x (n_in,) with ROWS rows of the weight a program: y (n_out,).

    Each of LANES threads takes a group at a time, VECTOR values of both halves after each other; of 8-bit floats, which
    have no groups, neighbours take neighbouring vectors. Rows beyond the last repeat it, unstored. Of silu as many
    rows are w1's as w3's, which begins at n_out. EVEN: n_in is a multiple of 32 * LANES.
    """
    GATED: tl.constexpr = ACTIVATION == "silu"
    COLUMNS: tl.constexpr = ROWS // 2 if GATED else ROWS
    i = tl.arange(0, ROWS)
    rows = tl.minimum(tl.program_id(0) * COLUMNS + i % COLUMNS, n_out - 1) + i // COLUMNS * n_out
    rows = rows.to(tl.int64)
    row = rows[:, None]
    lane = tl.arange(0, LANES)[None, :]
    at = tl.arange(0, VECTOR)[None, None, :]
    GROUPED: tl.constexpr = KIND != "F8_E4M3"
    SPLIT: tl.constexpr = KIND == "Q2_K" or KIND == "Q3_K" or KIND == "Q6_K"  # halves have scales of their own
    MINIMA: tl.constexpr = scales_ptr.dtype.element_ty == tl.int32
    GAP: tl.constexpr = 16 if GROUPED else LANES * VECTOR  # from a half to the other
    sums = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, tl.cdiv(n_in, 32), LANES):
        group = start + lane
        scale, upper_scale, low, upper_low = _scales(scales_ptr, sub_scales_ptr, row, group, n_in, magic, KIND, EVEN)
        for part in tl.static_range(16 // VECTOR):
            if GROUPED:
                column = group[:, :, None] * 32 + part * VECTOR + at
            else:
                column = start * 32 + part * 2 * GAP + lane[:, :, None] * VECTOR + at
            lower, upper = _codes(
                codes_ptr, high_ptr, row[:, :, None], column, part * VECTOR + at, n_in, magic, KIND, GAP, EVEN
            )
            x_lower = tl.load(x_ptr + column, mask=(column < n_in) | EVEN, other=0).to(tl.float32)
            x_upper = tl.load(x_ptr + column + GAP, mask=(column + GAP < n_in) | EVEN, other=0).to(tl.float32)
            product = tl.sum(lower * x_lower, axis=2)
            upper_product = tl.sum(upper * x_upper, axis=2)
            if SPLIT:
                product = product * scale + upper_product * upper_scale
            else:
                product = (product + upper_product) * scale
            if MINIMA and SPLIT:
                product += low * tl.sum(x_lower, axis=2) + upper_low * tl.sum(x_upper, axis=2)
            elif MINIMA:
                product += low * tl.sum(x_lower + x_upper, axis=2)
            sums += product
    y = tl.sum(sums, axis=1)
    if KIND == "F8_E4M3":
        y *= tl.load(scales_ptr + rows)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, COLUMNS]), [1, 0]))
        y = gate / (1 + tl.exp(-gate)) * up
    else:
        y = activated(y, slopes_ptr, ACTIVATION)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < n_out)


@triton.jit
def _codes(
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
    """Read the codes of columns and of those GAP further on, in fp32, less what their type subtracts from all.

    Of types with groups the columns are at `at` (0 to 15) of a lower half, and GAP is 16, so that those of the upper
    half follow. EVEN: no column lies beyond n_in.
    """
    ok = (column < n_in) | EVEN
    if KIND == "F8_E4M3" or KIND == "Q8_0":
        codes = codes_ptr + row * n_in + column
        lower = tl.load(codes, mask=ok, other=0)
        upper = tl.load(codes + GAP, mask=(column + GAP < n_in) | EVEN, other=0)
        if KIND == "F8_E4M3":
            lower, upper = from_e4m3(lower), from_e4m3(upper)
        else:
            lower = _whole(lower.to(tl.int32) ^ 128, magic, 128)
            upper = _whole(upper.to(tl.int32) ^ 128, magic, 128)
    else:
        LOW: tl.constexpr = 2 if KIND == "Q2_K" or KIND == "Q3_K" else 4
        HIGH: tl.constexpr = 2 if KIND == "Q6_K" else 1
        MASK: tl.constexpr = 2**LOW - 1
        HIGH_MASK: tl.constexpr = 2**HIGH - 1 << LOW
        OFFSET: tl.constexpr = (
            4 if KIND == "Q3_K" else 8 if KIND == "Q4_0" else 16 if KIND == "Q5_0" else 32 if KIND == "Q6_K" else 0
        )
        group = column // 32
        codes = _part(codes_ptr, row, group, at, ok, n_in, LOW, 0)
        # Upper halves stay where they are: under the exponent of 2^19 bits from the fourth on are whole numbers.
        in_place = magic - (4 << 23)
        if KIND == "IQ4_NL" or KIND == "IQ4_XS":
            pair = looked_up(codes)
            lower = _whole(pair & 255, magic, 128)
            upper = (pair & 0xFF00 | magic - (8 << 23)).to(tl.float32, bitcast=True) - (2.0**15 + 128)
        elif high_ptr is not None:
            high = _part(high_ptr, row, group, at, ok, n_in, HIGH, LOW)
            # Exclusive, so that the compiler keeps (codes & 15 | magic) together, and two instructions do.
            lower = _whole(high & HIGH_MASK ^ (codes & MASK | magic), 0, OFFSET)
            upper = high & HIGH_MASK << 4 ^ (codes & MASK << 4 | in_place)
            upper = upper.to(tl.float32, bitcast=True) - (2.0**19 + OFFSET)
        else:
            lower = _whole(codes & MASK, magic, OFFSET)
            upper = (codes & MASK << 4 | in_place).to(tl.float32, bitcast=True) - (2.0**19 + OFFSET)
    return lower, upper


@triton.jit
def _part(
    ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    at: tl.tensor,
    ok: tl.tensor,
    n_in: tl.tensor,
    BITS: tl.constexpr,
    UP: tl.constexpr,
) -> tl.tensor:
    """Bytes of a plane of BITS bits a code, 4 at most, as int32, with the code of a lower half at the bits from UP on.

    That of the upper half is 4 bits further up, and others are around them.
    """
    byte = tl.load(ptr + row * (n_in // 32 * (4 * BITS)) + group * (4 * BITS) + at % (4 * BITS), mask=ok, other=0)
    down = at // (4 * BITS) * BITS
    return byte.to(tl.int32) << UP - down if UP == 4 else byte.to(tl.int32) << UP >> down  # in one shift if it can be


@triton.jit
def _scales(
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Read the fp32 scales of both halves of groups, and what is added to all values of each; not a row's own scale."""
    ok = (group * 32 < n_in) | EVEN
    low, upper_low = 0.0, 0.0
    MINIMA: tl.constexpr = scales_ptr.dtype.element_ty == tl.int32
    if KIND == "F8_E4M3":
        scale, upper_scale = 1.0, 1.0
    elif sub_scales_ptr is None:
        scale = tl.load(scales_ptr + row * (n_in // 32) + group, mask=ok, other=0)
        if MINIMA:
            scale, low = fp16_pair(scale)
        else:
            scale = scale.to(tl.float32)
        upper_scale = scale
    else:
        pair = tl.load(sub_scales_ptr + row * (n_in // 32) + group, mask=ok, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + row * (n_in // 256) + group // 8, mask=ok, other=0)
        if KIND == "Q2_K":
            whole, whole_low = fp16_pair(scale)
            scale = whole * _whole(pair & 15, magic, 0)
            low = -whole_low * _whole(pair >> 4 & 15, magic, 0)
            upper_scale = whole * _whole(pair >> 8 & 15, magic, 0)
            upper_low = -whole_low * _whole(pair >> 12 & 15, magic, 0)
        elif MINIMA:
            scale, low = fp16_pair(scale)
            scale *= _whole(pair & 255, magic, 0)
            low *= -_whole(pair >> 8 & 255, magic, 0)
            upper_scale = scale
        elif KIND == "IQ4_XS":
            scale = scale.to(tl.float32) * _whole(pair & 255 ^ 128, magic, 128)
            upper_scale = scale
        else:
            pair = pair ^ 0x8080
            upper_scale = scale.to(tl.float32) * _whole(pair >> 8 & 255, magic, 128)
            scale = scale.to(tl.float32) * _whole(pair & 255, magic, 128)
    return scale, upper_scale, low, upper_low


@triton.jit
def _whole(codes: tl.tensor, magic: tl.tensor, offset: tl.constexpr) -> tl.tensor:
    """Return fp32 of whole numbers below 2^23, less offset: a logical operation and an exact subtraction."""
    return (codes | magic).to(tl.float32, bitcast=True) - (2.0**23 + offset)
