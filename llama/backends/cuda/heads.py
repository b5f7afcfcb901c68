"""What becomes of heads between products and attention on a GPU: norms, rotations, and the way into the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.backends.cuda import elementwise
from llama.config import QkNorm

MEANS = 4  # values that `mean_squares` makes of a token: 16 bytes, of which two values are used


class HeadNorms(NamedTuple):
    """Norms of queries and keys.

    q, k: weights of one head, (head_dim,), or of this rank's heads, where all are normalised together; None: ones.
    shares: (heads,), fp32, where all are normalised together: what the square of a value of this rank's queries, then
    keys, counts in the mean of its kind.
    """

    kind: QkNorm
    eps: float
    q: Tensor | None = None
    k: Tensor | None = None
    shares: Tensor | None = None


def mean_squares(qkv: Tensor, shares: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """What this rank adds to the mean squares of all queries, and of all keys: (n_tokens, MEANS), fp32.

    qkv: (n_tokens, (n_heads + 2 * n_kv_heads) * head_dim), contiguous; shares: see `HeadNorms`.
    """
    heads = n_heads + 2 * n_kv_heads
    head_dim = qkv.shape[1] // heads
    assert qkv.is_contiguous() and shares.shape == (n_heads + n_kv_heads,) and shares.dtype == torch.float32
    means = torch.empty(len(qkv), MEANS, dtype=torch.float32, device=qkv.device)
    _mean_squares[(len(qkv),)](
        qkv,
        shares,
        means,
        qkv.shape[1],
        N_Q=n_heads * head_dim,
        N_QK=(n_heads + n_kv_heads) * head_dim,
        HEAD_DIM=head_dim,
        BLOCK=elementwise.VECTOR,
        WIDTH=MEANS,
        num_warps=4,
    )
    return means


def rope_and_append_kv(
    qkv: Tensor,
    rotations: tuple[Tensor, Tensor],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    n_heads: int,
    n_kv_heads: int,
    norms: HeadNorms | None = None,
    means: Tensor | None = None,
) -> Tensor:
    """Rotated queries (n_tokens, n_heads, head_dim), in the cache's dtype.

    Rotated keys, and values, go to the slots of a layer's cache. Norms are of both, before the rotation or after it.

    qkv: (n_tokens, (n_heads + 2 * n_kv_heads) * head_dim), contiguous, as one product made it.
    rotations: of queries and of keys, complex64 (n_tokens, 1, head_dim / 2), as `llama.rope.rotate` takes them.
    slots: (n_tokens,), int64. keys, values: (n_pages, PAGE_SIZE, n_kv_heads, head_dim), contiguous.
    means: (n_tokens, MEANS), of heads that are normalised together, as `mean_squares` gives them, summed over ranks.
    """
    n_tokens, heads, head_dim = len(qkv), n_heads + 2 * n_kv_heads, keys.shape[3]
    assert qkv.is_contiguous() and qkv.shape[1] == heads * head_dim, qkv.shape
    assert all(len(each) == n_tokens for each in rotations), n_tokens
    assert slots.shape == (n_tokens,) and slots.dtype == torch.int64 and slots.is_contiguous(), slots.shape
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    of_queries, of_keys = rotations
    kind, eps, q_weight, k_weight, _ = norms or HeadNorms("unit", 0.0)
    q = keys.new_empty(n_tokens, n_heads, head_dim)
    block_d = triton.next_power_of_2(head_dim)
    block_heads = max(1, elementwise.VECTOR // block_d)
    _rotate_and_keep[(n_tokens, triton.cdiv(heads, block_heads))](
        qkv,
        torch.view_as_real(of_queries.contiguous()),
        None if of_keys is of_queries else torch.view_as_real(of_keys.contiguous()),
        q_weight,
        k_weight,
        means,
        slots,
        q,
        keys,
        values,
        eps,
        NORM=None if norms is None else kind,
        N_HEADS=n_heads,
        N_KV_HEADS=n_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_D=block_d,
        WIDTH=MEANS,
        num_warps=4,
    )
    return q


@triton.jit
def _mean_squares(
    qkv_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    means_ptr: tl.tensor,
    stride: tl.tensor,
    N_Q: tl.constexpr,
    N_QK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One token of qkv (n_tokens, stride): N_Q values of queries, then keys up to N_QK; means: (n_tokens, WIDTH)."""
    token = tl.program_id(0).to(tl.int64)
    q, k = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, N_QK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(qkv_ptr + token * stride + at, mask=at < N_QK, other=0.0).to(tl.float32)
        x *= x * tl.load(shares_ptr + at // HEAD_DIM, mask=at < N_QK, other=0.0)
        q += tl.where(at < N_Q, x, 0.0)
        k += tl.where(at < N_Q, 0.0, x)
    i = tl.arange(0, WIDTH)
    means = tl.where(i == 0, tl.sum(q, 0), tl.where(i == 1, tl.sum(k, 0), 0.0))
    tl.store(means_ptr + token * WIDTH + i, means)


@triton.jit
def _rotate_and_keep(
    qkv_ptr: tl.tensor,
    q_rotation_ptr: tl.tensor,
    k_rotation_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    means_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """BLOCK_HEADS heads of one token of qkv (n_tokens, heads, HEAD_DIM): queries, then keys, then values.

    rotations: (n_tokens, HEAD_DIM / 2, 2), cosines and sines, of keys None where they are those of queries.
    q: (n_tokens, N_HEADS, HEAD_DIM); slots: (n_tokens,); keys, values: (slots of the cache, N_KV_HEADS, HEAD_DIM).
    NORM: of queries and keys, or None; weights, or None: (HEAD_DIM,), or of "all heads" (N_HEADS, HEAD_DIM) and
    (N_KV_HEADS, HEAD_DIM), whose mean squares are in means (n_tokens, WIDTH).
    """
    token = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (d < HEAD_DIM)[None, :]
    exists = (heads < N_HEADS + 2 * N_KV_HEADS)[:, None] & inside
    first = token.to(tl.int64) * ((N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM)
    x = tl.load(qkv_ptr + first + heads[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0).to(tl.float32)

    turned = x
    if NORM == "head" or NORM == "unit" or NORM == "all heads":
        mean_ptr = means_ptr if means_ptr is None else means_ptr + token * WIDTH
        turned = _norm_heads(
            turned, mean_ptr, q_weight_ptr, k_weight_ptr, heads, d, eps, NORM, N_HEADS, N_KV_HEADS, HEAD_DIM
        )
    cos, sin = _rotation(q_rotation_ptr, token, d, HEAD_DIM, BLOCK_D)
    if k_rotation_ptr is not None:
        of_query = (heads < N_HEADS)[:, None]
        k_cos, k_sin = _rotation(k_rotation_ptr, token, d, HEAD_DIM, BLOCK_D)
        cos, sin = tl.where(of_query, cos, k_cos), tl.where(of_query, sin, k_sin)
    even, odd = tl.split(tl.reshape(turned, (BLOCK_HEADS, BLOCK_D // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (BLOCK_HEADS, BLOCK_D))
    if NORM == "rotated head":
        turned = _norm_heads(
            turned, None, q_weight_ptr, k_weight_ptr, heads, d, eps, NORM, N_HEADS, N_KV_HEADS, HEAD_DIM
        )

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
def _rotation(
    ptr: tl.tensor, token: tl.tensor, d: tl.tensor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines of a token, (1, BLOCK_D / 2) each."""
    rotation = tl.load(ptr + token.to(tl.int64) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    return tl.split(tl.reshape(rotation, (1, BLOCK_D // 2, 2)))


@triton.jit
def _norm_heads(
    x: tl.tensor,
    mean_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    heads: tl.tensor,
    d: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    N_HEADS: tl.constexpr,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """Norms of heads x (BLOCK_HEADS, BLOCK_D) of a token; of values, which are none of both, anything.

    mean: of squares of all queries, and of all keys.
    """
    if NORM == "all heads":
        mean = tl.load(mean_ptr + (heads >= N_HEADS).to(tl.int32))
    else:
        mean = tl.sum(x * x, 1) / HEAD_DIM
    y = x / tl.sqrt(mean + eps)[:, None]
    if q_weight_ptr is not None:
        STEP: tl.constexpr = HEAD_DIM if NORM == "all heads" else 0  # from a head's weights to the next one's
        inside = (d < HEAD_DIM)[None, :]
        head = heads[:, None]
        is_key = (head >= N_HEADS) & (head < N_HEADS + N_KV_HEADS) & inside
        q_weight = tl.load(q_weight_ptr + head * STEP + d[None, :], mask=(head < N_HEADS) & inside, other=0.0)
        k_weight = tl.load(k_weight_ptr + (head - N_HEADS) * STEP + d[None, :], mask=is_key, other=0.0)
        y *= tl.where(head < N_HEADS, q_weight, k_weight).to(tl.float32)
    return y
