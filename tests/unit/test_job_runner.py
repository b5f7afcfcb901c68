"""Lines on an engine: each gets what it asks for, by the random numbers of its number, whatever runs beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama import Llama
from llama.engine import room
from llama.jobs.finished import line_digest
from llama.jobs.lines import BUNDLE_LINES, InputLine, read_now
from llama.jobs.run import JobOptions, LineRunner
from llama.memory.estimate import BatchShape
from llama.sampling import SamplingParams

DIGEST = line_digest(SamplingParams())
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_gen_len": 3}


class Job:
    """What a runner writes for lines, with the model of the tests."""

    def __init__(self, llm: Llama, lines: list[Any], temperature: float = 0.9, **options: Any) -> None:
        contents = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.options = JobOptions(SamplingParams(temperature, 1.0, 6, seed=3), DIGEST, "model", **options)
        self.order: list[int] = []
        self.counts: list[tuple[int, bool]] = []
        self.results: dict[int, dict[str, Any]] = {}
        runner = LineRunner(llm, llm.engine, self.options, self.write, self.count)
        runner.run(read_now(InputLine(number, content, 0) for number, content in enumerate(contents)), lambda: True)

    def count(self, n_tokens: int, is_error: bool) -> None:
        self.counts.append((n_tokens, is_error))

    def write(self, number: int, line: bytes) -> None:
        self.order.append(number)
        self.results[number] = json.loads(line)
        assert line.endswith(b"\n") and self.results[number]["index"] == number


def test_lines_get_what_each_asks_for(llama: Llama) -> None:
    """The random numbers are those of the line's number, whatever ran before."""
    lines = ["abc", {"prompt": "abc"}, {"tokens": [97, 98], "max_gen_len": 0}, QUESTION, {"prompt": "abc", "seed": 4}]
    lines += [{"prompt": "ab", "logprobs": True, "echo": True, "max_gen_len": 2, "id": "x"}]
    found = Job(llama, lines).results
    texts = llama.text_completion(["abc", "abc"], 0.9, 1.0, 6, seed=3)
    assert [found[i]["generation"] for i in (0, 1)] == [each["generation"] for each in texts]
    assert found[0]["generation"] != found[1]["generation"]
    assert (found[2]["generation"], found[2]["completion_tokens"], found[2]["finish_reason"]) == ("", 0, "length")
    assert found[3]["prompt_tokens"] == len(llama.encode_dialogs([QUESTION["messages"]])[0])
    assert found[4]["generation"] == llama.text_completion(["abc"] * 5, 0.9, 1.0, 6, seed=4)[4]["generation"]
    echoed = found[5]
    assert (echoed["id"], echoed["prompt_tokens"], echoed["completion_tokens"]) == ("x", 3, 2)
    assert len(echoed["logprobs"]) == len(echoed["tokens"]) == 5


def test_a_line_that_cannot_be_completed_has_an_error_and_the_job_goes_on(llama: Llama) -> None:
    lines = [b"{", {"prompt": "x" * 100, "id": 7}, {"tokens": [99999]}, {"tokens": []}, {"messages": [{}]}, "a"]
    job = Job(llama, lines)
    words = ["not JSON", "the prompt has 101 tokens, max_seq_len is 64", "token 99999", "no tokens", "message 0 is"]
    assert [word in job.results[i]["error"] for i, word in enumerate(words)] == [True] * 5
    assert job.results[1]["id"] == 7 and job.results[5]["completion_tokens"] == 6
    assert sorted(job.counts) == [(0, True)] * 5 + [(6, False)]
    job = Job(llama, ["a", {"prompt": "a", "banned_tokens": list(range(512))}])
    assert job.results[1]["error"].startswith("no token can come after 2 tokens: ")  # and no number but the line's
    with pytest.raises(ValueError, match=r"line 2 of the input \(index 1\): the prompt has 101 tokens"):
        Job(llama, ["a", *lines[1:]], strict=True)


def test_a_line_whose_later_completions_have_no_memory_has_one_result(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first went on, and its end wrote a second result of the line, with which no job could be resumed."""

    def limit(model: Any, shape: BatchShape, *args: Any) -> int:
        if shape.bsz > 1:
            raise ValueError("no memory for two rows")
        return 100

    monkeypatch.setattr(room, "page_limit", limit)
    job = Job(llama, [{"prompt": "a", "n": 3}])
    assert job.order == [0] and job.results[0]["error"] == "no memory for two rows"
    assert job.counts == [(0, True)] and llama.engine.unfinished == 0


def test_results_come_as_they_end_or_in_order(llama: Llama) -> None:
    lines: list[Any] = [{"prompt": "a", "max_gen_len": 40}, {"prompt": "b", "max_gen_len": 1}, b"{", "c"]
    llama.tokenizer.stop_tokens = frozenset()
    as_they_end, ordered = Job(llama, lines), Job(llama, lines, ordered=True)
    assert as_they_end.order[-1] == 0 and ordered.order == [0, 1, 2, 3]
    assert as_they_end.results == ordered.results


def test_no_more_lines_are_read_than_can_run_soon(llama: Llama) -> None:
    """The engine has a bounded number of requests, however many lines there are."""
    most, read_lines = 0, 0

    def lines() -> Iterator[InputLine]:
        nonlocal read_lines
        for number in range(200):
            read_lines += 1
            yield InputLine(number, b'{"prompt": "a", "max_gen_len": 2}', 0)

    written: list[int] = []

    def write(number: int, line: bytes) -> None:
        nonlocal most
        written.append(number)
        most = max(most, read_lines - len(written))

    options = JobOptions(SamplingParams(), DIGEST, "model")
    LineRunner(llama, llama.engine, options, write, lambda n, is_error: None).run(read_now(lines()), lambda: True)
    assert len(written) == 200 and most <= llama.model.args.max_batch_size + BUNDLE_LINES
