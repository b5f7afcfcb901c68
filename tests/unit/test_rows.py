"""Rows of a table: each is completed as a call of its own would, whatever it comes with, and a wrong one says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.integrations.rows import check_columns, complete_rows
from llama.sampling import SamplingParams
from tests.models import build

PARAMS = SamplingParams(temperature=0.9, max_gen_len=6, seed=3)
PROMPTS = [f"prompt {i} {'.' * i}" for i in range(9)]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Llama:
    return build(tiny_folder, max_seq_len=64, max_batch_size=4, chat_format="llama3")


def complete(llm: Llama, *rows: dict[str, Any], params: SamplingParams = PARAMS) -> list[dict[str, Any]]:
    return complete_rows(llm, rows, params)


def test_a_row_is_completed_as_in_one_call_with_all_rows(llm: Llama) -> None:
    """Its random numbers are those of its index, wherever it lies: a part of the rows, in another order, is alike."""
    whole = llm.text_completion(PROMPTS, 0.9, max_gen_len=6, logprobs=True, seed=3)
    params = SamplingParams(temperature=0.9, max_gen_len=6, seed=3, logprobs=True)
    for order in ([7, 2, 5], [5], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        results = complete(llm, *({"index": i, "prompt": PROMPTS[i]} for i in order), params=params)
        for i, result in zip(order, results, strict=True):
            assert result["generation"] == whole[i]["generation"]
            assert result["finish_reason"] == whole[i]["finish_reason"]
            assert result["logprobs"] == pytest.approx(whole[i]["logprobs"], abs=1e-5)
            assert (result["prompt_tokens"], result["completion_tokens"]) == (
                len(PROMPTS[i]) + 1,
                len(whole[i]["tokens"]),
            )


def test_a_row_may_choose_for_itself(llm: Llama) -> None:
    """Where a column is null the job's value holds: rows with different parameters once had to be separate jobs."""
    own: list[dict[str, Any]] = [{}, {"temperature": 2.0}, {"top_p": 0.3, "temperature": None}, {"seed": 99}]
    own += [{"max_gen_len": 2}, {"max_gen_len": 0}, {"temperature": 0.0}]
    results = complete(llm, *({"index": i, "prompt": PROMPTS[i], **each} for i, each in enumerate(own)))
    for i, (each, result) in enumerate(zip(own, results, strict=True)):
        chosen = {name: value for name, value in each.items() if value is not None}
        values: dict[str, Any] = {"temperature": 0.9, "max_gen_len": 6, "seed": 3, **chosen}
        expected = llm.text_completion(PROMPTS, **values)[i]
        assert (result["generation"], result["completion_tokens"]) == (
            expected["generation"],
            len(expected["tokens"]),
        ), each


def test_prompts_messages_and_tokens_can_be_mixed(llm: Llama) -> None:
    dialog: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with_nulls = [{**message, "tool_calls": None} for message in dialog]
    tokens = llm.encode_prompts(["Hi"])[0]
    text, answer, same_text = complete(
        llm,
        {"index": 0, "prompt": "Hi", "messages": None},
        {"index": 0, "prompt": None, "messages": with_nulls},
        {"index": 0, "tokens": tokens},
    )
    assert text == same_text
    [expected] = llm.chat_completion([dialog], 0.9, max_gen_len=6, seed=3)
    assert answer["generation"] == expected["generation"]["content"] != text["generation"]
    assert answer["prompt_tokens"] == len(llm.encode_dialogs([dialog])[0])


def test_a_model_that_is_given_no_seed_uses_its_own(llm: Llama) -> None:
    """Ray repeats what an actor had begun, and a sequence of seeds that goes on would give another text then."""
    params = SamplingParams(temperature=0.9, max_gen_len=6)
    [first], [again] = (complete(llm, {"index": 4, "prompt": PROMPTS[4]}, params=params) for _ in range(2))
    assert first == again
    assert first["generation"] == llm.text_completion(PROMPTS, 0.9, max_gen_len=6, seed=llm.seed)[4]["generation"]


@pytest.mark.parametrize(
    "row, error",
    [
        ({"index": 0}, "a row has one of prompt, messages, tokens, got none"),
        ({"index": 0, "prompt": "x", "tokens": [1]}, "got prompt and tokens"),
        ({"index": None, "prompt": "x"}, "index must be an integer, got None"),
        ({"index": 0, "prompt": 5}, "must be a list of texts"),
        ({"index": 0, "prompt": "x" * 99}, "the prompt has 100 tokens, max_seq_len is 64"),
        ({"index": 0, "tokens": []}, "has no tokens"),
        ({"index": 0, "tokens": [512]}, "ids are integers, 0 to 511"),
        ({"index": 0, "messages": []}, "at least one message"),
        ({"index": 0, "messages": ["Hi"]}, "message 0 is 'Hi'"),
        ({"index": 0, "prompt": "x", "temperature": -1.0}, "temperature must be a number from 0"),
        ({"index": 0, "prompt": "x", "max_gen_len": 1.5}, "max_gen_len must be an integer"),
    ],
)
def test_a_wrong_row_has_an_error_and_the_others_go_on(llm: Llama, row: dict[str, Any], error: str) -> None:
    """One prompt that is too long, in the last hour of a job, shall not end it."""
    right = {"index": 1, "prompt": PROMPTS[1]}
    wrong, result = complete(llm, row, right)
    assert error in wrong.pop("error") and not wrong
    assert [result] == complete(llm, right)


def test_columns_that_no_row_can_be_run_by_are_an_error(llm: Llama) -> None:
    check_columns(["prompt", "index", "url"])
    with pytest.raises(ValueError, match="rows need an index and one of prompt, messages, tokens, got prompt, url"):
        check_columns(["url", "prompt"])
    with pytest.raises(ValueError, match="got index, text: rename"):
        check_columns(["index", "text"])
    with pytest.raises(ValueError, match="rows have error already"):
        check_columns(["index", "prompt", "error"])
