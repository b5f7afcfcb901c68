"""The kernels keep the tokens that FilterTensors.apply keeps; without a GPU triton's interpreter runs them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from llama.backends.cuda import filter_kernels as kernels
from llama.backends.cuda.backend import CudaSampler
from llama.backends.cuda.sampling_kernels import CHUNK
from llama.sampling import FilterTensors, SamplingParams, SamplingTensors
from tests.gpu_compile import Ahead, compiled_kernels

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE = CHUNK.value + 40


def some_rows() -> Tensor:
    """Peaked, full of ties, all equal, and not numbers; the last 40 tokens are in a chunk of their own."""
    logits = 3 * torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(8))
    logits[0, -20:] += 4
    logits[1] = logits[1].bfloat16().float()
    logits[2, 1::3], logits[2, 0::3], logits[2, 2::3] = 0.0, -0.0, 0.0
    logits[3, 5] = math.nan
    return logits


def filtered(logits: Tensor, params: list[SamplingParams], numbers: Tensor) -> Tensor:
    filters, rows = FilterTensors.of(params, DEVICE), SamplingTensors.of(params, DEVICE)
    assert filters is not None
    return CudaSampler().filter(logits.to(DEVICE), filters, rows.temperature, numbers.to(DEVICE)).cpu()


def expected_of(logits: Tensor, params: list[SamplingParams], numbers: Tensor) -> Tensor:
    filters = FilterTensors.of(params, "cpu")
    return logits if filters is None else filters.apply(logits, SamplingTensors.of(params, "cpu").temperature, numbers)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 9, "top_p": 1.0},
        {"top_k": 1050, "top_p": 0.7, "min_p": 0.01},
        {"min_p": 0.03, "top_p": 1.0},
        {"typical_p": 0.6, "top_p": 1.0},
        {"top_k": 30, "top_p": 1.0, "typical_p": 0.8, "xtc_probability": 1.0, "xtc_threshold": 0.02},
    ],
    ids=str,
)
def test_the_tokens_of_torch_are_kept(options: dict[str, Any]) -> None:
    logits, params = some_rows(), [SamplingParams(**{"temperature": 0.8, **options})] * 4
    numbers = torch.full((4,), 0.5)
    found = filtered(logits, params, numbers)
    expected = expected_of(logits, params, numbers)
    assert torch.equal(found[:3], expected[:3])
    assert not found[3].isfinite().any(), "a row with a NaN has nothing to draw"


def test_a_row_is_filtered_as_if_it_were_alone() -> None:
    """All searches run for all rows: where a row does not ask for one, nothing may go, not even the unlikeliest."""
    given: list[dict[str, Any]] = [
        {"temperature": 0, "top_k": 3},
        {"temperature": 0.7},
        {"temperature": 0.05, "min_p": 1e-30, "top_p": 1.0},
        {"temperature": 1e15, "top_k": 20, "top_p": 1.0},
        {"top_p": 0.7, "typical_p": 0.9, "xtc_probability": 0.6, "xtc_threshold": 0.05},
    ]
    params = [SamplingParams(**options) for options in given]
    logits, numbers = some_rows()[[0, 1, 0, 1, 0]], torch.full((5,), 0.5)
    found = filtered(logits, params, numbers)
    alone = [expected_of(logits[i : i + 1], params[i : i + 1], numbers[i : i + 1])[0] for i in range(5)]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device on this machine")
def test_one_cuda_graph_serves_all_values() -> None:
    logits = 3 * torch.randn(3, 128256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    numbers = torch.full((3,), 0.5, device=DEVICE)

    def tensors(**options: Any) -> tuple[FilterTensors, Tensor]:
        params = [SamplingParams(**options)] * 3
        filters = FilterTensors.of(params, DEVICE)
        assert filters is not None
        return filters, SamplingTensors.of(params, DEVICE).temperature

    filters, temperature = tensors(top_k=9, min_p=0.1, typical_p=0.5)
    CudaSampler().filter(logits, filters, temperature, numbers)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CudaSampler().filter(logits, filters, temperature, numbers)
    for options in ({"top_k": 50, "min_p": 0.01, "typical_p": 0.9}, {"top_k": 3, "min_p": 0.3, "typical_p": 0.99}):
        others, other_temperature = tensors(temperature=1.3, **options)
        temperature.copy_(other_temperature)
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            getattr(filters, name).copy_(getattr(others, name))
        graph.replay()
        assert torch.equal(found, others.apply(logits, temperature, numbers))


def ahead_of_time() -> Iterator[Ahead]:
    """Every kernel at the vocabulary of Llama 3."""
    padded = {"CHUNKS": 128}
    row = {"logits_ptr": "*fp32", "row_stride": "i32:16", "vocab_size": "i32:16"}
    scaled = {**row, "temperature_ptr": "*fp32", "maxima_ptr": "*fp32"}
    probs, ranks = {"probs_ptr": "*fp32"}, {"ranks_ptr": "*i32"}
    sums, moments = {"sums_ptr": "*fp32"}, {"moments_ptr": "*fp32"}
    min_p = {"min_p_ptr": "*fp32"}
    yield Ahead("prepare", kernels.prepare, {**scaled, **min_p, **probs, **ranks}, {"MIN_P": True, **padded})
    limit = {"limit_ptr": "*fp32", "masses_ptr": "*i64", "state_ptr": "*i64"}
    found = {"next_masses_ptr": "*i64", "next_state_ptr": "*i64"}
    for digit, counts in ((0, False), (1, True), (kernels.KEY_DIGITS.value - 1, False)):
        constants = {"DIGIT": digit, "COUNTS": counts}
        yield Ahead(f"search {digit}", kernels.search, {**probs, **ranks, **limit, **found}, constants)
    kept = {**probs, **ranks, **limit, **min_p}
    yield Ahead("keep", kernels.keep, kept, {"COUNTS": False, "MIN_P": True})
    yield Ahead("add_up", kernels.add_up, {**scaled, **probs, **sums, **moments}, padded)
    yield Ahead("rank_by_surprise", kernels.rank_by_surprise, {**scaled, **sums, **moments, **ranks}, padded)
    threshold, last = {"threshold_ptr": "*fp32"}, {"last_ptr": "*i64"}
    yield Ahead("last", kernels.last_of_likeliest, {**row, **probs, **threshold, **sums, **last}, padded)
    acts = {"is_filtered_ptr": "*i1", **threshold, "probability_ptr": "*fp32", "uniform_ptr": "*fp32"}
    write = {**row, **probs, **acts, **sums, **last, "kept_ptr": "*fp32"}
    yield Ahead("write", kernels.write, write, {"XTC": True, **padded})


def test_kernels_compile_without_spills_and_read_tokens_four_at_a_time() -> None:
    compiled = compiled_kernels(__name__)
    assert len(compiled) == 18
    for name, kernel in compiled.items():
        assert kernel.spills == 0, name
        assert "ld.global.v4" in kernel.ptx, name
