"""What lies between the matrix products of a layer on a GPU, each in one pass: sums and norms, rotations, gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTOR = 1024  # values of a program of 4 warps: 16 bytes of bf16 a thread


def fused_add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (n_tokens, dim), fp32, grows by delta of any dtype; the sum's RMS norm times weight (dim,), in `dtype`.

    All are contiguous. Computed in fp32, a token at a time.
    """
    n_tokens, dim = x.shape
    assert x.dtype == torch.float32 and x.is_contiguous() and (delta is None or delta.is_contiguous())
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _add_and_norm[(n_tokens,)](
        x,
        x if delta is None else delta,  # not read then
        weight,
        y,
        dim,
        eps,
        BLOCK=triton.next_power_of_2(dim),
        ADD=delta is not None,
        num_warps=4 if dim <= 2048 else 8 if dim <= 8192 else 16,
    )
    return y


def rope_and_append_kv(
    qkv: Tensor,
    rotation: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    n_heads: int,
    n_kv_heads: int,
) -> Tensor:
    """Rotated queries (n_tokens, n_heads, head_dim), in the cache's dtype.

    Rotated keys, and values, go to the slots of a layer's cache.

    qkv: (n_tokens, (n_heads + 2 * n_kv_heads) * head_dim), contiguous, as one product made it.
    rotation: complex64 (n_tokens, 1, head_dim / 2), as `llama.rope.rotate` takes it.
    slots: (n_tokens,), int64. keys, values: (n_pages, PAGE_SIZE, n_kv_heads, head_dim), contiguous.
    """
    n_tokens, heads, head_dim = len(qkv), n_heads + 2 * n_kv_heads, keys.shape[3]
    assert qkv.is_contiguous() and qkv.shape[1] == heads * head_dim and len(rotation) == n_tokens, qkv.shape
    assert slots.shape == (n_tokens,) and slots.dtype == torch.int64 and slots.is_contiguous(), slots.shape
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    q = keys.new_empty(n_tokens, n_heads, head_dim)
    block_d = triton.next_power_of_2(head_dim)
    block_heads = max(1, VECTOR // block_d)
    _rotate_and_keep[(n_tokens, triton.cdiv(heads, block_heads))](
        qkv,
        torch.view_as_real(rotation.contiguous()),
        slots,
        q,
        keys,
        values,
        N_HEADS=n_heads,
        N_KV_HEADS=n_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return q


def silu_and_mul(both: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gates) * ups of both (n_tokens, 2 * hidden), contiguous, gates first: (n_tokens, hidden).

    In `dtype`, or else in that of both.
    """
    assert both.is_contiguous()
    n_tokens, hidden = both.shape[0], both.shape[1] // 2
    y = both.new_empty(n_tokens, hidden, dtype=dtype or both.dtype)
    _gate[(n_tokens, triton.cdiv(hidden, VECTOR))](both, y, hidden, BLOCK=VECTOR, num_warps=4)
    return y


@triton.jit
def _add_and_norm(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """One token of x, delta, y (n_tokens, dim); weight: (dim,). BLOCK is at least dim."""
    at = tl.arange(0, BLOCK)
    exists = at < dim
    row = tl.program_id(0).to(tl.int64) * dim
    x = tl.load(x_ptr + row + at, mask=exists, other=0.0)
    if ADD:
        x += tl.load(delta_ptr + row + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(x_ptr + row + at, x, mask=exists)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
    weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + at, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _rotate_and_keep(
    qkv_ptr: tl.tensor,
    rotation_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_HEADS heads of one token of qkv (n_tokens, heads, HEAD_DIM): queries, then keys, then values.

    rotation: (n_tokens, HEAD_DIM / 2, 2), cosines and sines; q: (n_tokens, N_HEADS, HEAD_DIM); slots: (n_tokens,);
    keys, values: (slots of the cache, N_KV_HEADS, HEAD_DIM).
    """
    token = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (d < HEAD_DIM)[None, :]
    exists = (heads < N_HEADS + 2 * N_KV_HEADS)[:, None] & inside
    first = token.to(tl.int64) * ((N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM)
    x = tl.load(qkv_ptr + first + heads[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0).to(tl.float32)

    rotation = tl.load(rotation_ptr + token.to(tl.int64) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    cos, sin = tl.split(tl.reshape(rotation, (1, BLOCK_D // 2, 2)))
    even, odd = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_D // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (BLOCK_HEADS, BLOCK_D))

    q_place = token.to(tl.int64) * (N_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + d[None, :]
    is_query = (heads < N_HEADS)[:, None] & inside
    tl.store(q_ptr + q_place, turned.to(q_ptr.dtype.element_ty), mask=is_query)

    place = tl.load(slots_ptr + token) * (N_KV_HEADS * HEAD_DIM) + d[None, :]
    head = (heads - N_HEADS)[:, None]
    is_key = inside & (head >= 0) & (head < N_KV_HEADS)
    tl.store(keys_ptr + place + head * HEAD_DIM, turned.to(keys_ptr.dtype.element_ty), mask=is_key)
    head -= N_KV_HEADS
    is_value = inside & (head >= 0) & (head < N_KV_HEADS)
    tl.store(values_ptr + place + head * HEAD_DIM, x.to(values_ptr.dtype.element_ty), mask=is_value)


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
