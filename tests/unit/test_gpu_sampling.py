"""The kernels choose the tokens of llama.sampling: worked out in fp64, by fractions where all are equal, and by it.

Without a GPU triton's interpreter runs them, on the CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from llama import sampling
from llama.backends.cuda import sampling_kernels as kernels
from llama.backends.cuda.available import LARGEST_VOCAB
from llama.backends.cuda.backend import CudaSampler
from llama.backends.cuda.sampling import greedy, sample_all, sample_nucleus
from llama.sampling import INVALID, SamplingParams, SamplingTensors
from tests.gpu_compile import Ahead, compiled_kernels

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK, DIGITS = kernels.CHUNK.value, kernels.DIGITS.value
JUST_BELOW_ONE = 1 - 2**-24
# A cumulative mass in fp32 is off by less.
MARGIN = 1e-5


def of_rows(value: float, n: int) -> Tensor:
    return torch.full((n,), value, dtype=torch.float32, device=DEVICE)


def drawn(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> list[int]:
    """With top_p 1, in the order of the vocabulary."""
    logits, uniform, temperatures = logits.to(DEVICE), uniform.to(DEVICE), of_rows(temperature, len(logits))
    if top_p == 1:
        return sample_all(logits, temperatures, uniform).tolist()
    return sample_nucleus(logits, temperatures, of_rows(top_p, len(logits)), uniform).tolist()


def reference(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> list[int]:
    rows = SamplingTensors.of([SamplingParams(temperature, top_p)] * len(logits), "cpu")
    return sampling.sample(logits, uniform, rows).tolist()


def intervals(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Of one row, in fp64: where each token's share of the kept mass begins and ends; (vocab_size,) each."""
    probs = torch.softmax(logits.double() / temperature, 0)
    order = torch.arange(len(logits)) if top_p == 1 else probs.sort(descending=True, stable=True).indices
    ends = probs[order].cumsum(0)
    begins = ends - probs[order]
    kept = begins <= top_p
    assert top_p == 1 or (begins - top_p).abs().min() > 1e-7, "fp32 may keep another token"
    ends = torch.where(kept, ends, ends[kept][-1])
    begins = torch.where(kept, begins, ends)
    by_id = order.argsort()
    return begins[by_id] / ends[-1], ends[by_id] / ends[-1]


def some_rows(vocab_size: int, seed: int) -> Tensor:
    """One row of each kind: peaked, flat, full of ties, nearly certain."""
    normal = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([4 * normal[0], 0.5 * normal[1], (4 * normal[2]).bfloat16().float(), normal[3]])
    rows[3, vocab_size // 2] = 40.0
    return rows


@pytest.mark.parametrize("vocab_size", [7, 1000, 3 * CHUNK + 5])
@pytest.mark.parametrize(
    ("top_p", "temperature"), [(1e-6, 1.0), (0.5, 0.6), (0.9, 1.3), (0.999, 1.0), (1.0, 0.8)], ids=str
)
def test_tokens_are_those_of_llama_sampling(vocab_size: int, top_p: float, temperature: float) -> None:
    logits = some_rows(vocab_size, seed=vocab_size)
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(5))
    expected = reference(logits, temperature, top_p, uniform)
    found = drawn(logits, temperature, top_p, uniform)
    for row, share, token, wanted in zip(logits, uniform.tolist(), found, expected, strict=True):
        begins, ends = intervals(row, temperature, top_p)
        assert begins[token] - MARGIN <= share <= ends[token] + MARGIN
        assert begins[token] < ends[token], "a token outside the nucleus"
        if begins[wanted] + MARGIN < share < ends[wanted] - MARGIN:
            assert token == wanted


@pytest.mark.parametrize("top_p", [0.5, 0.8, 1.0])
def test_stratified_uniforms_give_each_token_its_share(top_p: float) -> None:
    """Of n draws, a token's count is n times its probability, but for the strata at its two ends."""
    n, vocab_size = 32, CHUNK + 9
    logits = torch.full((vocab_size,), -math.inf)
    # In both chunks; two tie.
    logits[[3, 700, 701, CHUNK - 1, CHUNK, CHUNK + 8]] = torch.tensor([1.0, 2.0, 0.3, 1.0, -0.7, 1.6])
    uniform = (torch.arange(n) + 0.5) / n
    counts = Counter(drawn(logits.expand(n, -1), 0.9, top_p, uniform))
    begins, ends = intervals(logits, 0.9, top_p)
    shares = {token: n * share for token, share in enumerate((ends - begins).tolist()) if share > 0}
    assert counts.keys() <= shares.keys()
    assert all(abs(counts[token] - share) <= 1 for token, share in shares.items())


@pytest.mark.parametrize("temperature", [0.6, 1e15])
def test_top_p_zero_is_the_first_of_the_greatest(temperature: float) -> None:
    """At a high temperature all are equally likely in fp32, and the likeliest is the greatest still."""
    logits = torch.tensor([[0.0, 2.0, -math.inf, 1.0, 0.5, 2.0, -30.0], [5.0, 1.0, 7.0, 7.0, 0.0, 0.0, 0.0]]).to(DEVICE)
    rows = SamplingTensors.of([SamplingParams(temperature, top_p=0)] * 2, DEVICE)
    for uniform in (0.0, 0.5, JUST_BELOW_ONE):
        assert CudaSampler()(logits, of_rows(uniform, 2), rows).tolist() == [1, 2]


@pytest.mark.parametrize("top_p", [0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("vocab_size", [1, 8, 2 * CHUNK + 1])
def test_equal_tokens_are_kept_and_drawn_by_id(vocab_size: int, top_p: float) -> None:
    """Of eight and 0.5, the fifth has exactly 0.5 before it: it stays."""
    uniform = torch.tensor([0.0, 0.6180339, JUST_BELOW_ONE])
    exact_top_p = Fraction(torch.tensor(top_p).item())
    kept = min(vocab_size, math.floor(exact_top_p * vocab_size) + 1)
    expected = [math.floor(Fraction(share) * kept) for share in uniform.tolist()]
    assert drawn(torch.full((3, vocab_size), -2.5), 0.7, top_p, uniform) == expected


def test_the_largest_vocabulary_does_not_overflow() -> None:
    uniform = torch.tensor([JUST_BELOW_ONE])
    assert drawn(torch.zeros(1, LARGEST_VOCAB), 1.0, 1.0, uniform) == [LARGEST_VOCAB - 1]


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.6, 0.999])
def test_the_first_and_the_last_uniform_give_the_ends_of_the_nucleus(top_p: float) -> None:
    logits = torch.tensor([[0.0, 2.0, -math.inf, 1.0, 0.5, 2.0, -30.0]]).expand(2, -1)
    order = [1, 5, 3, 4, 0, 6]
    probs = torch.softmax(logits[0].double(), 0)[order]
    last = int((probs.cumsum(0) - probs <= top_p).sum()) - 1
    assert drawn(logits, 1.0, top_p, torch.tensor([0.0, JUST_BELOW_ONE])) == [1, order[last]]


def test_a_nucleus_of_everything_and_a_uniform_of_one_end_with_the_last_possible_token() -> None:
    logits = torch.tensor([1.0, 0.0, -math.inf, 0.0, -math.inf]).expand(3, -1).to(DEVICE)
    uniform = torch.tensor([0.0, JUST_BELOW_ONE, 1.0], device=DEVICE)
    assert sample_nucleus(logits, of_rows(1.0, 3), of_rows(1.0, 3), uniform).tolist() == [0, 3, 3]
    assert sample_all(logits, of_rows(1.0, 3), uniform).tolist() == [0, 3, 3]


@pytest.mark.parametrize("temperature", [1e-8, 1e-38, 0.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float, top_p: float) -> None:
    """What is smaller than fp32's smallest is 0 on the device."""
    logits = torch.tensor([[60.0, -60.0, 61.0, 3.0], [-1e4, -2e4, -1e4 - 1, -math.inf]])
    assert drawn(logits, temperature, top_p, torch.tensor([0.0, JUST_BELOW_ONE])) == [2, 0]


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_huge_temperature_is_uniform_but_for_minus_infinity(top_p: float) -> None:
    logits = torch.tensor([-math.inf, 5.0, -5.0, -math.inf, 0.0, 1.0]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, JUST_BELOW_ONE])
    assert drawn(logits, 1e15, top_p, uniform) == reference(logits, 1e15, top_p, uniform)


@pytest.mark.parametrize("top_p", [0.9, 1.0, None], ids=str)
def test_rows_that_are_not_numbers_are_marked_and_spare_the_others(top_p: float | None) -> None:
    good = torch.full((CHUNK + 3,), -20.0)
    good[CHUNK + 1] = 20.0
    bad = [good.clone() for _ in range(4)]
    bad[0][3] = math.nan
    bad[1][CHUNK + 2] = math.inf
    bad[2][:] = -math.inf
    bad[3][:] = math.nan
    logits = torch.stack([good, bad[0], good, bad[1], bad[2], good, bad[3]])
    tokens = greedy(logits.to(DEVICE)).tolist() if top_p is None else drawn(logits, 0.8, top_p, torch.full((7,), 0.5))
    assert tokens == [CHUNK + 1, INVALID, CHUNK + 1, INVALID, INVALID, CHUNK + 1, INVALID]


@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 2 * CHUNK + 5])
def test_greedy_is_the_first_of_the_greatest(vocab_size: int) -> None:
    logits = torch.cat([some_rows(vocab_size, seed=2), torch.full((2, vocab_size), -1e30)])
    logits[-1, vocab_size // 2 :] = 0.0
    assert greedy(logits.to(DEVICE)).tolist() == reference(logits, 0, 1.0, torch.zeros(6))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_row_gives_the_same_token_alone_and_in_a_batch(top_p: float) -> None:
    """The batch is a part of wider rows, as where a vocabulary is padded."""
    logits = torch.cat([some_rows(CHUNK + 300, seed=4), torch.zeros(1, CHUNK + 300)])
    logits, uniform = logits[:, :-3], torch.tensor([0.1, 0.7, 0.3, 0.9, 0.5])
    alone = [drawn(logits[i : i + 1].contiguous(), 1.1, top_p, uniform[i : i + 1])[0] for i in range(5)]
    assert drawn(logits, 1.1, top_p, uniform) == alone


def test_rows_with_parameters_of_their_own_get_the_tokens_they_get_alone() -> None:
    """All rows of a batch once had the same; whatever kinds of draws meet, none changes another's."""
    given = [(0.0, 1.0), (0.7, 0.9), (1.3, 1.0), (1.0, 0.0), (2.0, 0.6)]
    logits = some_rows(CHUNK + 9, seed=6)[[0, 1, 2, 0, 1]].to(DEVICE)
    logits = torch.cat([logits, torch.full_like(logits, math.nan)])
    params = [SamplingParams(*values) for values in given] * 2
    uniform = torch.rand(10, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alone = [
        CudaSampler()(logits[i : i + 1], uniform[i : i + 1], SamplingTensors.of(params[i : i + 1], DEVICE)).item()
        for i in range(10)
    ]
    rows = SamplingTensors.of(params, DEVICE)
    assert rows.kinds == {"greedy", "nucleus", "whole"}
    assert CudaSampler()(logits, uniform, rows).tolist() == alone
    assert alone[5:] == [INVALID] * 5 and len(set(alone)) > 4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device on this machine")
def test_one_cuda_graph_serves_all_temperatures_and_masses() -> None:
    vocab_size = 128256
    logits = 3 * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    temperature, top_p, uniform = of_rows(1.0, 5), of_rows(0.5, 5), of_rows(0.0, 5)
    sample_nucleus(logits, temperature, top_p, uniform)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_nucleus(logits, temperature, top_p, uniform)
    for new_temperature, new_top_p, new_uniform in [(0.6, 0.9, 0.3), (1.2, 0.99, 0.8), (2.0, 0.2, 0.01)]:
        temperature.fill_(new_temperature)
        top_p.fill_(new_top_p)
        uniform.fill_(new_uniform)
        graph.replay()
        for row, token in zip(logits.cpu(), tokens.tolist(), strict=True):
            begins, ends = intervals(row, new_temperature, new_top_p)
            assert begins[token] - MARGIN <= new_uniform <= ends[token] + MARGIN


def ahead_of_time() -> Iterator[Ahead]:
    """Every kernel at the vocabulary of Llama 3."""
    padded = {"CHUNKS": 128}
    logits = {"logits_ptr": "*fp32", "row_stride": "i32:16", "vocab_size": "i32:16"}
    yield Ahead("maxima", kernels.maxima, {**logits, "maxima_ptr": "*fp32", "zeros_ptr": "*i64"}, {"ZEROS": 576})
    first = {**logits, "maxima_ptr": "*fp32", "tokens_ptr": "*i64", "chunks": "i32"}
    yield Ahead("first_of_maximum", kernels.first_of_maximum, first, padded)
    weigh = {**logits, "temperature_ptr": "*fp32", "maxima_ptr": "*fp32", "keys_ptr": "*i32", "masses_ptr": "*i64"}
    for by_digit in (False, True):
        yield Ahead(f"weigh {by_digit}", kernels.weigh, weigh, {"BY_DIGIT": by_digit, **padded})
    inputs = {"keys_ptr": "*i32", "top_p_ptr": "*fp32", "uniform_ptr": "*fp32", "first_masses_ptr": "*i64"}
    state = {"masses_ptr": "*i64", "state_ptr": "*i64"}
    refine = {**inputs, **state, "next_masses_ptr": "*i64", "next_state_ptr": "*i64"}
    shift = kernels.BITS.value * (DIGITS - 2)
    yield Ahead("refine first", kernels.refine, refine, {"SHIFT": shift, "NUCLEUS": True, "DRAW": False})
    yield Ahead("refine draw", kernels.refine, refine, {"SHIFT": shift, "NUCLEUS": False, "DRAW": True})
    yield Ahead("refine last", kernels.refine, refine, {"SHIFT": 0, "NUCLEUS": False, "DRAW": False})
    count = {"keys_ptr": "*i32", **state, "next_state_ptr": "*i64", "counts_ptr": "*i64"}
    yield Ahead("count", kernels.count, count, {})
    equal = {"keys_ptr": "*i32", "state_ptr": "*i64", "counts_ptr": "*i64", "tokens_ptr": "*i64", "chunks": "i32"}
    yield Ahead("pick_equal", kernels.pick_equal, equal, padded)
    pick = {"keys_ptr": "*i32", "uniform_ptr": "*fp32", "masses_ptr": "*i64", "tokens_ptr": "*i64", "chunks": "i32"}
    yield Ahead("pick", kernels.pick, pick, padded)


def test_kernels_compile_without_spills_and_read_tokens_four_at_a_time() -> None:
    compiled = compiled_kernels(__name__)
    assert len(compiled) == 20
    for name, kernel in compiled.items():
        assert kernel.spills == 0, name
        assert "ld.global.v4" in kernel.ptx, name
