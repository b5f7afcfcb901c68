"""Heads on a GPU are normalised and rotated as the model's are, and keys and values go to their slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import PAGE_SIZE
from llama.config import QkNorm
from llama.rope import Rotary, rotate
from tests.gpu_compile import Ahead, compiled_kernels

pytest.importorskip("triton", reason="GPU kernels are written in Triton")
from llama.backends.cuda import elementwise, heads
from llama.backends.cuda.heads import HeadNorms, mean_squares, rope_and_append_kv

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A rounding of the result, and of fp32 before it.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-2  # large enough to matter
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def close(actual: Tensor, wanted: Tensor) -> None:
    """wanted: in fp64."""
    assert actual.shape == wanted.shape
    assert torch.allclose(actual.double(), wanted, rtol=BOUNDS[actual.dtype], atol=1e-6)


@dtypes
@pytest.mark.parametrize(
    ("seqlen", "n_heads", "n_kv_heads", "head_dim"),
    [(1, 32, 8, 128), (1, 9, 3, 64), (3, 4, 4, 12), (5, 7, 1, 80), (2, 3, 1, 256)],
)
def test_queries_and_keys_are_rotated_and_keys_and_values_kept(
    seqlen: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Nothing but the tokens' own slots changes in the cache, which has a layer more."""
    n_tokens = 3 * seqlen
    qkv = randn(n_tokens, (n_heads + 2 * n_kv_heads) * head_dim).to(dtype)
    positions = torch.tensor([[7], [0], [20 - seqlen]], device=DEVICE) + torch.arange(seqlen, device=DEVICE)
    rotation = Rotary(head_dim, 10000.0, None).to(DEVICE)(positions.flatten(), None)
    cache = randn(2, 2, 4, PAGE_SIZE, n_kv_heads, head_dim).to(dtype)
    slots = torch.randperm(4 * PAGE_SIZE, generator=torch.Generator().manual_seed(3))[:n_tokens].to(DEVICE)

    by_head = qkv.view(n_tokens, -1, head_dim).double()
    q, k, v = by_head.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    pairs = torch.view_as_complex(torch.cat([q, k], dim=1).unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation.to(torch.complex128)).flatten(-2)
    wanted = cache.double()
    wanted[0, 1].flatten(0, 1)[slots] = turned[:, n_heads:]
    wanted[1, 1].flatten(0, 1)[slots] = v

    rotated = rope_and_append_kv(qkv, (rotation, rotation), slots, cache[0, 1], cache[1, 1], n_heads, n_kv_heads)
    assert rotated.dtype == dtype
    close(rotated, turned[:, :n_heads])
    close(rotated, rotate(q.to(dtype), rotation).double())
    close(cache[0], wanted[0])
    assert torch.equal(cache[1].double(), wanted[1])


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """In fp64: x (n_tokens, heads, head_dim)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation.to(torch.complex128)).flatten(-2)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 16), (3, 1, 12)])
@pytest.mark.parametrize("kind", ["head", "rotated head", "all heads", "unit", None])
def test_heads_are_normalised_and_rotated_by_rotations_of_their_own(
    kind: QkNorm | None, n_heads: int, n_kv_heads: int, head_dim: int
) -> None:
    """Values are neither; two ranks that share a KV head count its squares once."""
    n_tokens = 5
    qkv = randn(n_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
    rotary = Rotary(head_dim, 10000.0, None).to(DEVICE)
    of_queries, of_keys = rotary(torch.arange(3, 8, device=DEVICE)) * 1.5, rotary(torch.arange(9, 14, device=DEVICE))
    wide = kind == "all heads"
    q_weight, k_weight = (
        None if kind in ("unit", None) else 1 + randn(n * head_dim if wide else head_dim) / 4
        for n in (n_heads, n_kv_heads)
    )
    q, k, v = qkv.view(n_tokens, -1, head_dim).double().split([n_heads, n_kv_heads, n_kv_heads], dim=1)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        heads = x.flatten(1) if wide else x
        return F.rms_norm(heads, heads.shape[-1:], weight if weight is None else weight.double(), EPS).view_as(x)

    if kind not in ("rotated head", None):
        q, k = norm(q, q_weight), norm(k, k_weight)
    q, k = turn(q, of_queries), turn(k, of_keys)
    if kind == "rotated head":
        q, k = norm(q, q_weight), norm(k, k_weight)

    norms, means = None, None
    if kind is not None:
        norms = HeadNorms(kind, EPS, q_weight, k_weight)
    if wide:
        # As two ranks have them, with half of the queries each, and the same keys.
        parts = qkv.split([n_heads // 2 * head_dim, (n_heads - n_heads // 2) * head_dim, 2 * n_kv_heads * head_dim], 1)
        means = torch.zeros(n_tokens, heads.MEANS, device=DEVICE)
        for part, n in ((parts[0], n_heads // 2), (parts[1], n_heads - n_heads // 2)):
            ones = torch.ones(n + n_kv_heads, device=DEVICE)
            ones[:n] /= n_heads * head_dim
            ones[n:] /= 2 * n_kv_heads * head_dim
            means += mean_squares(torch.cat([part, parts[2]], 1), ones, n, n_kv_heads)
    keys, values = torch.zeros(2, 1, PAGE_SIZE, n_kv_heads, head_dim, device=DEVICE)
    slots = torch.arange(n_tokens, device=DEVICE)
    found = rope_and_append_kv(qkv, (of_queries, of_keys), slots, keys, values, n_heads, n_kv_heads, norms, means)
    torch.testing.assert_close(found.double(), q, rtol=0, atol=5e-6)
    torch.testing.assert_close(keys[0, :n_tokens].double(), k, rtol=0, atol=5e-6)
    assert torch.equal(values[0, :n_tokens].double(), v)


def ahead_of_time() -> Iterator[Ahead]:
    """At the shapes of Llama 3 8B and of a model of 135M."""
    tensors = {
        **{name: "*bf16" for name in ("qkv_ptr", "q_ptr", "keys_ptr", "values_ptr")},
        **{"q_rotation_ptr": "*fp32", "slots_ptr": "*i64", "eps": "fp32"},
    }
    weights = {"q_weight_ptr": "*bf16", "k_weight_ptr": "*bf16"}
    means, own_turns = {"means_ptr": "*fp32"}, {"k_rotation_ptr": "*fp32"}
    variants = {
        "plain": (None, {}),
        "head": ("head", weights),
        "rotated head": ("rotated head", weights),
        "all heads": ("all heads", weights | means),
        "scaled unit": ("unit", own_turns),
    }
    for n_heads, n_kv_heads, head_dim in ((32, 8, 128), (9, 3, 64)):
        for name, (kind, others) in variants.items():
            if head_dim == 64 and name != "plain":
                continue
            constants: dict[str, Any] = {"N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads}
            constants |= {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_HEADS": elementwise.VECTOR // head_dim}
            constants |= {"WIDTH": heads.MEANS, "NORM": kind}
            absent = dict.fromkeys((weights | means | own_turns).keys() - others.keys())
            yield Ahead(f"{name} {head_dim}", heads._rotate_and_keep, tensors | others, constants | absent)
    shape = {"N_Q": 4096, "N_QK": 5120, "HEAD_DIM": 128, "BLOCK": elementwise.VECTOR, "WIDTH": heads.MEANS}
    squares = {"qkv_ptr": "*bf16", "shares_ptr": "*fp32", "means_ptr": "*fp32", "stride": "i32:16"}
    yield Ahead("squares", heads._mean_squares, squares, shape)


@pytest.mark.slow
def test_kernels_move_16_bytes_at_once_and_spill_no_registers() -> None:
    kernels = compiled_kernels(__name__)
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert "ld.global.v4.b32" in kernel.ptx, name
        assert "st.global.v4.b32" in kernel.ptx or name.startswith("squares"), name  # 16 bytes in all
