"""What lies between the matrix products of a layer on a GPU, each in one pass: sums and norms, and activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.config import Activation

VECTOR = 1024  # values of a program of 4 warps: 16 bytes of bf16 a thread


class NormWeights(NamedTuple):
    """Of a norm of states, (dim,) each: an RMS norm, or a layer norm where it has a bias."""

    weight: Tensor
    bias: Tensor | None = None


NO_NORM = None, None


def fused_add_norm(
    x: Tensor,
    delta: Tensor | None,
    norm: NormWeights | None,
    eps: float,
    dtype: torch.dtype,
    delta_norm: NormWeights | None = None,
) -> Tensor:
    """x (n_tokens, dim), fp32, grows by delta of any dtype, or by its norm; the sum, or its norm, in `dtype`.

    All are contiguous. Computed in fp32, a token at a time.
    """
    n_tokens, dim = x.shape
    assert x.dtype == torch.float32 and x.is_contiguous() and (delta is None or delta.is_contiguous())
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _add_and_norm[(n_tokens,)](
        x,
        delta,
        *(delta_norm or NO_NORM),
        *(norm or NO_NORM),
        y,
        dim,
        eps,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4 if dim <= 2048 else 8 if dim <= 8192 else 16,
    )
    return y


def silu_and_mul(both: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gates) * ups of both (n_tokens, 2 * hidden), contiguous, gates first: (n_tokens, hidden).

    In `dtype`, or else in that of both.
    """
    assert both.is_contiguous()
    n_tokens, hidden = both.shape[0], both.shape[1] // 2
    y = both.new_empty(n_tokens, hidden, dtype=dtype or both.dtype)
    _gate[(n_tokens, triton.cdiv(hidden, VECTOR))](both, y, hidden, BLOCK=VECTOR, num_warps=4)
    return y


def activate(
    ups: Tensor, activation: Activation, slopes: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """An activation without a gate of ups (n_tokens, hidden), contiguous, in `dtype`, or else in that of ups.

    slopes: (4,), the numbers of xIELU as `llama.norms.XIELU` has them.
    """
    assert ups.is_contiguous()
    y = torch.empty_like(ups, dtype=dtype or ups.dtype)
    _activate[(triton.cdiv(ups.numel(), VECTOR),)](
        ups, slopes, y, ups.numel(), ACTIVATION=activation, BLOCK=VECTOR, num_warps=4
    )
    return y


@triton.jit
def _add_and_norm(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    delta_weight_ptr: tl.tensor,
    delta_bias_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One token of x, delta, y (n_tokens, dim); weights and biases: (dim,), or None. BLOCK is at least dim."""
    at = tl.arange(0, BLOCK)
    exists = at < dim
    row = tl.program_id(0).to(tl.int64) * dim
    x = tl.load(x_ptr + row + at, mask=exists, other=0.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row + at, mask=exists, other=0.0).to(tl.float32)
        x += _norm(delta, delta_weight_ptr, delta_bias_ptr, at, dim, eps)
        tl.store(x_ptr + row + at, x, mask=exists)
    y = _norm(x, weight_ptr, bias_ptr, at, dim, eps)
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _norm(
    x: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, at: tl.tensor, dim: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """The norm of x (BLOCK,), of which dim values exist: by root mean square, or with a bias by deviation."""
    y = x
    if weight_ptr is not None:
        if bias_ptr is not None:
            y = tl.where(at < dim, y - tl.sum(y, 0) / dim, 0.0)
        scale = 1 / tl.sqrt(tl.sum(y * y, 0) / dim + eps)
        y = y * scale * tl.load(weight_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + at, mask=at < dim, other=0.0).to(tl.float32)
    return y


@triton.jit
def _gate(both_ptr: tl.tensor, y_ptr: tl.tensor, hidden: tl.tensor, BLOCK: tl.constexpr) -> None:
    """BLOCK values of one token of both (n_tokens, 2 * hidden) and y (n_tokens, hidden)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < hidden
    row = tl.program_id(0).to(tl.int64) * hidden
    gates = tl.load(both_ptr + 2 * row + at, mask=exists, other=0.0).to(tl.float32)
    ups = tl.load(both_ptr + 2 * row + hidden + at, mask=exists, other=0.0).to(tl.float32)
    y = gates / (1 + tl.exp(-gates)) * ups
    tl.store(y_ptr + row + at, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _activate(
    ups_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    y_ptr: tl.tensor,
    numel: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK values of ups and y (numel,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ups = tl.load(ups_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, activated(ups, slopes_ptr, ACTIVATION).to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def activated(ups: tl.tensor, slopes_ptr: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of ups, fp32; they themselves where it is None. slopes: (4,), of xIELU."""
    if ACTIVATION == "relu2":
        ups = tl.maximum(ups, 0.0)
        ups *= ups
    elif ACTIVATION == "xielu":
        alpha_p, alpha_n = tl.load(slopes_ptr).to(tl.float32), tl.load(slopes_ptr + 1).to(tl.float32)
        beta, eps = tl.load(slopes_ptr + 2).to(tl.float32), tl.load(slopes_ptr + 3).to(tl.float32)
        below = (tl.exp(tl.minimum(ups, eps)) - 1 - ups) * alpha_n
        ups = tl.where(ups > 0, alpha_p * ups * ups, below) + beta * ups
    return ups
