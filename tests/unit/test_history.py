"""Penalties, DRY and biases change logits as in transformers and llama.cpp; drafts that are taken back leave none."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.sampling import SamplingParams, SparseAdjustments, TokenHistory

LLAMA_CPP = json.loads((Path(__file__).parent / "llama_cpp_samplers.json").read_text(encoding="utf-8"))
BYTES = {int(token): text.encode() for token, text in LLAMA_CPP["texts"].items()}
NEUTRAL = (0.0, 1.0, 0.0)


def history(params: SamplingParams, prompt: list[int], completion: list[int], **options: Any) -> TokenHistory:
    made = TokenHistory(prompt, params, **options)
    for token in completion:
        made.push(token)
    return made


def changes(made: TokenHistory) -> dict[int, tuple[float, ...]]:
    """Of each token that is not as it was: what is added, divided by and subtracted."""
    found = made.adjustments()
    if found is None:
        return {}
    rows = zip(found.tokens, found.bias, found.factor, found.subtract, strict=True)
    assert len(set(found.tokens)) == len(found.tokens)
    return {token: values for token, *rest in rows if (values := tuple(rest)) != NEUTRAL}


def adjusted(logits: Tensor, *of_rows: TokenHistory) -> Tensor:
    found = [(row, each) for row, made in enumerate(of_rows) if (each := made.adjustments()) is not None]
    before = logits.clone()
    after = SparseAdjustments.of(found, "cpu").apply(logits) if found else logits
    assert torch.equal(logits, before), "log-probabilities are those of the logits before"
    return after


@pytest.mark.parametrize("case", LLAMA_CPP["penalties"], ids=lambda case: str(case["params"]))
def test_penalties_are_llama_cpps(case: dict[str, Any]) -> None:
    """Its windows were fed as ours count: repetition the whole text, presence and frequency the completion."""
    made = history(SamplingParams(**case["params"]), case["prompt"], case["completion"])
    expected = torch.tensor([case["result"]])
    torch.testing.assert_close(adjusted(torch.tensor([case["logits"]]), made), expected, rtol=1e-6, atol=1e-6)


def test_the_repetition_penalty_is_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    texts = torch.randint(30, (2, 50), generator=torch.Generator().manual_seed(1))
    params = SamplingParams(repetition_penalty=1.3)
    made = [history(params, text[:20], text[20:]) for text in texts.tolist()]
    assert torch.equal(adjusted(logits, *made), RepetitionPenaltyLogitsProcessor(1.3)(texts, logits))


@pytest.mark.parametrize("case", LLAMA_CPP["dry"], ids=lambda case: f"{case['tokens'][:3]} {case['params']}")
def test_dry_is_llama_cpps(case: dict[str, Any]) -> None:
    """Breakers among them, and one that is spread over two tokens."""
    tokens, expected = case["tokens"], {int(token): x for token, x in case["penalties"].items()}
    made = history(SamplingParams(**case["params"]), tokens[:4], tokens[4:], token_bytes=BYTES.__getitem__)
    found = {token: values[2] for token, values in changes(made).items()}
    assert found == pytest.approx(expected, rel=1e-5)


def penalties_by_definition(text: list[int], length: int, last_n: int | None, breakers: set[int]) -> dict[int, int]:
    """How long the longest passage is that each token would go on with, by looking at every place and length."""
    text = text if last_n is None else text[len(text) - min(last_n, len(text)) :]
    longest: dict[int, int] = {}
    for end in range(len(text) - 1):
        for n in range(length, end + 2):
            passage = text[end + 1 - n : end + 1]
            if passage == text[len(text) - n :] and not breakers & set(passage):
                longest[text[end + 1]] = max(n, longest.get(text[end + 1], 0))
    return longest


@pytest.mark.parametrize(("length", "last_n"), [(1, None), (2, None), (3, 15), (2, 6), (2, 0)], ids=str)
def test_dry_finds_every_passage_and_forgets_drafts(length: int, last_n: int | None) -> None:
    """Few different tokens, so that passages overlap themselves; some tokens are pushed and popped again."""
    rng = random.Random(length)
    params = SamplingParams(
        dry_multiplier=1, dry_base=2, dry_allowed_length=length, dry_last_n=last_n, dry_breakers=("xy",)
    )
    made = TokenHistory([], params, token_bytes=lambda token: b"axybc"[token : token + 1])
    text: list[int] = []
    for _ in range(300):
        if text and rng.random() < 0.4:
            made.pop()
            text.pop()
        elif len(text) < 40:
            text.append(rng.choice([0, 0, 0, 1, 2, 3, 4]))
            made.push(text[-1])
        # The breaker ends with a "y" after an "x": no passage reaches over it.
        broken = [-i if i and text[i - 1 : i + 1] == [1, 2] else token for i, token in enumerate(text)]
        longest = penalties_by_definition(broken, length, last_n, {token for token in broken if token < 0})
        expected: dict[int, float] = {}
        for token, n in longest.items():
            kind = 2 if token < 0 else token  # a broken "y" and another are the same token
            expected[kind] = max(2.0 ** (n - length), expected.get(kind, 0))
        assert {token: values[2] for token, values in changes(made).items()} == expected, text


def test_the_history_of_drafts_that_are_taken_back_is_that_of_none() -> None:
    params = SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, penalty_last_n=9,
        dry_multiplier=1, logit_bias={3: -1}, min_tokens=12,
    )  # fmt: skip
    rng = random.Random(4)
    prompt = [rng.randrange(8) for _ in range(12)]
    options: dict[str, Any] = {"end_tokens": [7, 9], "token_bytes": lambda token: b"%d" % token}
    made, completion = TokenHistory(prompt, params, **options), list[int]()
    for _ in range(100):
        if completion and rng.random() < 0.4:
            made.pop()
            completion.pop()
        else:
            completion.append(rng.randrange(8))
            made.push(completion[-1])
        assert changes(made) == changes(history(params, prompt, completion, **options))


def test_biases_bans_and_ends_are_where_and_while_they_should_be() -> None:
    params = SamplingParams(logit_bias={4: 2.5, 5: -1, 6: 3}, banned_tokens=(6, 8), min_tokens=2)
    made = TokenHistory([1, 2, 3], params, end_tokens=[5, 9])
    bans = {6: (-math.inf, 1, 0), 8: (-math.inf, 1, 0)}
    early = {4: (2.5, 1, 0), 5: (-math.inf, 1, 0), 9: (-math.inf, 1, 0)} | bans
    assert changes(made) == early
    made.push(4)
    assert changes(made) == early
    made.push(4)
    assert changes(made) == {4: (2.5, 1, 0), 5: (-1, 1, 0)} | bans, "a bias of its own is an end token's again"
    made.pop()
    assert changes(made) == early
    ignored = history(SamplingParams(ignore_eos=True), [1], [2] * 50, end_tokens=[5, 9])
    assert changes(ignored) == {5: (-math.inf, 1, 0), 9: (-math.inf, 1, 0)}


def test_the_order_is_bias_then_repetition_then_what_is_subtracted() -> None:
    """A bias that lifts a logit over 0 has it divided."""
    params = SamplingParams(logit_bias={0: 3, 1: 0}, repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25)
    made = history(params, [2], [0, 0, 1])
    logits = torch.tensor([[1.0, -1.0, -math.inf, 4.0], [1.0, 1.0, 1.0, 1.0]])
    expected = [[4 / 2 - 1.0, -1 * 2 - 0.75, -math.inf, 4.0], [1.0, 1.0, 1.0, 1.0]]
    assert adjusted(logits, made).tolist() == expected


def test_a_history_is_needed_only_by_what_it_serves() -> None:
    assert not TokenHistory.is_needed(SamplingParams(top_k=5, min_p=0.1, dry_base=3, penalty_last_n=5))
    for options in (
        {"repetition_penalty": 1.1}, {"presence_penalty": -1}, {"frequency_penalty": 1}, {"dry_multiplier": 1},
        {"logit_bias": {1: 1}}, {"banned_tokens": [1]}, {"min_tokens": 1}, {"ignore_eos": True},
    ):  # fmt: skip
        assert TokenHistory.is_needed(SamplingParams(**options))


def test_a_text_of_one_token_costs_no_more_than_the_bound() -> None:
    """Every place of it repeats: the longest passage counts 128 tokens, and its penalty is a number still."""
    made = history(SamplingParams(dry_multiplier=1, dry_base=1.01, dry_breakers=()), [5] * 2000, [])
    assert changes(made)[5][2] == pytest.approx(1.01**126)
    steep = history(SamplingParams(dry_multiplier=1, dry_base=100, dry_breakers=()), [5] * 2000, [])
    assert math.isfinite(changes(steep)[5][2])
