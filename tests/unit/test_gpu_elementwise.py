"""What lies between products: sums, norms and activations on a GPU are those of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from llama.norms import XIELU
from tests.gpu_compile import Ahead, compiled_kernels

pytest.importorskip("triton", reason="GPU kernels are written in Triton")
from llama.backends.cuda import elementwise
from llama.backends.cuda.elementwise import NormWeights, activate, fused_add_norm, silu_and_mul

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
    y = fused_add_norm(x, delta, NormWeights(weight), EPS, dtype)
    assert y is not None and y.dtype == dtype
    assert torch.allclose(x.double(), wanted, rtol=1e-6, atol=1e-6)  # in place
    close(y, F.rms_norm(wanted, (dim,), weight.double(), EPS))


def test_a_norm_needs_no_delta() -> None:
    x, weight = randn(3, 36), randn(36).bfloat16()
    before = x.clone()
    y = fused_add_norm(x, None, NormWeights(weight), EPS, torch.float16)
    assert torch.equal(x, before)
    close(y, F.rms_norm(x.double(), (36,), weight.double(), EPS))


def test_a_row_of_zeros_has_a_norm_of_zeros() -> None:
    """A row that is padding holds nothing, and 0 / 0 would spread."""
    y = fused_add_norm(torch.zeros(2, 36, device=DEVICE), None, NormWeights(randn(36)), EPS, torch.bfloat16)
    assert not y.any()


@pytest.mark.parametrize("dim", [12, 5000])
def test_layer_norms_of_the_sum_and_of_what_is_added(dim: int) -> None:
    """Far from a mean of zero, which must go before squares are summed; places beyond dim once took part in them."""
    x, delta = randn(3, dim) + 4, randn(3, dim).bfloat16() * 3 - 8
    before, (weight, bias, of_delta, delta_bias) = x.double(), randn(4, dim).half()
    plain = fused_add_norm(x.clone(), delta, None, EPS, torch.float32, NormWeights(of_delta))
    close(plain, before + F.rms_norm(delta.double(), (dim,), of_delta.double(), EPS))
    y = fused_add_norm(x, delta, NormWeights(weight, bias), EPS, torch.float16, NormWeights(of_delta, delta_bias))
    wanted = before + F.layer_norm(delta.double(), (dim,), of_delta.double(), delta_bias.double(), EPS)
    assert torch.allclose(x.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted = F.layer_norm(wanted, (dim,), weight.double(), bias.double(), EPS)
    assert torch.allclose(y.double(), wanted, rtol=1e-3, atol=1e-3)


@dtypes
@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, in Triton's interpreter
def test_activations_without_a_gate_are_those_of_the_model(dtype: torch.dtype) -> None:
    ups = (randn(3, 1100) * 4).to(dtype)
    ups[1, :5] = torch.tensor([-100.0, 0.0, -1e-7, 100.0, -1e-3])
    close(activate(ups, "relu2"), F.relu(ups.double()).square())
    xielu = XIELU().to(DEVICE)
    xielu.weight.data = torch.tensor([0.7, 1.3, 0.5, -1e-6], device=DEVICE)
    wanted = xielu.double()(ups.double())
    assert torch.allclose(activate(ups, "xielu", xielu.weight.float()).double(), wanted, rtol=BOUNDS[dtype], atol=2e-7)


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
        tensors = {"x_ptr": "*fp32", "delta_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16"}
        others = ("bias_ptr", "delta_weight_ptr", "delta_bias_ptr")
        sizes = {"dim": "i32:16", "eps": "fp32"}
        block = {"BLOCK": 1 << (dim - 1).bit_length()}
        norm = elementwise._add_and_norm
        yield Ahead(f"norm {dim}", norm, tensors | sizes, block | dict.fromkeys(others), num_warps)
    every = tensors | dict.fromkeys(others, "*bf16") | sizes
    yield Ahead("two layer norms", norm, every, block, num_warps)
    gate_types = {"both_ptr": "*bf16", "y_ptr": "*bf16", "hidden": "i32:16"}
    yield Ahead("gate", elementwise._gate, gate_types, {"BLOCK": elementwise.VECTOR})
    up_types = {"ups_ptr": "*bf16", "slopes_ptr": "*bf16", "y_ptr": "*bf16", "numel": "i32:16"}
    xielu = {"ACTIVATION": "xielu", "BLOCK": elementwise.VECTOR}
    yield Ahead("xielu", elementwise._activate, up_types, xielu)


@pytest.mark.slow
def test_kernels_move_16_bytes_at_once_and_spill_no_registers() -> None:
    kernels = compiled_kernels("tests.unit.test_gpu_elementwise")
    assert len(kernels) == 12
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert "ld.global.v4.b32" in kernel.ptx and "st.global.v4.b32" in kernel.ptx, name
