"""What a job reads: lines of files and pipes, shared out among replicas, and what each asks for."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama.jobs.finished import FinishedLines, line_digest
from llama.jobs.line_forms import LineResult
from llama.jobs.lines import BUNDLE_LINES, NO_BUNDLE, InputLine, JobInput, deal, read_ahead, read_now
from llama.jobs.openai_form import line_form
from llama.sampling import SamplingParams

DEFAULTS = SamplingParams(temperature=0.5, max_gen_len=9)
DIGEST = line_digest(DEFAULTS)


def read(tmp_path: Path, content: bytes, name: str = "in.jsonl", is_text: bool = False) -> tuple[list[InputLine], bool]:
    path = tmp_path / name
    path.write_bytes(content)
    source = JobInput(path, is_text)
    return list(source), source.is_json


def test_lines_have_their_number_in_the_file_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    lines, is_json = read(tmp_path, b'\xef\xbb\xbf"a"\r\n\n  \t\n"b"\n"c"')
    assert lines == [(0, b'"a"', 8), (3, b'"b"', 17), (4, b'"c"', 20)]
    assert is_json


@pytest.mark.parametrize(
    ("name", "content", "is_json"),
    [
        ("in.jsonl", b"x", True),
        ("in.txt", b'{"prompt": "x"}', False),
        ("in", b'\n{"prompt": "x"}', True),
        ("in", b'"x"', True),
        ("in", b"x\n{", False),
    ],
)
def test_the_name_or_else_the_first_line_says_what_lines_are(
    name: str, content: bytes, is_json: bool, tmp_path: Path
) -> None:
    assert read(tmp_path, content, name)[1] is is_json
    assert read(tmp_path, content, name, is_text=True)[1] is False


def test_lines_are_read_when_they_are_asked_for() -> None:
    """Ten million lines take no memory."""
    asked = []

    def endless() -> Iterator[InputLine]:
        for number in range(sys.maxsize):
            asked.append(number)
            yield InputLine(number, b"x", 0)

    next_line = read_now(FinishedLines("out").unfinished(endless(), DIGEST))
    assert [next_line(True) for _ in range(3)] == [InputLine(number, b"x", 0) for number in range(3)]
    assert asked == [0, 1, 2]


def test_a_slow_pipe_holds_nobody_who_has_something_to_do() -> None:
    may_go_on = threading.Event()

    def slow() -> Iterator[InputLine]:
        yield InputLine(0, b"a", 1)
        may_go_on.wait()
        yield InputLine(1, b"b", 2)
        raise OSError("gone")

    next_line = read_ahead(slow())
    assert next_line(True) == (0, b"a", 1)
    assert next_line(False) is None
    may_go_on.set()
    assert next_line(True) == (1, b"b", 2)
    with pytest.raises(OSError, match="gone"):
        next_line(True)


def test_replicas_get_every_line_once_and_a_slow_one_holds_nobody() -> None:
    lines = [InputLine(number, b"x", 0) for number in range(10 * BUNDLE_LINES + 3)]
    taken = iter(range(NO_BUNDLE))
    replicas = [deal(lines, lambda: next(taken)) for _ in range(3)]
    slow = [next(replicas[0]).number]
    fast = [line.number for line in replicas[1]]
    late = [line.number for line in replicas[2]]
    slow += [line.number for line in replicas[0]]
    assert slow == list(range(BUNDLE_LINES)) and late == []
    assert fast == list(range(BUNDLE_LINES, len(lines)))


def test_replicas_end_where_there_is_to_be_no_other_bundle() -> None:
    bundles = iter([1, NO_BUNDLE])

    def lines() -> Iterator[InputLine]:
        for number in range(3 * BUNDLE_LINES):
            assert number <= 2 * BUNDLE_LINES, "the rest is read for nothing"
            yield InputLine(number, b"x", 0)

    assert len(list(deal(lines(), lambda: next(bundles)))) == BUNDLE_LINES


def request(line: str, is_json: bool = True) -> tuple[SamplingParams, Any]:
    found = line_form(line.encode(), is_json, 3, "model").request(DEFAULTS)
    return found.params, found.prompt or found.messages or found.tokens


def test_a_line_is_a_text_or_an_object_with_options_of_its_own() -> None:
    assert request('{"prompt": 1}', is_json=False) == (DEFAULTS, '{"prompt": 1}')
    assert request('"Hi\\n"') == (DEFAULTS, "Hi\n")
    line = {"prompt": "Hi", "id": [1], "temperature": 0, "max_gen_len": None, "seed": 4, "logprobs": True, "echo": True}
    assert request(json.dumps(line)) == (SamplingParams(0, 0.9, None, 4, True, True), "Hi")
    assert request('{"tokens": [1, 2], "stop_token": 5, "top_p": 1}') == (
        SamplingParams(0.5, 1, 9, stop_token=5),
        [1, 2],
    )
    assert request('{"messages": [{"role": "user", "content": "Hi"}]}')[1] == [{"role": "user", "content": "Hi"}]


def test_a_line_of_openais_has_its_field_names() -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 7, "n": 1}
    chat |= {"stop": None, "seed": 3, "temperature": None, "logprobs": False, "user": "u", "frequency_penalty": 0.0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    assert request(json.dumps(line)) == (SamplingParams(0.5, 0.9, 7, 3), chat["messages"])
    text = {"prompt": "Hi", "max_tokens": 5, "top_p": 1, "logprobs": 0, "echo": True}
    line = {"custom_id": "a", "url": "/v1/completions", "body": text}
    assert request(json.dumps(line)) == (SamplingParams(0.5, 1, 5, None, True, True), "Hi")
    assert request('{"custom_id": "a", "body": {"prompt": [1, 2]}}') == (DEFAULTS, [1, 2])


OPENAI = '{"custom_id": "a", "body": {"prompt": "x", %s}}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x"', "not JSON"),
        ('{"prompt": NaN}', "NaN is no JSON"),
        ("[" * 100000, "nested too deep"),
        ("7", "a text or an object, got 7"),
        ("{}", "one of prompt, messages, tokens, this one has none"),
        ('{"prompt": "x", "tokens": [1]}', "has prompt and tokens"),
        ('{"prompt": 7}', "prompt must be a text, got 7"),
        ('{"messages": "x"}', "messages must be a list, got 'x'"),
        ('{"prompt": "x", "temprature": 1}', "'temprature': did you mean temperature?"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature must be a number"),
        ('{"prompt": "x", "max_gen_len": -1}', "max_gen_len must be an integer"),
        ('{"custom_id": "a"}', "body must be an object, got None"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url must be /v1/chat/completions or"),
        ('{"custom_id": "a", "method": "GET", "body": {}}', "method must be POST"),
        ('{"custom_id": "a", "body": {}, "prompt": "x"}', "unknown fields 'prompt' beside"),
        (OPENAI % '"n": 0', "n must be an integer of at least 1, got 0"),
        ('{"prompt": "x", "logprobs": "no"}', "logprobs must be true or false, got 'no'"),
        (OPENAI % '"echo": 1', "echo must be true or false, got 1"),
        ('{"prompt": "x", "ignore_eos": "no"}', "ignore_eos must be true or false, got 'no'"),
        ('{"custom_id": "a", "body": {"messages": [], "top_logprobs": 2}}', "top_logprobs must come with logprobs"),
        (OPENAI % '"stop": [""]', "stop must be a text or a list of texts, none of them empty"),
        (OPENAI % '"logprobs": true', "logprobs must be a number, got True"),
        (OPENAI % '"response_format": {"type": "xml"}', "response_format must have the type text, json_object, or"),
        (OPENAI % '"surprise": 3', "unknown field 'surprise' in body"),
        (OPENAI % '"temperature": 1e300', "temperature must be a number"),
    ],
)
def test_a_wrong_line_is_told_what_is_wrong(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        request(line)


def test_answers_have_the_shape_that_their_lines_have() -> None:
    prediction: Any = {"generation": "é!", "tokens": ["é", "!"], "logprobs": [-1.0, -2.0], "finish_reason": "length"}
    result = LineResult([prediction], 5, 2)
    plain = line_form(b'{"prompt": "x", "id": {"a": 1}}', True, 3, "model")
    assert plain.result(result) == {
        "id": {"a": 1}, "generation": "é!", "finish_reason": "length", "prompt_tokens": 5, "completion_tokens": 2,
        "tokens": ["é", "!"], "logprobs": [-1.0, -2.0],
    }  # fmt: skip
    assert plain.error("why") == {"id": {"a": 1}, "error": "why"}
    chat = line_form(b'{"custom_id": "c", "body": {"messages": []}}', True, 3, "model")
    answer = chat.result(result)
    body = answer["response"]["body"]
    assert (answer["custom_id"], answer["error"], answer["response"]["status_code"]) == ("c", None, 200)
    assert (body["object"], body["model"]) == ("chat.completion", "model")
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "é!" and choice["finish_reason"] == "length"
    first = choice["logprobs"]["content"][0]
    assert first == {"token": "é", "logprob": -1.0, "bytes": [195, 169], "top_logprobs": []}
    text = line_form(b'{"custom_id": "c", "body": {"prompt": "x", "model": "m"}}', True, 3, "model")
    body = text.result(result)["response"]["body"]
    assert (body["object"], body["model"], body["choices"][0]["text"]) == ("text_completion", "m", "é!")
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    refused = text.error("why")
    assert (refused["custom_id"], refused["response"], refused["error"]["message"]) == ("c", None, "why")
