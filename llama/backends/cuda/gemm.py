"""Products of few tokens with quantized weights, in Triton: they are read once, as stored, and decoded on the way.

One kernel for all types: tensor cores multiply a group's codes, which 16 bits hold exactly, and its scale
comes after, in fp32. Its code is the same for up to MAX_GEMV_TOKENS tokens, so a token gets the same bits whatever
their number. The layers give one token to gemv.py, which is faster for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.backends.cuda.dequantize import (
    INTERPRETED,
    from_e4m3,
    lower_codes,
    stored_scales,
    stored_words,
    units,
    upper_codes,
)
from llama.backends.cuda.elementwise import activated
from llama.config import Activation
from llama.quantization.planar import GROUP_SIZE, MAX_DEQUANT_GEMM_TOKENS, MAX_GEMV_TOKENS, Fp8Weight, PlanarWeight


@dataclass(frozen=True)
class Tile:
    """What a program takes at once, rows of the weight and groups of each row, and how Triton compiles it."""

    rows: int
    groups: int
    warps: int
    stages: int


MANY_ROWS = 16384
# By the tokens that a program computes, for weights of fewer rows and for those of MANY_ROWS: the fastest of 77 on an
# H200. Beyond 8 warps, and with many stages, fewer programs fit a multiprocessor than hide the latency of each.
TILES = {
    "F8_BYTES": {8: (Tile(32, 8, 8, 4), Tile(32, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(64, 4, 4, 2))},
    "F8_E4M3": {8: (Tile(32, 8, 8, 4), Tile(32, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(64, 4, 4, 2))},
    "Q4_0": {8: (Tile(32, 16, 8, 3), Tile(64, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(64, 4, 4, 2))},
    "Q4_1": {8: (Tile(32, 16, 8, 3), Tile(64, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(64, 4, 4, 2))},
    "Q4_K": {8: (Tile(32, 16, 8, 3), Tile(32, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(64, 4, 4, 2))},
    "Q6_K": {8: (Tile(32, 8, 8, 3), Tile(32, 4, 4, 2)), 16: (Tile(32, 8, 8, 2), Tile(32, 4, 4, 2))},
    "Q8_0": {8: (Tile(32, 16, 8, 3), Tile(32, 4, 4, 3)), 16: (Tile(32, 8, 4, 3), Tile(32, 8, 4, 3))},
}
# Not measured: as those that are read alike.
TILES |= {kind: TILES["Q6_K"] for kind in ("Q5_0", "Q5_1", "Q5_K", "Q2_K", "Q3_K")}
TILES |= {"IQ4_NL": TILES["Q4_0"], "IQ4_XS": TILES["Q4_0"]}
# Without tensor cores a whole product lives in registers.
FP32_TILE = Tile(16, 4, 4, 2)
# Groups of a row that a program makes dense.
DENSE_GROUPS = 128


def gemm(
    x: Tensor,
    weight: PlanarWeight | Fp8Weight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: Activation | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Multiply x (n_tokens, in) by weight (out, in) transposed and add bias (out,): (n_tokens, out) in out_dtype.

    At most MAX_DEQUANT_GEMM_TOKENS tokens. Nothing but the result is rounded to less than fp32. Up to MAX_GEMV_TOKENS
    tokens a token's numbers do not depend on the others. activation, slopes: see `gemv`.
    """
    y = torch.empty(len(x), weight.shape[0], dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, y, activation, slopes)
    return y


def gated_gemm(x: Tensor, weight: PlanarWeight | Fp8Weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """silu(x w1^T) * (x w3^T), (n_tokens, hidden), for weight (2 * hidden, in): w1 above w3. Otherwise as `gemm`."""
    y = torch.empty(len(x), weight.shape[0] // 2, dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, None, y, "silu")
    return y


def dequantize(weight: PlanarWeight | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """All values (out, in), to the bit those of torch."""
    n_out, n_in = weight.shape
    values = torch.empty(n_out, n_in, dtype=dtype, device=weight.codes.device)
    grid = (n_out, triton.cdiv(n_in, DENSE_GROUPS * GROUP_SIZE))
    kind, *planes = _describe(weight)
    _dequantize_kernel[grid](*planes, values, n_in, n_in // GROUP_SIZE, KIND=kind, GROUPS=DENSE_GROUPS, num_warps=4)
    return values


def tile_for(kind: str, n_tokens: int, n_rows: int, dtype: torch.dtype) -> tuple[int, Tile]:
    """(tokens that a program computes, its tile): the same for all of 1 to MAX_GEMV_TOKENS tokens."""
    tokens = max(MAX_GEMV_TOKENS, triton.next_power_of_2(n_tokens))
    return tokens, FP32_TILE if dtype == torch.float32 else TILES[kind][tokens][n_rows >= MANY_ROWS]


def _launch(
    x: Tensor,
    weight: PlanarWeight | Fp8Weight,
    bias: Tensor | None,
    y: Tensor,
    activation: Activation | None,
    slopes: Tensor | None = None,
) -> None:
    n_tokens, n_in = x.shape
    n_rows = weight.shape[0]
    assert n_in == weight.shape[1] and 0 < n_tokens <= MAX_DEQUANT_GEMM_TOKENS and x.stride(1) == 1, (
        x.shape,
        x.stride(),
        weight.shape,
    )
    kind, *planes = _describe(weight)
    tokens, tile = tile_for(kind, n_tokens, n_rows, x.dtype)
    _gemm_kernel[(triton.cdiv(n_rows, tile.rows),)](
        x,
        *planes,
        bias,
        slopes,
        y,
        n_tokens,
        y.shape[1],
        n_in,
        n_in // GROUP_SIZE,
        x.stride(0) if n_tokens > 1 else n_in,  # a single row's stride may be anything
        KIND=kind,
        ACTIVATION=activation,
        TOKENS=tokens,
        ROWS=tile.rows,
        GROUPS=tile.groups,
        STAGES=tile.stages,
        EVEN=n_in % (GROUP_SIZE * tile.groups) == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _describe(weight: PlanarWeight | Fp8Weight) -> tuple[str, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(kind, codes, high, scales, sub_scales) as kernels read them: codes as words, and pairs of scales as one word.

    Rows of 8-bit floats that are no whole groups stay bytes: F8_BYTES.
    """
    if isinstance(weight, Fp8Weight):
        whole = weight.shape[1] % GROUP_SIZE == 0
        codes = weight.codes.view(torch.int32 if whole else torch.uint8)
        return "F8_E4M3" if whole else "F8_BYTES", codes, None, weight.scales, None
    pairs = weight.scales.shape[-1] == 2
    scales = weight.scales.view(torch.int32) if pairs else weight.scales
    sub_scales = weight.sub_scales
    if sub_scales is not None and sub_scales.shape[-1] == 2:
        sub_scales = sub_scales.view(torch.int16)
    high = None if weight.high is None else weight.high.view(torch.int32)
    return weight.block_type.name, weight.codes.view(torch.int32), high, scales, sub_scales


# Not specialized: for another number of tokens the same code runs, and rounds the same.
@triton.jit(do_not_specialize=["n_tokens"])
def _gemm_kernel(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    n_groups: tl.tensor,
    x_stride: tl.tensor,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A program multiplies all tokens x (n_tokens, n_in) with ROWS rows: y (n_tokens, n_out).

    GROUPS groups of 32 columns at a time are products of their own, which lie apart until the end: warps share them.
    Rows beyond the last repeat it, unstored. EVEN: n_in is a multiple of 32 * GROUPS.
    """
    HALVES: tl.constexpr = KIND != "F8_BYTES" and KIND != "F8_E4M3" and KIND != "Q8_0"
    SPLIT: tl.constexpr = KIND == "Q2_K" or KIND == "Q3_K" or KIND == "Q6_K"  # halves have scales of their own
    MINIMA: tl.constexpr = scales_ptr.dtype.element_ty == tl.int32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CODE: tl.constexpr = tl.float16 if tl.float32 == DTYPE else DTYPE
    UNIT: tl.constexpr = 1.0 if KIND == "F8_BYTES" or KIND == "F8_E4M3" else 2.0**-6 if tl.bfloat16 == CODE else 2.0**-9
    rows = _rows(n_out, ROWS, ACTIVATION == "silu")
    row = rows[:, None, None]
    token = tl.arange(0, TOKENS)
    x_row = (token * x_stride)[None, :, None]
    token_ok = (token < n_tokens)[None, :, None]
    sums = tl.zeros([GROUPS, ROWS, TOKENS], tl.float32)
    for start in tl.range(0, tl.cdiv(n_in, 32), GROUPS, num_stages=STAGES):
        group = start + tl.arange(0, GROUPS)
        if KIND == "F8_BYTES":
            column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
            ok = column < n_in
            values = from_e4m3(tl.load(codes_ptr + row * n_in + column[None, :, :], mask=ok[None, :, :], other=0))
            x = tl.load(x_ptr + x_row + column[:, None, :], mask=token_ok & ok[:, None, :], other=0.0)
            sums += _product(values, x, DTYPE)
        else:
            ok = (group < n_groups) | EVEN
            words, high = stored_words(
                codes_ptr, high_ptr, row, group[None, :, None], ok[None, :, None], n_groups, KIND
            )
            codes = lower_codes(words, high, KIND, CODE)
            x_at = x_ptr + x_row + group[:, None, None] * 32
            x_ok = token_ok & ok[:, None, None]
            SIZE: tl.constexpr = 16 if HALVES else 32
            at = tl.arange(0, SIZE)[None, None, :]
            x = tl.load(x_at + at, mask=x_ok, other=0.0)
            product = _product(codes, x, DTYPE)
            if HALVES:
                x_upper = tl.load(x_at + 16 + at, mask=x_ok, other=0.0)
                upper = _product(upper_codes(words, high, KIND, CODE), x_upper, DTYPE)
            if KIND == "F8_E4M3":
                sums += product
            else:
                scale, upper_scale, low, upper_low = stored_scales(
                    scales_ptr, sub_scales_ptr, rows[None, :], group[:, None], ok[:, None], n_groups, KIND
                )
                if SPLIT:
                    sums += scale[:, :, None] * product
                    sums += upper_scale[:, :, None] * upper
                elif HALVES:
                    sums += scale[:, :, None] * (product + upper)
                else:
                    sums += scale[:, :, None] * product
                if MINIMA:
                    ones = units(words, CODE)
                    product, upper = _product(ones, x, DTYPE), _product(ones, x_upper, DTYPE)
                    if SPLIT:
                        sums += low[:, :, None] * product
                        sums += upper_low[:, :, None] * upper
                    else:
                        sums += low[:, :, None] * (product + upper)
    y = tl.sum(sums, axis=0) * (1 / UNIT)
    _store(y, rows, scales_ptr, bias_ptr, slopes_ptr, y_ptr, n_tokens, n_out, KIND, ACTIVATION, TOKENS, ROWS)


@triton.jit
def _product(values: tl.tensor, x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Of values (rows, groups, n) and x (groups, tokens, n), in DTYPE: fp32 (groups, rows, tokens)."""
    if INTERPRETED:
        values, x = values.to(tl.float32), x.to(tl.float32)
    else:
        values, x = values.to(DTYPE), x.to(DTYPE)
    return tl.dot(tl.permute(values, [1, 0, 2]), tl.permute(x, [0, 2, 1]), input_precision="ieee")


@triton.jit
def _dequantize_kernel(
    codes_ptr: tl.tensor,
    high_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sub_scales_ptr: tl.tensor,
    values_ptr: tl.tensor,
    n_in: tl.tensor,
    n_groups: tl.tensor,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A program decodes GROUPS groups of a row into values (n_out, n_in)."""
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    column = group * 32 + tl.arange(0, 32)[None, None, :]
    ok = column < n_in
    if KIND == "F8_BYTES":
        values = from_e4m3(tl.load(codes_ptr + row * n_in + column, mask=ok, other=0))
    else:
        exists = group < n_groups
        words, high = stored_words(codes_ptr, high_ptr, row, group, exists, n_groups, KIND)
        values = lower_codes(words, high, KIND, tl.float16).to(tl.float32)
        if KIND != "F8_E4M3":
            scale, upper_scale, low, upper_low = stored_scales(
                scales_ptr, sub_scales_ptr, row, group, exists, n_groups, KIND
            )
            values *= scale * 512
        if KIND != "F8_E4M3" and KIND != "Q8_0":
            upper = upper_codes(words, high, KIND, tl.float16).to(tl.float32) * (upper_scale * 512)
            if scales_ptr.dtype.element_ty == tl.int32:
                values += low
                upper += upper_low
            values = tl.reshape(tl.permute(tl.join(values, upper), [0, 1, 3, 2]), [1, GROUPS, 32])
    if KIND == "F8_E4M3" or KIND == "F8_BYTES":
        values *= tl.load(scales_ptr + row)
    tl.store(values_ptr + row * n_in + column, values.to(values_ptr.dtype.element_ty), mask=ok)


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
    slopes_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Finish the sums y (ROWS, TOKENS) of `rows`, and store them as (n_tokens, n_out)."""
    GATED: tl.constexpr = ACTIVATION == "silu"
    COLUMNS: tl.constexpr = ROWS // 2 if GATED else ROWS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if KIND == "F8_E4M3" or KIND == "F8_BYTES":
        y *= tl.load(scales_ptr + rows)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, COLUMNS, TOKENS]), [1, 2, 0]))
        y = gate / (1 + tl.exp(-gate)) * up
    else:
        y = activated(y, slopes_ptr, ACTIVATION)
    token = tl.arange(0, TOKENS)[None, :]
    mask = (token < n_tokens) & (column[:, None] < n_out)
    tl.store(y_ptr + token * n_out + column[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)
