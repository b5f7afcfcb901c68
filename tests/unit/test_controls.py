"""Penalties, filters and constraints give the same tokens however steps are made, and those that they are to give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from llama import Llama
from llama.engine.speculative import DraftLengthController
from llama.sampling import SamplingParams
from tests.checkpoints import write_model_and_draft
from tests.models import build, one_pass, random_tokens
from tests.unit.test_graphs import build_llama

PROMPTS = [[*b"one two three, one two three, one"], [*b"ab"], random_tokens(17, vocab_size=256, seed=5).tolist()]
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2}
ALL: list[dict[str, Any]] = [
    {"temperature": 0, **PENALTIES, "penalty_last_n": 9},
    {"temperature": 0, "dry_multiplier": 2.0, "dry_allowed_length": 1, "logit_bias": {101: 3.0, 102: -3.0}},
    {"temperature": 1.0, "top_k": 9, "typical_p": 0.7, **PENALTIES},
    {"temperature": 1.0, "min_p": 0.02, "xtc_probability": 0.6, "xtc_threshold": 0.05, "top_p": 0.99},
    {"temperature": 1.0, "min_tokens": 6, "banned_tokens": [101]},
    {"temperature": 0.9, "regex": "[a-z]{2}([0-9]{2}, )*end"},
    {"temperature": 0, "json_schema": '{"type": "array", "items": {"type": "integer", "maximum": 99}}', **PENALTIES},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_model_and_draft(tmp_path_factory.mktemp("controls"))


@torch.inference_mode()
def test_greedy_tokens_under_a_penalty_are_those_of_transformers(llama: Llama) -> None:
    """The whole text again for each token, by its processor."""
    [tokens], _ = llama.generate([PROMPTS[0]], 20, temperature=0, repetition_penalty=1.5)
    penalize, text = RepetitionPenaltyLogitsProcessor(1.5), list(PROMPTS[0])
    for _ in range(20):
        logits = one_pass(llama.model, torch.tensor([text]))[:, -1]
        text.append(int(penalize(torch.tensor([text]), logits).argmax()))
    assert tokens == text[len(PROMPTS[0]) :]
    assert tokens != llama.generate([PROMPTS[0]], 20, temperature=0)[0][0]


@torch.inference_mode()
def test_log_probabilities_are_those_before_any_change(llama: Llama) -> None:
    """While tokens are drawn from what transformers' processors leave, too."""
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 3, "repetition_penalty": 2.0, "seed": 5}
    tokens, scores = llama.generate([PROMPTS[1]], 12, logprobs=True, **options)
    left, text = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0), TopKLogitsWarper(3)]), list(PROMPTS[1])
    assert scores is not None
    for token, score in zip(tokens[0], scores[0], strict=True):
        logits = one_pass(llama.model, torch.tensor([text]))[:, -1]
        assert score == pytest.approx(float(logits.log_softmax(-1)[0, token]), abs=1e-4)
        assert left(torch.tensor([text]), logits.clone())[0, token] > -torch.inf  # type: ignore[arg-type]
        text.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("options", ALL, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("way", ["captured", "lookup", "draft", "captured lookup"])
def test_steps_that_are_captured_or_speculate_give_the_tokens_of_plain_ones(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, way: str, options: dict[str, Any]
) -> None:
    """Draft tokens are pushed to histories and grammars, and popped again; a wrong one may be allowed by neither."""
    monkeypatch.setattr(DraftLengthController, "next_draft_len", lambda self: 4)
    options = {"seed": 3, "max_gen_len": 20, **options}
    speculation: dict[str, Any] = {"speculate": "lookup"} if "lookup" in way else {}
    if way == "draft":
        speculation = {"draft_ckpt_dir": folders["draft"]}
    expected = build_llama(folders["model"]).generate(PROMPTS, logprobs=True, **options)
    llm = build_llama(folders["model"], [] if "captured" in way else None, **speculation)
    found = llm.generate(PROMPTS, logprobs=True, **options)
    assert found[0] == expected[0]
    for row, wanted in zip(found[1] or [], expected[1] or [], strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_a_completion_is_what_its_constraint_allows(llama: Llama) -> None:
    for seed in range(3):
        text = "".join(event.text for event in events_of(llama, regex="[a-c]{3,5}-[0-9]{2}", seed=seed))
        assert re.fullmatch("[a-c]{3,5}-[0-9]{2}", text)
    *_, last = events_of(llama, regex="[a-c]{3,5}-[0-9]{2}", max_gen_len=2)
    assert last.finish_reason == "length"
    *_, last = events_of(llama, regex="[a-c]{3,5}-[0-9]{2}", stop_token=120)
    assert last.finish_reason == "stop"  # by a stop token of the tokenizer: Meta's stop_token may never come


def events_of(llm: Llama, **options: Any) -> list[Any]:
    return list(llm.stream([PROMPTS[1]], **{"max_gen_len": 30, "temperature": 1.0, **options}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logit_bias": {99999: 1.0}}, "logit_bias has token 99999: ids are integers, 0 to "),
        ({"banned_tokens": [-1]}, "banned_tokens has token -1: ids are integers, 0 to "),
        ({"stop_token_ids": [99999]}, "stop_token_ids has token 99999: ids are integers, 0 to "),
        ({"regex": "("}, "regex: invalid regex"),
    ],
)
def test_what_no_completion_can_follow_is_told_at_once(llama: Llama, options: dict[str, Any], words: str) -> None:
    """A wrong expression was once told when the first event was asked for."""
    with pytest.raises(ValueError, match=words):
        llama.stream([PROMPTS[1]], 2, **options)
    with pytest.raises(ValueError, match=words):
        llama.engine.add(PROMPTS[1], SamplingParams(**options))
    assert llama.engine.unfinished == 0


def test_a_request_for_which_nothing_is_left_ends_by_itself(llama: Llama) -> None:
    """And says so; the others go on."""
    vocab = range(llama.model.args.vocab_size)
    with pytest.raises(
        ValueError, match="prompt 0: no token can come after 2 tokens: penalties, biases and its constraint leave none"
    ):
        llama.generate([PROMPTS[1]], 2, banned_tokens=list(vocab))


@pytest.mark.parametrize("way", [{}, {"speculate": "lookup"}], ids=str)
def test_a_grammar_that_cannot_be_followed_further_ends_its_request_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Its error came out of the step of all, on the one of several ranks that follows grammars: the others hung."""
    monkeypatch.setattr(DraftLengthController, "next_draft_len", lambda self: 4)
    engine = build(tiny_folder, max_seq_len=64, **way).engine
    endless = engine.add(
        [97] * 8, SamplingParams(0, max_gen_len=9, grammar='root ::= "a" root', repetition_penalty=1.2)
    )
    other = engine.add(PROMPTS[1], SamplingParams(0, max_gen_len=9, regex="[a-z]{3}"))
    ends, text = dict[int, Any](), ""
    while engine.unfinished:
        for event in engine.step():
            if event.token is None:
                ends[event.index] = event
            elif event.index == other:
                text += event.text
    assert ends[endless].finish_reason == "error"
    assert "no token can come after 9 tokens: the schema or grammar that is asked for cannot" in ends[endless].text
    assert ends[other].finish_reason == "stop" and re.fullmatch("[a-z]{3}", text)


def test_a_request_without_penalties_or_constraint_has_no_controls(llama: Llama) -> None:
    """Filters, stop strings and scores need none, and what nobody asks for costs nothing."""
    request = llama.engine.add(PROMPTS[1], SamplingParams(top_k=5, min_p=0.1, top_logprobs=2, stop=("x",)))
    assert llama.engine.requests[request].controls is None
    llama.engine.cancel(request)
