"""Log-probabilities are those of transformers' logits, for prompts and completions, before any temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama import Llama
from llama.memory.estimate import MAX_SCORED_POSITIONS
from tests.checkpoints import TINY
from tests.hugging_face import hugging_face_model
from tests.models import BYTE_BOS, BYTE_EOS, build, random_tokens

LONG = random_tokens(2 * MAX_SCORED_POSITIONS + 17, vocab_size=TINY.vocab_size).tolist()
PROMPTS = [LONG[:9], LONG[30:31], LONG[40:70], LONG[80:84]]


@pytest.fixture(scope="module")
def theirs(tiny: tuple[Path, dict[str, Tensor]]) -> LlamaForCausalLM:
    return hugging_face_model(TINY, tiny[1])


@pytest.fixture
def ours(tiny_folder: Path) -> Llama:
    return build(tiny_folder, max_seq_len=1024, max_batch_size=3)


@torch.inference_mode()
def expected(model: LlamaForCausalLM, text: list[int]) -> list[float]:
    """Of every token given those before it; 0.0 for the first, which has none before it."""
    scores = torch.log_softmax(model(torch.tensor([text])).logits[0].double(), dim=-1)
    return [0.0] + [float(scores[i, token]) for i, token in enumerate(text[1:])]


def assert_same(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=0, abs=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2.0, "top_p": 0.5}], ids=str)
def test_completions_have_the_scores_of_the_raw_logits(
    ours: Llama, theirs: LlamaForCausalLM, options: dict[str, float]
) -> None:
    """Meta's were those of the temperature of 1, whatever was asked for, and misplaced by one in ragged batches."""
    tokens, scores = ours.generate(PROMPTS, 12, logprobs=True, **options)
    assert scores is not None
    for prompt, row, row_scores in zip(PROMPTS, tokens, scores, strict=True):
        assert_same(row_scores, expected(theirs, prompt + row)[len(prompt) :])


def test_echoed_prompts_are_scored_and_the_first_token_is_zero(ours: Llama, theirs: LlamaForCausalLM) -> None:
    tokens, scores = ours.generate(PROMPTS, 12, temperature=0, logprobs=True, echo=True)
    plain, _ = ours.generate(PROMPTS, 12, temperature=0)
    assert scores is not None
    for prompt, row, row_scores, without in zip(PROMPTS, tokens, scores, plain, strict=True):
        assert row == prompt + without
        assert row_scores[0] == 0.0
        assert_same(row_scores, expected(theirs, row))


def test_prompts_are_scored_where_nothing_is_generated(ours: Llama, theirs: LlamaForCausalLM) -> None:
    tokens, scores = ours.generate(PROMPTS, 0, logprobs=True, echo=True)
    assert tokens == PROMPTS and scores is not None
    for prompt, row_scores in zip(PROMPTS, scores, strict=True):
        assert_same(row_scores, expected(theirs, prompt))


@pytest.mark.parametrize(
    "length",
    [*(MAX_SCORED_POSITIONS + more for more in range(3)), 2 * MAX_SCORED_POSITIONS + 1, len(LONG)],
)
def test_prompts_scored_in_several_parts_miss_no_token(ours: Llama, theirs: LlamaForCausalLM, length: int) -> None:
    tokens, scores = ours.generate([LONG[:length], LONG[:5]], 3, temperature=0, logprobs=True, echo=True)
    assert scores is not None
    for row, row_scores in zip(tokens, scores, strict=True):
        assert_same(row_scores, expected(theirs, row))


def test_an_end_token_in_an_echoed_prompt_cuts_nothing(ours: Llama, theirs: LlamaForCausalLM) -> None:
    """Meta cut the text at the first end token, wherever it was; a dialog has one after every answer."""
    prompt = [BYTE_BOS, *b"one", BYTE_EOS, BYTE_BOS, *b"two"]
    tokens, scores = ours.generate([prompt], 4, temperature=0, logprobs=True, echo=True)
    plain, _ = ours.generate([prompt], 4, temperature=0)
    assert tokens[0] == prompt + plain[0] and len(plain[0]) == 4
    assert scores is not None
    assert_same(scores[0], expected(theirs, tokens[0]))


def test_text_completion_carries_the_same_scores(ours: Llama, theirs: LlamaForCausalLM) -> None:
    result = ours.text_completion(["Hello"], 0, max_gen_len=4, logprobs=True, echo=True)[0]
    tokens = ours.generate([[BYTE_BOS, *b"Hello"]], 4, temperature=0, echo=True)[0][0]
    assert_same(result["logprobs"], expected(theirs, tokens))
    assert len(result["tokens"]) == len(result["logprobs"]) == 10
    assert "logprobs" not in ours.text_completion(["Hello"], 0, max_gen_len=4, echo=True)[0]
