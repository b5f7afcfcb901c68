"""Tokens are drawn with the probabilities that temperature and top_p define, worked out here by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from llama.sampling import (
    INVALID,
    TOP_K_PREFIX,
    SamplingParams,
    SamplingTensors,
    draw,
    log_probs,
    nucleus,
    probabilities,
    sample,
    sample_top_p,
    uniforms,
)

# Dyadic, so that every sum is exact in fp32; the order is none.
PROBS = torch.tensor([0.0625, 0.5, 0.0, 0.125, 0.25, 0.0625])
JUST_BELOW_ONE = 1 - 2**-24


def logits_of(probs: Tensor) -> Tensor:
    return probs.log() + 3.0  # a constant changes nothing


def drawn(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """The tokens of rows that have the same parameters."""
    return sample(logits, uniform, SamplingTensors.of([SamplingParams(temperature, top_p)] * len(logits), "cpu"))


def nucleus_of(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    rows = torch.ones(len(logits))
    return nucleus(probabilities(logits, rows), top_p * rows)


def frequencies(logits: Tensor, temperature: float, top_p: float, draws: int = 200_000) -> list[float]:
    tokens = drawn(logits.expand(draws, -1), temperature, top_p, uniforms(7, 0, draws))
    return (torch.bincount(tokens, minlength=logits.shape[-1]) / draws).tolist()


def assert_drawn_from(found: list[float], expected: list[float], draws: int = 200_000) -> None:
    """Pearson's chi-square, below the value that one seed in a thousand exceeds; impossible tokens never come."""
    limits = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}
    assert [f > 0 for f in found] == [e > 0 for e in expected]
    possible = [(f, e) for f, e in zip(found, expected, strict=True) if e > 0]
    assert sum(draws * (f - e) ** 2 / e for f, e in possible) < limits[len(possible) - 1]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [1 / 16, 1 / 2, 0, 1 / 8, 1 / 4, 1 / 16]),
        # squares, as a share of 1/4 + 1/16 + 1/64 + 2/256
        (0.5, 1.0, [1 / 86, 64 / 86, 0, 4 / 86, 16 / 86, 1 / 86]),
        # mass before: 0 for 1/2, 1/2 for 1/4, 3/4 for 1/8, 7/8 for the first 1/16
        (1.0, 0.8, [0, 4 / 7, 0, 1 / 7, 2 / 7, 0]),
        (1.0, 0.6, [0, 2 / 3, 0, 0, 1 / 3, 0]),
        # the squares' masses are 64/86, 80/86: temperature comes before top_p
        (0.5, 0.9, [0, 0.8, 0, 0, 0.2, 0]),
    ],
)
def test_frequencies_are_those_worked_out_by_hand(temperature: float, top_p: float, expected: list[float]) -> None:
    assert_drawn_from(frequencies(logits_of(PROBS), temperature, top_p), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.5, {1, 4}),  # exactly 0.5 before token 4: it stays
        (0.49999, {1}),
        (0.75, {1, 4, 3}),
        (0.74, {1, 4}),
        (1e-9, {1}),
        (0.9375, {0, 1, 3, 4, 5}),
        (1.0, {0, 1, 3, 4, 5}),
    ],
)
def test_a_token_stays_while_the_mass_before_it_is_at_most_top_p(top_p: float, kept: set[int]) -> None:
    tokens, probs = nucleus_of(logits_of(PROBS)[None], top_p)
    assert {token for token, p in zip(tokens[0].tolist(), probs[0].tolist(), strict=True) if p > 0} == kept


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(scale: float, top_p: float) -> None:
    """Flat distributions hold more tokens than the prefix that is looked at first."""
    vocab_size = 4 * TOP_K_PREFIX
    logits = scale * torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)).double()
    exact = torch.softmax(logits, 0).tolist()
    order = sorted(range(vocab_size), key=lambda token: -exact[token])
    kept, mass = set(), 0.0
    for token in order:
        if mass <= top_p:
            kept.add(token)
        mass += exact[token]
    tokens, probs = nucleus_of(logits.float()[None], top_p)
    found = {token: p for token, p in zip(tokens[0].tolist(), probs[0].tolist(), strict=True) if p > 0}
    if scale == 0.0:  # all are equal, so only how many there are is defined, but for fp32's rounding
        assert abs(len(found) - len(kept)) <= 1
    else:
        assert found.keys() == kept
        assert found == pytest.approx({token: exact[token] for token in kept}, rel=1e-4)


def test_rows_with_different_nuclei_do_not_mix() -> None:
    """One flat row makes the whole batch sort; a peaked one beside it keeps its own nucleus."""
    flat = torch.zeros(4 * TOP_K_PREFIX)
    peaked = flat.clone()
    peaked[1234] = 30.0
    uniform = uniforms(3, 0, 1000)
    tokens = drawn(torch.stack([flat, peaked] * 500), 1.0, 0.9, uniform)
    assert set(tokens[1::2].tolist()) == {1234}
    assert len(set(tokens[0::2].tolist())) > 400, "512 tokens, drawn 500 times, would show some 320"


def test_temperature_zero_takes_the_greatest_whatever_the_rest() -> None:
    logits = logits_of(PROBS).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.3, 0.9, JUST_BELOW_ONE])
    assert drawn(logits, 0, 0.1, uniform).tolist() == drawn(logits, 0.0, 1.0, uniform).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("temperature", [0.6, 1e15])
def test_top_p_zero_takes_the_greatest_as_metas_code_and_openais_api(temperature: float) -> None:
    """It was refused. At a high temperature all are equally likely in fp32, and the likeliest is the greatest still."""
    logits = torch.stack([logits_of(PROBS), logits_of(PROBS).flip(0), torch.zeros(len(PROBS))]).repeat(3, 1)
    uniform = torch.tensor([0.0] * 3 + [0.5] * 3 + [JUST_BELOW_ONE] * 3)
    assert drawn(logits, temperature, 0, uniform).tolist() == [1, 4, 0] * 3


def test_metas_sample_top_p_draws_from_the_nucleus() -> None:
    """Of probabilities 1/2, 1/4, ... and 0.6 two tokens remain, in shares of 2/3 and 1/3; (bsz, 1), as in Meta's."""
    probs = torch.softmax(logits_of(PROBS), 0)
    torch.manual_seed(0)
    tokens = sample_top_p(probs.expand(3000, -1).clone(), 0.6)
    assert tokens.shape == (3000, 1)
    counts = Counter(tokens[:, 0].tolist())
    assert counts.keys() == {1, 4} and abs(counts[1] / 3000 - 2 / 3) < 0.04
    assert set(sample_top_p(probs.expand(20, -1), 0.0)[:, 0].tolist()) == {1}
    torch.manual_seed(0)
    assert sample_top_p(probs.expand(3000, -1).clone(), 0.6).equal(tokens)


@pytest.mark.parametrize("temperature", [1e-8, 1e-38, 5e-324])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float, top_p: float) -> None:
    """Logits of 60 divided by 1e-38 overflow fp32, and 5e-324 is 0 there."""
    logits = torch.tensor([[60.0, -60.0, 61.0, 3.0], [-1e4, -2e4, -1e4 - 1, -math.inf]])
    assert drawn(logits, temperature, top_p, torch.tensor([0.0, JUST_BELOW_ONE])).tolist() == [2, 0]


def test_a_huge_temperature_is_uniform() -> None:
    assert_drawn_from(frequencies(torch.tensor([5.0, -5.0, 0.0]), 1e15, 1.0), [1 / 3] * 3)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_rows_that_are_not_numbers_are_marked_and_spare_the_others(temperature: float, top_p: float) -> None:
    good = torch.full((1000,), -20.0)
    good[17] = 20.0
    bad = [good.clone() for _ in range(4)]
    bad[0][3] = math.nan
    bad[1][999] = math.inf
    bad[2][:] = -math.inf
    bad[3][:] = math.nan
    logits = torch.stack([good, bad[0], good, bad[1], bad[2], good, bad[3]])
    tokens = drawn(logits, temperature, top_p, torch.full((7,), 0.5))
    assert tokens.tolist() == [17, INVALID, 17, INVALID, INVALID, 17, INVALID]


def test_minus_infinity_is_a_token_that_never_comes() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 0.49, 0.51, JUST_BELOW_ONE):
        for top_p in (0.9999, 1.0):
            assert drawn(logits, 1.0, top_p, torch.tensor([uniform])).item() in (1, 3)


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (JUST_BELOW_ONE, 3)], ids=str
)
def test_draw_inverts_the_cumulative_distribution(uniform: float, token: int) -> None:
    """Tokens without probability lie before, between and after those that can come."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert draw((torch.arange(5)[None], probs), torch.tensor([uniform])).tolist() == [token]


def test_a_uniform_just_below_one_never_passes_the_last_possible_token() -> None:
    """In fp64 it is below one, and in fp32 it is one: the last token of the vocabulary, possible or not."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(3 * torch.randn(500, 1000, generator=generator), dim=-1)
    probs[:, 700:] = 0
    tokens = draw((torch.arange(1000).expand(500, -1), probs), torch.full((500,), 1 - 1e-12, dtype=torch.float64))
    assert int(tokens.max()) < 700
    assert bool((probs.gather(1, tokens[:, None]) > 0).all())


def test_uniforms_are_the_same_everywhere_and_for_ever() -> None:
    """A change here changes every text that somebody has published with its seed."""
    assert uniforms(1, 0, 3).tolist() == [0.0339774489402771, 0.8865351676940918, 0.8329419493675232]
    assert uniforms(-5, 12, 3).tolist() == [0.011264622211456299, 0.8631444573402405, 0.7326833009719849]


def test_uniforms_depend_on_nothing_but_seed_and_row() -> None:
    torch.manual_seed(0)
    first = uniforms(1, 0, 100)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(uniforms(1, 0, 100), first)
    state = torch.get_rng_state()
    uniforms(2, 0, 5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"


def test_more_uniforms_begin_with_the_same() -> None:
    """A text would otherwise change with max_gen_len or max_seq_len."""
    longest = uniforms(4, 2, 3000)
    for count in (*range(40), 127, 1000, 2999):
        assert torch.equal(uniforms(4, 2, count), longest[:count])


def test_uniforms_of_seeds_and_rows_are_unrelated() -> None:
    table = torch.stack([uniforms(seed, row, 2000) for seed in range(4) for row in range(4)])
    assert table.min() >= 0 and table.max() < 1
    correlations = torch.corrcoef(table) - torch.eye(16)
    assert correlations.abs().max() < 4.5 / 2000**0.5


def test_log_probs_are_those_of_the_raw_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 50 * torch.randn(3, 7, 11, generator=generator)
    tokens = torch.randint(11, (3, 7), generator=generator)
    for i in range(3):
        for j in range(7):
            row = logits[i, j].double().tolist()
            highest = max(row)
            expected = row[tokens[i, j]] - highest - math.log(sum(math.exp(x - highest) for x in row))
            assert log_probs(logits, tokens)[i, j].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.1}, "temperature .* got -0.1"),
        ({"temperature": math.nan}, "temperature .* got nan"),
        ({"temperature": math.inf}, "temperature .* got inf"),
        ({"temperature": "1"}, "temperature .* got '1'"),
        ({"temperature": True}, "temperature .* got True"),
        ({"temperature": None}, "temperature .* got None"),
        ({"top_p": -1e-9}, r"top_p must be a number from 0 to 1, got -1e-09"),
        ({"top_p": 1.0001}, "top_p .* got 1.0001"),
        ({"top_p": -1}, "top_p .* got -1"),
        ({"top_p": math.nan}, "top_p .* got nan"),
        ({"max_gen_len": -1}, "max_gen_len .* got -1"),
        ({"max_gen_len": 1.5}, "max_gen_len .* got 1.5"),
        ({"max_gen_len": True}, "max_gen_len .* got True"),
        ({"seed": 1.0}, "seed .* got 1.0"),
        ({"seed": "x"}, "seed .* got 'x'"),
        ({"stop_token": "</s>"}, "stop_token must be an integer, got '</s>'"),
        ({"logit_bias": {5: math.inf}}, "logit_bias must give numbers up to 1e.30 for token ids"),
        ({"logit_bias": {5: 10**400}}, "logit_bias must give numbers up to 1e.30 for token ids"),
        ({"stop": "\ud800"}, "stop has half of a surrogate pair"),
        ({"regex": "\ud800"}, "regex has half of a surrogate pair"),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema is no JSON: Object of type set"),
        ({"json_schema": {"const": math.nan}}, "json_schema is no JSON: Out of range"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_the_edges_of_what_is_possible_are_accepted() -> None:
    SamplingParams(temperature=0, top_p=1, max_gen_len=0, seed=-1)
    SamplingParams(temperature=0, top_p=0, stop_token=0)
    SamplingParams(temperature=100.0, top_p=5e-324, max_gen_len=None, seed=2**70)


def test_ties_are_drawn_alike_whatever_the_other_rows_hold() -> None:
    """A flat row once sent the whole batch to another sort, which put equal probabilities in another order."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = 4 * TOP_K_PREFIX
    peaked = (4 * torch.randn(40, vocab_size, generator=generator)).bfloat16().float()  # full of ties
    flat = torch.zeros(1, vocab_size)
    uniform = torch.rand(40, generator=generator)
    alone = torch.cat([drawn(peaked[i : i + 1], 1.0, 0.9, uniform[i : i + 1]) for i in range(40)])
    together = torch.cat(
        [drawn(torch.cat([peaked[i : i + 1], flat]), 1.0, 0.9, uniform[[i, i]])[:1] for i in range(40)]
    )
    assert alone.tolist() == together.tolist()


def test_the_nucleus_is_ordered_by_probability_and_then_by_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0]])
    tokens, probs = nucleus_of(logits.repeat(1, 200), 0.99)
    expected = sorted(range(1000), key=lambda i: (-logits[0, i % 5].item(), i))
    assert tokens[0, : int((probs > 0).sum())].tolist() == expected[: int((probs > 0).sum())]


def test_numbers_may_be_numpys() -> None:
    """np.float32(0.5) was refused as not in [0, 1]."""
    given = SamplingParams(np.float32(0.5), np.float32(0.25), np.int64(2), np.int64(3))
    assert given == SamplingParams(0.5, 0.25, 2, 3)
    assert type(given.seed) is int and type(given.top_p) is float
    with pytest.raises(ValueError, match="max_gen_len must be an integer"):
        SamplingParams(max_gen_len=np.bool_(True))  # type: ignore[arg-type]


def test_rows_with_parameters_of_their_own_get_the_tokens_they_get_alone() -> None:
    """All rows of a batch once had the same; whatever kinds of draws meet, none changes another's by a bit."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 4 * TOP_K_PREFIX, generator=generator).mul(torch.tensor([[4.0], [0.5], [0.0], [4.0]]))
    logits = torch.cat([logits.bfloat16().float(), torch.full_like(logits[:1], math.nan)])
    given = [(0.0, 1.0), (0.7, 0.9), (1.3, 1.0), (0.0, 0.9), (1.0, 0.0), (1e-45, 0.5), (5e-324, 1.0), (2.0, 0.999)]
    params = [SamplingParams(*values) for values in given]
    uniform = torch.rand(5 * len(params), generator=generator)
    rows = logits.repeat_interleave(len(params), 0)
    alone = [
        sample(rows[i : i + 1], uniform[i : i + 1], SamplingTensors.of([params[i % len(params)]], "cpu")).item()
        for i in range(len(rows))
    ]
    together = SamplingTensors.of(params * 5, "cpu")
    assert together.kinds == {"greedy", "nucleus", "whole"}
    assert sample(rows, uniform, together).tolist() == alone
    for one, other in ((0, 1), (1, 2), (0, 2)):  # two kinds at a time
        pair = [i for i in range(len(rows)) if i % len(params) in (one, other)]
        tensors = SamplingTensors.of([params[i % len(params)] for i in pair], "cpu")
        assert len(tensors.kinds) == 2
        assert sample(rows[pair], uniform[pair], tensors).tolist() == [alone[i] for i in pair]
    assert set(alone[-len(params) :]) == {INVALID} and len(set(alone)) > 12


@pytest.mark.parametrize(
    ("temperature", "top_p", "kind"),
    [
        *[(0.0, 1.0, "greedy"), (1.0, 0.0, "greedy"), (5e-324, 1.0, "greedy"), (1.0, 1e-45, "greedy")],
        *[(0.6, 0.9, "nucleus"), (0.6, 1.0, "whole"), (0.6, 1 - 1e-12, "whole")],
    ],
)
def test_a_rows_kind_follows_from_what_its_device_is_told(temperature: float, top_p: float, kind: str) -> None:
    """What fp32 rounds to 0 or to 1 would be another kind beside rows of several kinds than alone."""
    rows = SamplingTensors.of([SamplingParams(temperature, top_p)], "cpu")
    assert rows.kinds == {kind}
    told = rows.temperature.item(), rows.top_p.item()
    assert SamplingTensors.of([SamplingParams(*told)], "cpu").kinds == {kind}
