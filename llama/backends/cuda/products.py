"""Products of few tokens with weights, in Triton: weights are read once, as they are stored, and decoded on the way.

All kernels take a row of a weight as groups of 32 values in two halves of 16, which is how 4-bit codes lie in planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.backends.cuda.dequantize import stored_codes, stored_scales, stored_values
from llama.quantization.planar import FEW, GROUP, MOST, Fp8Weight, PlanarWeight

# Rows of a program for few tokens: what is read of x serves them all. 8 tokens with 8 rows would spill registers, and
# so would 8 tokens in fp32 with 4 rows.
ROWS = {2: 4, 4: 2}  # by the bytes of a value of x
# Warps that share those rows. With fewer rows than 8192 two would leave an H100's 132 multiprocessors without enough
# loads under way; with more, four would spend a quarter of their instructions on the sums across them.
ROWS_FOR_TWO_WARPS = 8192
# For tensor cores: rows of a program, and groups of each row that are decoded at once. Three stages of loads fit into
# the 99 KB of shared memory of the smaller GPUs; products in fp32, which they do without, hold all in registers.
DOT_ROWS = 32
DOT_GROUPS = {2: 4, 4: 1}
DENSE_GROUPS = 128
# The bits of 2^23: a float whose lowest bits are then a whole number. It is an argument, as an instruction takes one
# constant only, and (code & 15 | MAGIC) is one instruction when the other comes from a register.
MAGIC = 0x4B000000


def multiply(
    x: Tensor,
    weight: Tensor | PlanarWeight | Fp8Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (n_tokens, in) times weight (out, in) transposed, plus bias (out,): (n_tokens, out), by default in x's dtype.

    At most FEW tokens with floats, MOST with the others. x and sums are fp32 up to FEW tokens, and then a token's
    numbers do not depend on the others; beyond, weights are rounded to x's dtype, as in a dense copy.
    """
    y = torch.empty(len(x), weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y, gated=False)
    return y


def multiply_gated(
    x: Tensor, weight: Tensor | PlanarWeight | Fp8Weight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """silu(x w1^T) * (x w3^T), (n_tokens, hidden), for weight (2 * hidden, in): w1 above w3. Otherwise as multiply."""
    y = torch.empty(len(x), weight.shape[0] // 2, dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, None, y, gated=True)
    return y


def dense(weight: PlanarWeight | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """All values (out, in), to the bit those of torch."""
    n_out, n_in = weight.shape
    values = torch.empty(n_out, n_in, dtype=dtype, device=weight.codes.device)
    grid = (n_out, triton.cdiv(n_in, DENSE_GROUPS * GROUP))
    kind, *planes = _describe(weight)
    _dense_kernel[grid](*planes, values, n_in, MAGIC, KIND=kind, GROUPS=DENSE_GROUPS, num_warps=4)
    return values


def _launch(x: Tensor, weight: Tensor | PlanarWeight | Fp8Weight, bias: Tensor | None, y: Tensor, gated: bool) -> None:
    n_tokens, n_in = x.shape
    n_rows = weight.shape[0]
    limit = FEW if isinstance(weight, Tensor) else MOST
    assert n_in == weight.shape[1] and 0 < n_tokens <= limit and x.stride(1) == 1, (x.shape, x.stride(), weight.shape)
    kind, *planes = _describe(weight)
    x_stride = x.stride(0) if n_tokens > 1 else n_in  # a single row's stride may be anything
    arguments = (x, *planes, bias, y, n_tokens, y.shape[1], n_in, x_stride, MAGIC)
    if n_tokens <= FEW:
        rows = ROWS[x.element_size()]
        num_warps = 2 if n_rows >= ROWS_FOR_TWO_WARPS or n_in <= 64 * GROUP else 4
        lanes = 32 * num_warps
        _few_kernel[(triton.cdiv(n_rows, rows),)](
            *arguments,
            KIND=kind,
            GATED=gated,
            TOKENS=triton.next_power_of_2(n_tokens),
            ROWS=rows,
            LANES=lanes,
            # 16 bytes of x: more would be spread over several threads, and what is multiplied by it as well.
            VECTOR=16 // x.element_size(),
            EVEN=n_in % (GROUP * lanes) == 0,
            num_warps=num_warps,
        )
    else:
        _most_kernel[(triton.cdiv(n_rows, DOT_ROWS),)](
            *arguments,
            KIND=kind,
            GATED=gated,
            TOKENS=max(16, triton.next_power_of_2(n_tokens)),
            ROWS=DOT_ROWS,
            GROUPS=DOT_GROUPS[x.element_size()],
            num_warps=4,
            num_stages=3,
        )


def _describe(
    weight: Tensor | PlanarWeight | Fp8Weight,
) -> tuple[str, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(kind, codes, high, scales, sub_scales) as kernels read them: codes as bytes, and pairs as one word."""
    if isinstance(weight, Tensor):
        assert weight.is_contiguous(), weight.stride()
        return "FLOAT", weight, None, None, None
    codes = weight.codes.view(torch.uint8)
    if isinstance(weight, Fp8Weight):
        return "F8_E4M3", codes, None, weight.scales, None
    pairs = weight.scales.shape[-1] == 2
    scales = weight.scales.view(torch.int32) if pairs else weight.scales
    sub_scales = None if weight.sub_scales is None else weight.sub_scales.view(torch.int16)
    return weight.block_type.name, codes, weight.high, scales, sub_scales


@triton.jit(do_not_specialize=["n_tokens", "magic"])
def _few_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    x_stride: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A program multiplies all tokens x (n_tokens, n_in) with ROWS rows: y (n_tokens, n_out).

    Each of LANES threads takes a group at a time, VECTOR values of both halves after each other; of floats, which have
    no groups, neighbours take neighbouring vectors. The order of a token's additions is the same for all TOKENS. Rows
    and tokens beyond the last repeat it, unstored. EVEN: n_in is a multiple of 32 * LANES.
    """
    rows = _rows(n_out, ROWS, GATED)
    row = rows[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    at = tl.arange(0, VECTOR)[None, None, None, :]
    GROUPED: tl.constexpr = KIND != "FLOAT" and KIND != "F8_E4M3"
    GAP: tl.constexpr = 16 if GROUPED else LANES * VECTOR  # from a half to the other
    sums = tl.zeros([TOKENS, ROWS, LANES], tl.float32)
    for start in range(0, tl.cdiv(n_in, 32), LANES):
        group = start + lane
        scale, upper_scale, low = stored_scales(scales_ptr, sub_scales_ptr, row, group, n_in, magic, KIND, EVEN)
        for part in tl.static_range(16 // VECTOR):
            if GROUPED:
                column = group[:, :, :, None] * 32 + part * VECTOR + at
            else:
                column = start * 32 + part * 2 * GAP + lane[:, :, :, None] * VECTOR + at
            lower, upper = stored_codes(
                codes_ptr, high_ptr, row[:, :, :, None], column, part * VECTOR + at, n_in, magic, KIND, GAP, EVEN
            )
            for t in tl.static_range(TOKENS):
                x_at = x_ptr + tl.minimum(t, n_tokens - 1) * x_stride + column
                x_lower = tl.load(x_at, mask=(column < n_in) | EVEN, other=0).to(tl.float32)
                x_upper = tl.load(x_at + GAP, mask=(column + GAP < n_in) | EVEN, other=0).to(tl.float32)
                product = tl.sum(lower * x_lower, axis=3)
                upper_product = tl.sum(upper * x_upper, axis=3)
                if KIND == "Q6_K":
                    product = product * scale + upper_product * upper_scale
                else:
                    product = (product + upper_product) * scale
                if KIND == "Q4_1" or KIND == "Q4_K":
                    product += low * tl.sum(x_lower + x_upper, axis=3)
                sums = tl.where(tl.arange(0, TOKENS)[:, None, None] == t, sums + product, sums)
    _store(tl.sum(sums, axis=2), rows, scales_ptr, bias_ptr, y_ptr, n_tokens, n_out, KIND, GATED, TOKENS, ROWS)


@triton.jit(do_not_specialize=["n_tokens", "magic"])
def _most_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    x_stride: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A program multiplies all tokens x (n_tokens, n_in) with ROWS rows on tensor cores: y (n_tokens, n_out).

    GROUPS groups at a time become values in x's dtype; lower and upper halves are two products.
    """
    rows = _rows(n_out, ROWS, GATED)
    row = rows[:, None, None]
    token = tl.arange(0, TOKENS)
    half = tl.arange(0, GROUPS * 16)
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, tl.cdiv(n_in, 32), GROUPS):
        group = start + tl.arange(0, GROUPS)[None, :, None]
        at = tl.arange(0, 16)[None, None, :]
        lower, upper = stored_values(codes_ptr, high_ptr, scales_ptr, sub_scales_ptr, row, group, at, n_in, magic, KIND)
        lower = tl.trans(tl.reshape(lower.to(x_ptr.dtype.element_ty), [ROWS, GROUPS * 16]))
        upper = tl.trans(tl.reshape(upper.to(x_ptr.dtype.element_ty), [ROWS, GROUPS * 16]))
        column = ((start + half // 16) * 32 + half % 16)[None, :]
        x_at = x_ptr + token[:, None] * x_stride + column
        x_lower = tl.load(x_at, mask=(token[:, None] < n_tokens) & (column < n_in), other=0)
        x_upper = tl.load(x_at + 16, mask=(token[:, None] < n_tokens) & (column + 16 < n_in), other=0)
        sums = tl.dot(x_lower, lower, sums, input_precision="ieee")
        sums = tl.dot(x_upper, upper, sums, input_precision="ieee")
    _store(sums, rows, scales_ptr, bias_ptr, y_ptr, n_tokens, n_out, KIND, GATED, TOKENS, ROWS)


@triton.jit(do_not_specialize=["magic"])
def _dense_kernel(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    values_ptr: tl.tensor,
    n_in: tl.tensor,
    magic: tl.tensor,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A program decodes GROUPS groups of a row into values (n_out, n_in)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    at = tl.arange(0, 16)[None, :]
    lower, upper = stored_values(codes_ptr, high_ptr, scales_ptr, sub_scales_ptr, row, group, at, n_in, magic, KIND)
    if KIND == "F8_E4M3":
        scale = tl.load(scales_ptr + row)
        lower *= scale
        upper *= scale
    column = group * 32 + at
    to = values_ptr + row * n_in + column
    tl.store(to, lower.to(values_ptr.dtype.element_ty), mask=column < n_in)
    tl.store(to + 16, upper.to(values_ptr.dtype.element_ty), mask=column + 16 < n_in)


@triton.jit
def _rows(n_out: tl.tensor, ROWS: tl.constexpr, GATED: tl.constexpr) -> tl.tensor:
    """int64 rows of the weight that this program takes: with GATED as many of w1 as of w3, which begins at n_out."""
    i = tl.arange(0, ROWS)
    if GATED:
        column = tl.program_id(0) * (ROWS // 2) + i % (ROWS // 2)
        rows = tl.minimum(column, n_out - 1) + i // (ROWS // 2) * n_out
    else:
        rows = tl.minimum(tl.program_id(0) * ROWS + i, n_out - 1)
    return rows.to(tl.int64)


@triton.jit
def _store(
    y: tl.tensor,
    rows: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Finish the sums y (TOKENS, ROWS) of `rows`, and store them as (n_tokens, n_out)."""
    COLUMNS: tl.constexpr = ROWS // 2 if GATED else ROWS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if KIND == "F8_E4M3":
        y *= tl.load(scales_ptr + rows)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [TOKENS, 2, COLUMNS]), [0, 2, 1]))
        y = gate / (1 + tl.exp(-gate)) * up
    token = tl.arange(0, TOKENS)[:, None]
    mask = (token < n_tokens) & (column[None, :] < n_out)
    tl.store(y_ptr + token * n_out + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
