"""Several completions of one prompt, the likeliest of them, and the likeliest tokens at each place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama import Llama
from tests.models import one_pass, random_tokens

PROMPTS = random_tokens(2, 9, vocab_size=256, seed=8).tolist()
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3}


def test_the_first_of_several_completions_is_the_only_one_of_a_call_for_one(llama: Llama) -> None:
    """Nor does a completion depend on how many there are, or on the other prompts."""
    one, _ = llama.generate(PROMPTS, 12, **SAMPLING)
    three, _ = llama.generate(PROMPTS, 12, n=3, **SAMPLING)
    two, _ = llama.generate(PROMPTS, 12, n=2, **SAMPLING)
    assert [three[0], three[3]] == one
    assert [*three[0:2], *three[3:5]] == two
    assert len({tuple(tokens) for tokens in three}) == 6


def test_the_likeliest_completions_are_kept(llama: Llama) -> None:
    """By the mean log-probability of their tokens under the model, computed in one pass over each text."""
    made, _ = llama.generate(PROMPTS[:1], 6, n=5, **SAMPLING)

    @torch.inference_mode()
    def mean_logprob(tokens: list[int]) -> float:
        text = torch.tensor([PROMPTS[0] + tokens])
        logits = one_pass(llama.model, text)[0].log_softmax(-1)
        scores = [float(logits[len(PROMPTS[0]) - 1 + i, token]) for i, token in enumerate(tokens)]
        return sum(scores) / len(scores)

    best, scores = llama.generate(PROMPTS[:1], 6, n=2, best_of=5, **SAMPLING)
    assert best == sorted(made, key=mean_logprob, reverse=True)[:2]
    assert scores is None
    predictions = llama.text_completion(["ab", "cd"], 1.0, 1.0, 4, seed=3, n=2, best_of=3)
    assert len(predictions) == 4 and "logprobs" not in predictions[0]


@torch.inference_mode()
def test_the_likeliest_tokens_are_those_of_the_raw_logits(llama: Llama) -> None:
    """Whatever temperature and top_p are, and in rows that ask for different numbers of them."""
    events = [list(llama.stream([prompt], 5, 1.5, 0.3, seed=1, top_logprobs=k)) for prompt, k in zip(PROMPTS, (3, 1))]  # noqa: B905
    for prompt, k, found in zip(PROMPTS, (3, 1), events, strict=True):
        text = list(prompt)
        for event in found[:-1]:
            logits = one_pass(llama.model, torch.tensor([text]))[0, -1].log_softmax(-1)
            values, ids = logits.topk(k)
            assert [token for token, _ in event.top_logprobs] == ids.tolist()
            assert [score for _, score in event.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
            assert event.token is not None and event.logprob == pytest.approx(float(logits[event.token]), abs=1e-4)
            text.append(event.token)


def test_predictions_name_the_likeliest_tokens(llama: Llama) -> None:
    [prediction] = llama.text_completion(["ab"], 0, max_gen_len=2, top_logprobs=2)
    assert "logprobs" not in prediction
    top = prediction["top_logprobs"]
    assert [len(each) for each in top] == [2, 2]
    assert [each[0]["token"] for each in top] == prediction["tokens"]  # greedy
    assert top[0][0]["logprob"] >= top[0][1]["logprob"]
    assert top[0][0]["id"] == llama.generate(llama.encode_prompts(["ab"]), 1, 0)[0][0][0]


def test_the_prompt_says_nothing_about_which_completion_is_likeliest(llama: Llama) -> None:
    """Its scores, which echo adds, once counted: the shorter completions had more of them in their means."""
    options: dict[str, Any] = {**SAMPLING, "best_of": 6, "n": 2, "stop_token_ids": list(range(200))}
    for prompt in PROMPTS:
        plain, _ = llama.generate([prompt], 12, **options)
        echoed, _ = llama.generate([prompt], 12, logprobs=True, echo=True, **options)
        assert [tokens[len(prompt) :] for tokens in echoed] == plain


def test_a_completion_without_tokens_is_not_the_likeliest(llama: Llama) -> None:
    """Its mean was 0, which is above all others."""
    made, _ = llama.generate(PROMPTS, 12, n=8, stop_token_ids=list(range(250)), **SAMPLING)
    best, _ = llama.generate(PROMPTS, 12, best_of=8, stop_token_ids=list(range(250)), **SAMPLING)
    assert [] in made[:8] and [] in made[8:]
    assert all(best)
