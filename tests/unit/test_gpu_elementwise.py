"""What lies between products: sums, norms, rotations and gates on a GPU are those of torch and of llama.rope."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from llama.cache import PAGE_SIZE
from llama.rope import Rotary, rotate
from tests.gpu_compile import Ahead, compiled_kernels

pytest.importorskip("triton", reason="GPU kernels are written in Triton")
from llama.backends.cuda import elementwise
from llama.backends.cuda.elementwise import fused_add_rms_norm, rope_and_append_kv, silu_and_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A rounding of the result, and of fp32 before it.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def randn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """wanted: in fp64."""
    assert actual.shape == wanted.shape
    assert torch.allclose(actual.double(), wanted, rtol=BOUNDS[actual.dtype], atol=1e-6)


@dtypes
@pytest.mark.parametrize("dim", [12, 576, 4096, 5000])
def test_a_sum_and_its_norm_are_those_of_torch(dim: int, dtype: torch.dtype) -> None:
    x, delta, weight = randn(3, dim), randn(3, dim).to(dtype) * 3, randn(dim).to(dtype)
    wanted = x.double() + delta.double()
    y = fused_add_rms_norm(x, delta, weight, EPS, dtype)
    assert y is not None and y.dtype == dtype
    assert torch.allclose(x.double(), wanted, rtol=1e-6, atol=1e-6)  # in place
    close(y, F.rms_norm(wanted, (dim,), weight.double(), EPS))


def test_a_norm_needs_no_delta() -> None:
    x, weight = randn(3, 36), randn(36).bfloat16()
    before = x.clone()
    y = fused_add_rms_norm(x, None, weight, EPS, torch.float16)
    assert torch.equal(x, before)
    close(y, F.rms_norm(x.double(), (36,), weight.double(), EPS))


def test_a_row_of_zeros_has_a_norm_of_zeros() -> None:
    """A row that is padding holds nothing, and 0 / 0 would spread."""
    y = fused_add_rms_norm(torch.zeros(2, 36, device=DEVICE), None, randn(36), EPS, torch.bfloat16)
    assert not y.any()


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

    rotated = rope_and_append_kv(qkv, rotation, slots, cache[0, 1], cache[1, 1], n_heads, n_kv_heads)
    assert rotated.dtype == dtype
    close(rotated, turned[:, :n_heads])
    close(rotated, rotate(q.to(dtype), rotation).double())
    close(cache[0], wanted[0])
    assert torch.equal(cache[1].double(), wanted[1])


@dtypes
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("hidden", [12, 1024, 1536, 1100])
def test_a_gate_is_silu_of_the_first_half_times_the_second(hidden: int, dtype: torch.dtype) -> None:
    both = (randn(3, 2 * hidden) * 4).to(dtype)
    both[1, :3] = torch.tensor([-1000.0, 1000.0, 0.0])  # exp overflows
    gates, ups = both.double().chunk(2, dim=1)
    y = silu_and_mul(both)
    assert y.dtype == dtype
    close(y, F.silu(gates) * ups)


def ahead_of_time() -> Iterator[Ahead]:
    """At the shapes of Llama 3 8B and of a model of 135M."""
    for dim, num_warps in ((4096, 8), (576, 4), (16384, 16)):
        norm = {"x_ptr": "*fp32", "delta_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16", "dim": "i32:16"}
        constants = {"BLOCK": 1 << (dim - 1).bit_length(), "ADD": True}
        yield Ahead(f"norm {dim}", elementwise._add_and_norm, norm | {"eps": "fp32"}, constants, num_warps)
    rotation = {
        **{name: "*bf16" for name in ("qkv_ptr", "q_ptr", "keys_ptr", "values_ptr")},
        **{"rotation_ptr": "*fp32", "slots_ptr": "*i64"},
    }
    for n_heads, n_kv_heads, head_dim in ((32, 8, 128), (9, 3, 64)):
        constants = {"N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": head_dim}
        constants["BLOCK_HEADS"] = elementwise.VECTOR // head_dim
        yield Ahead(f"rotation {head_dim}", elementwise._rotate_and_keep, rotation, constants)
    gate_types = {"both_ptr": "*bf16", "y_ptr": "*bf16", "hidden": "i32:16"}
    yield Ahead("gate", elementwise._gate, gate_types, {"BLOCK": elementwise.VECTOR})


@pytest.mark.slow
def test_kernels_move_16_bytes_at_once_and_spill_no_registers() -> None:
    kernels = compiled_kernels("tests.unit.test_gpu_elementwise")
    assert len(kernels) == 12
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert "ld.global.v4.b32" in kernel.ptx and "st.global.v4.b32" in kernel.ptx, name
