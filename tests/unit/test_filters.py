"""Tokens are left out as by transformers' warpers and llama.cpp's samplers, in the order of SamplingParams."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.sampling import INVALID, XTC_STREAM, FilterTensors, SamplingParams, SamplingTensors, TorchSampler, uniforms

LLAMA_CPP = json.loads((Path(__file__).parent / "llama_cpp_samplers.json").read_text(encoding="utf-8"))["filters"]
# Dyadic, so that every sum is exact in fp32; the order is none.
PROBS = torch.tensor([0.0625, 0.5, 0.0, 0.125, 0.25, 0.0625])


def filtered(logits: Tensor, params: list[SamplingParams], xtc_uniform: Tensor | None = None) -> Tensor:
    filters = FilterTensors.of(params, "cpu")
    assert filters is not None
    return TorchSampler().filter(logits, filters, SamplingTensors.of(params, "cpu").temperature, xtc_uniform)


def kept(logits: Tensor, xtc_uniform: float = 0.0, **options: Any) -> list[list[int]]:
    """The tokens that stay of each row, which hold their logits."""
    found = filtered(logits, [SamplingParams(**options)] * len(logits), torch.full((len(logits),), xtc_uniform))
    assert torch.equal(found, logits.where(found > -math.inf, -math.inf))
    return [row.isfinite().nonzero()[:, 0].tolist() for row in found]


def some_rows(vocab_size: int) -> Tensor:
    """Peaked, flat, full of ties, and one token nearly certain."""
    generator = torch.Generator().manual_seed(vocab_size)
    rows = torch.randn(4, vocab_size, generator=generator) * torch.tensor([[4.0], [0.3], [3.0], [1.0]])
    rows[2] = rows[2].bfloat16().float()
    rows[3, vocab_size // 2] = 20
    return rows


@pytest.mark.parametrize("case", LLAMA_CPP["cases"], ids=lambda case: f"{case['row']} {case['params']}")
def test_the_tokens_that_llama_cpp_keeps_are_kept(case: dict[str, Any]) -> None:
    assert kept(torch.tensor([LLAMA_CPP["rows"][case["row"]]]), **case["params"]) == [case["kept"]]


@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "top_p": 1.0},
        {"top_k": 40, "top_p": 0.8},
        {"min_p": 0.1, "top_p": 0.9},
        {"typical_p": 0.5, "top_p": 1.0},
        {"typical_p": 0.9, "top_p": 0.95},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.7},
        {"top_k": 600, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    ],
    ids=str,
)
def test_the_tokens_that_transformers_keep_are_kept(vocab_size: int, options: dict[str, Any]) -> None:
    """In transformers' own order of warpers; of tokens that tie it keeps more, so here none do."""
    from transformers.generation import logits_process as hf

    logits = some_rows(vocab_size)[[0, 1, 3]]
    no_ids: Any = None  # these look at scores alone
    scores = logits / 0.8
    if top_k := options.get("top_k"):
        scores = hf.TopKLogitsWarper(top_k)(no_ids, scores)
    scores = hf.TopPLogitsWarper(options["top_p"])(no_ids, scores)
    if min_p := options.get("min_p"):
        scores = hf.MinPLogitsWarper(min_p)(no_ids, scores)
    if typical_p := options.get("typical_p"):
        scores = hf.TypicalLogitsWarper(typical_p)(no_ids, scores)
    expected = [row.isfinite().nonzero()[:, 0].tolist() for row in scores]
    assert kept(logits, temperature=0.8, **options) == expected


@pytest.mark.parametrize(
    ("options", "xtc_uniform", "expected"),
    [
        ({"top_k": 3}, 0, [0, 4 / 7, 0, 1 / 7, 2 / 7, 0]),
        ({"top_k": 4}, 0, [1 / 15, 8 / 15, 0, 2 / 15, 4 / 15, 0]),  # of the two sixteenths the lower id
        ({"min_p": 0.25}, 0, [0, 4 / 7, 0, 1 / 7, 2 / 7, 0]),  # an eighth is exactly a quarter of a half
        # Of 4/7, 2/7, 1/7, mass 4/7 lies before the second.
        ({"top_k": 3, "top_p": 0.6}, 0, [0, 2 / 3, 0, 0, 1 / 3, 0]),
        ({"top_k": 3, "top_p": 0.57}, 0, [0, 1, 0, 0, 0, 0]),
        # Surprises 1, 2, 3, 4, 4 bits, 1.875 expected: the quarter is nearest, then the half, then the eighth.
        ({"typical_p": 0.2}, 0, [0, 0, 0, 0, 1, 0]),
        ({"typical_p": 0.3}, 0, [0, 2 / 3, 0, 0, 1 / 3, 0]),
        ({"typical_p": 0.8}, 0, [0, 4 / 7, 0, 1 / 7, 2 / 7, 0]),
        # 1/2, 1/4 and 1/8 reach the threshold, and the last of them stays with those below.
        ({"xtc_probability": 0.5, "xtc_threshold": 0.125}, 0.49, [1 / 4, 0, 0, 1 / 2, 0, 1 / 4]),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.125}, 0.5, [1 / 16, 1 / 2, 0, 1 / 8, 1 / 4, 1 / 16]),
        # Of equals the highest id is last; a threshold of 0 is reached by all.
        ({"xtc_probability": 1, "xtc_threshold": 0.0}, 0.9, [0, 0, 0, 0, 0, 1]),
        # After top_k the half is four sevenths, and alone above 0.5: nothing goes.
        ({"top_k": 3, "xtc_probability": 1, "xtc_threshold": 0.3}, 0, [0, 4 / 7, 0, 1 / 7, 2 / 7, 0]),
        # Squares as a share: 64, 16, 4 of 84: the temperature comes before.
        ({"top_k": 3, "temperature": 0.5}, 0, [0, 64 / 84, 0, 4 / 84, 16 / 84, 0]),
    ],
    ids=str,
)
def test_draws_have_the_probabilities_worked_out_by_hand(
    options: dict[str, Any], xtc_uniform: float, expected: list[float]
) -> None:
    """Pearson's chi-square, below the value that one seed in ten thousand exceeds."""
    draws, limits = 20_000, (0.0, 15.14, 18.42, 21.11, 23.51)
    params = [SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **options})]
    logits = filtered(PROBS.log()[None] + 3, params, torch.tensor([xtc_uniform]))
    tokens = TorchSampler()(logits.expand(draws, -1), uniforms(7, 0, draws), SamplingTensors.of(params * draws, "cpu"))
    found = (torch.bincount(tokens, minlength=len(PROBS)) / draws).tolist()
    assert [f > 0 for f in found] == [e > 0 for e in expected]
    possible = [(f, e) for f, e in zip(found, expected, strict=True) if e > 0]
    assert sum(draws * (f - e) ** 2 / e for f, e in possible) <= limits[len(possible) - 1]


def test_xtc_acts_as_often_as_is_asked_and_whatever_token_is_drawn() -> None:
    """One number for both would let XTC act where the likeliest tokens are drawn, and never elsewhere."""
    draws = 20_000
    params = [SamplingParams(1.0, 1.0, xtc_probability=0.3, xtc_threshold=0.25)] * draws
    logits = PROBS.log().expand(draws, -1)
    changed = filtered(logits, params, uniforms(7, 0, draws, stream=XTC_STREAM))
    tokens = TorchSampler()(changed, uniforms(7, 0, draws), SamplingTensors.of(params, "cpu"))
    # Without the half, a quarter is half of what is left.
    expected = 0.7 * PROBS + 0.3 * torch.tensor([0.125, 0, 0, 0.25, 0.5, 0.125])
    found = torch.bincount(tokens, minlength=len(PROBS)) / draws
    possible = expected > 0
    assert bool((found[~possible] == 0).all())
    assert (draws * (found - expected)[possible] ** 2 / expected[possible]).sum() < 23.51


def test_the_numbers_of_xtc_are_the_same_for_ever_and_others_than_the_tokens() -> None:
    assert uniforms(1, 0, 2, stream=XTC_STREAM).tolist() == [0.740523099899292, 0.7861348390579224]
    assert uniforms(1, 0, 2, sample=3, stream=XTC_STREAM).tolist() == [0.7440068125724792, 0.663722038269043]
    assert uniforms(1, 0, 3).tolist() == [0.0339774489402771, 0.8865351676940918, 0.8329419493675232]


@pytest.mark.parametrize("vocab_size", [40, 2000])
@pytest.mark.parametrize("top_k", [1, 7, 39, 600])
def test_of_equal_tokens_the_lowest_ids_stay(vocab_size: int, top_k: int) -> None:
    """torch's topk keeps any of them, and transformers all."""
    ties = torch.zeros(2, vocab_size)
    ties[1, 3::5] = -0.0
    assert kept(ties, top_k=top_k, top_p=1.0) == [list(range(min(top_k, vocab_size)))] * 2
    ties[:, 30] = 1
    rest = [token for token in range(vocab_size) if token != 30]
    assert kept(ties, top_k=top_k, top_p=1.0) == [sorted([30, *rest[: top_k - 1]])] * 2


GIVEN: list[dict[str, Any]] = [
    {"temperature": 0, "top_k": 3},
    {"top_p": 0, "min_p": 0.5},
    {"temperature": 0.7},
    {"temperature": 1.1, "top_k": 20},
    {"temperature": 1.3, "top_k": 700, "top_p": 0.99},
    {"min_p": 0.02, "top_p": 1.0},
    {"typical_p": 0.9, "top_p": 1.0},
    {"typical_p": 0.5, "top_k": 40, "xtc_probability": 0.6, "xtc_threshold": 0.01},
]


@pytest.mark.parametrize("chosen", [[3, 7], [2, 3], [0, 1, 2, 3, 4, 5, 6, 7]], ids=str)
def test_a_row_is_filtered_as_if_it_were_alone(chosen: list[int]) -> None:
    """Which of the ways to the same tokens runs depends on the other rows; no bit of a row may."""
    rows = torch.cat([some_rows(2000), torch.zeros(1, 2000)])
    params = [SamplingParams(**GIVEN[at]) for at in chosen for _ in rows]
    logits = rows.repeat(len(chosen), 1)
    numbers = torch.rand(len(params), generator=torch.Generator().manual_seed(3))
    together = filtered(logits, params, numbers)
    for i, each in enumerate(params):
        if FilterTensors.of([each], "cpu") is None:
            assert torch.equal(together[i], logits[i])
        else:
            assert torch.equal(together[i], filtered(logits[i : i + 1], [each], numbers[i : i + 1])[0]), each


def test_rows_that_need_no_filters_have_none_and_others_are_drawn_at_top_p_one() -> None:
    params = [SamplingParams(**options) for options in GIVEN]
    assert FilterTensors.of(params[:3], "cpu") is None
    assert FilterTensors.of([SamplingParams(xtc_probability=1, xtc_threshold=0.6)], "cpu") is None
    assert SamplingTensors.of(params[:3], "cpu").kinds == {"greedy", "nucleus"}
    rows = SamplingTensors.of(params, "cpu")
    assert rows.top_p.tolist() == [pytest.approx(0.9), 0, pytest.approx(0.9), 1, 1, 1, 1, 1]
    assert rows.kinds == {"greedy", "nucleus", "whole"}
    filters = FilterTensors.of(params, "cpu")
    assert filters is not None and filters.kinds == {"none", "top_k", "top_p", "min_p", "typical_p", "xtc"}


@pytest.mark.parametrize("options", GIVEN[3:], ids=str)
def test_rows_that_are_not_numbers_stay_invalid(options: dict[str, Any]) -> None:
    logits = some_rows(1000)
    logits[0, 5], logits[1, 7], logits[2] = math.nan, math.inf, -math.inf
    params = [SamplingParams(**options)] * 4
    numbers = torch.full((4,), 0.5)
    changed = filtered(logits, params, numbers)
    tokens = TorchSampler()(changed, numbers, SamplingTensors.of(params, "cpu")).tolist()
    assert tokens[:3] == [INVALID] * 3 and tokens[3] == 500


@pytest.mark.parametrize("temperature", [1e-30, 1e15])
def test_extreme_temperatures_keep_what_they_should(temperature: float) -> None:
    """Differences overflow at one, and all are equally likely in fp32 at the other, but not equally high."""
    logits = torch.tensor([[-math.inf, 5.0, -5.0, -math.inf, 0.0, 7.0]])
    few = [[5]] if temperature < 1 else [[1, 5]]
    assert kept(logits, temperature=temperature, top_k=2, top_p=1.0) == few
    assert kept(logits, temperature=temperature, min_p=0.5) == ([[5]] if temperature < 1 else [[1, 2, 4, 5]])
    assert kept(logits, temperature=temperature, typical_p=0.6, top_p=1.0) == (
        [[5]] if temperature < 1 else [[1, 4, 5]]
    )
