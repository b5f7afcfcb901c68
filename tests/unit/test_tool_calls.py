"""Calls in what models write: told from text in each form, at whatever places it is cut, and written back alike."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from llama.chat.template import TemplateChat
from llama.chat.tool_calls import LLAMA, MISTRAL, TAGGED, CallForm, ToolCallStream, find_call_form
from llama.tokenizer import Tokenizer
from tests.chat_tokenizers import tokenizer_pair
from tests.tool_templates import TOOL_TEMPLATES

Calls = list[tuple[str, dict[str, Any]]]
A: Calls = [("f", {"a": 1})]
AB: Calls = [("f", {"a": 1}), ("g", {"b": "x"})]

# The form, what a model says, its text (None is all of it), and its calls.
SAID: list[tuple[CallForm, str, str | None, Calls]] = [
    (TAGGED, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", A),
    (TAGGED, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", A),
    (TAGGED, 'Let me look.\n\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "Let me look.", A),
    (
        TAGGED,
        '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"b": "x"}}\n</tool_call>\n',
        "",
        AB,
    ),
    # The end tag may be missing at the end, and spelled in a text.
    (TAGGED, 'Hm. <tool_call>{"name": "f", "arguments": {"a": 1}}', "Hm.", A),
    (TAGGED, '<tool_call>{"name":"f","arguments":{"a":"</tool_call>\n"}}', "", [("f", {"a": "</tool_call>\n"})]),
    (TAGGED, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", A),
    # No calls: they stay text as it is.
    (TAGGED, "a < b <tool_cal l> <tool_call", None, []),
    (TAGGED, '<tool_call>{"name": "f", "arguments": {"a": </tool_call> ', None, []),
    (TAGGED, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, []),
    (TAGGED, '<tool_call>{"name": "f", "arguments": [1]}', None, []),
    (TAGGED, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}', None, []),
    (TAGGED, '{"name": "f", "arguments": {}}', None, []),
    (TAGGED, "Hi, \n there. \n", None, []),
    (TAGGED, "", None, []),
    (
        TAGGED,
        'x <tool_call>no</tool_call> y <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call> z',
        "x <tool_call>no</tool_call> y z",
        A,
    ),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', "", A),
    (MISTRAL, 'Hm.[TOOL_CALLS][{"name":"f","arguments":{"a":1}}, {"name":"g","arguments":{"b":"x"}}]', "Hm.", AB),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", A),
    (MISTRAL, 'Well [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]g{"b": "x"}', "Well", AB),
    (MISTRAL, '[TOOL_CALLS] {"name": "f", "arguments": {"a": 1}}[/TOOL_CALLS]', "", A),
    (MISTRAL, "[TOOL_CALLS] [1, 2]", None, []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f"}, {"name": "g", "arguments": {}}]', None, []),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]{", None, []),
    (MISTRAL, "[TOOL] [", None, []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", A),
    (LLAMA, ' \n{"type": "function", "name": "f", "parameters": {"a": 1}} ', "", A),
    (LLAMA, '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', "", A),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {"b": "x"}}', "", AB),
    (LLAMA, '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": {"b": "x"}}]', "", AB),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", A),
    (LLAMA, 'Searching. <|python_tag|>f.call(a=1)', "Searching.", A),
    (LLAMA, "<|python_tag|>print(1)\nf = 2", "", [("code_interpreter", {"code": "print(1)\nf = 2"})]),
    (LLAMA, "[f(a=1)]", "", A),
    (LLAMA, '[f(a=1), g(b="x")]', "", AB),
    (
        LLAMA,
        r"""[a.b(x=[-1.5, {"k": None}], y='it\'s \d', z=true)]""",
        "",
        [("a.b", {"x": [-1.5, {"k": None}], "y": r"it's \d", "z": True})],
    ),
    (LLAMA, "[f()]", "", [("f", {})]),
    (LLAMA, "[f(1)]", None, []),
    (LLAMA, "[f(a=g())]", None, []),
    (LLAMA, "[f(a=1), 2]", None, []),
    (LLAMA, "[f(**x)]", None, []),
    (LLAMA, "[1, 2] are numbers", None, []),
    (LLAMA, '{"capital": "Paris"}', None, []),
    (LLAMA, '{"name": "Paris"}', None, []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}} is a call', None, []),
    (LLAMA, 'It is {"name": "f", "parameters": {}}', None, []),
    (LLAMA, "<|python_tag|>{", None, []),
    (LLAMA, "{", None, []),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_pair(None, ["<s>", "</s>"])[0]


@pytest.fixture(scope="module")
def chat_of() -> Callable[[str], TemplateChat]:
    return functools.cache(lambda name: TemplateChat(tokenizer_pair(*TOOL_TEMPLATES[name])[0]))


def told(form: CallForm, tokenizer: Tokenizer, pieces: list[str]) -> tuple[str, str, Calls]:
    stream = ToolCallStream(form, tokenizer)
    shown = "".join([stream.push(None, piece) for piece in pieces])
    rest, calls = stream.end()
    return shown, rest, [(each["function"]["name"], each["function"]["arguments"]) for each in calls]


@pytest.mark.parametrize(("form", "said", "text", "calls"), SAID, ids=[said[:40] for _, said, _, _ in SAID])
def test_calls_are_told_wherever_the_text_is_cut(
    form: CallForm, said: str, text: str | None, calls: Calls, tokenizer: Tokenizer
) -> None:
    """What is shown before the end is never taken back: it is the beginning of the text without calls."""
    cuts = [[said], list(said), *[[said[:i], said[i:]] for i in range(1, len(said))]]
    for pieces in cuts:
        shown, rest, found = told(form, tokenizer, pieces)
        assert (shown + rest, found) == (said if text is None else text, calls), pieces


def test_what_is_surely_no_call_is_shown_at_once(tokenizer: Tokenizer) -> None:
    """An answer would come all at once if whatever might be a call were held back to its end."""
    for form, pieces, shown in [
        (TAGGED, ["Hi", " you", " <", "b> x"], ["Hi", " you", "", " <b> x"]),
        (TAGGED, ["Hi", "<tool_", "call>{", "}"], ["Hi", "", "", ""]),
        (LLAMA, ["{", '"na', "tion", '": 1'], ["", "", '{"nation', '": 1']),
        (LLAMA, ["[", "1", ", 2"], ["", "[1", ", 2"]),
        (LLAMA, [" ", "[f", "(", "x"], ["", "", "", ""]),
        (LLAMA, ["[f", " is", " a"], ["", "[f is", " a"]),
        (MISTRAL, ["[", "T", "O", "x"], ["", "", "", "[TOx"]),
    ]:
        stream = ToolCallStream(form, tokenizer)
        assert [stream.push(None, piece) for piece in pieces] == shown


def test_whatever_a_model_writes_ends_in_text_or_calls(tokenizer: Tokenizer) -> None:
    """Deep nesting, long numbers and broken escapes raised errors of the parsers, or warnings."""
    deep = "[" * 100_000
    for hostile in (
        deep,
        "-" * 100_000,
        "{" * 9000,
        '{"a":' * 50_000,
        "9" * 5000,
        '"\\ud800"',
        "\0",
        "f(" * 5000,
        "'\\N{x}'",
    ):
        for form, before in [
            (TAGGED, '<tool_call>{"name": "f", "arguments": {"a": '),
            (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": '),
            (LLAMA, '{"name": "f", "parameters": {"a": '),
            (LLAMA, "[f(a="),
            (LLAMA, "<|python_tag|>x.call(a="),
        ]:
            end = ")]" if "(" in before else "}}"
            shown, rest, calls = told(form, tokenizer, [before + hostile + end])
            assert calls or (shown + rest).endswith(end)
            json.dumps(calls).encode()
    rng = random.Random(0)
    alphabet = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "[", "]", "(", ")"]
    alphabet += ['"name"', ":", '"f"', ",", '"arguments"', '"parameters"', "f", "=", "1", " ", "\n", ".call", "\\"]
    for _ in range(300):
        pieces = rng.choices(alphabet, k=rng.randint(1, 14))
        for form in (TAGGED, MISTRAL, LLAMA):
            shown, rest, calls = told(form, tokenizer, pieces)
            whole = told(form, tokenizer, ["".join(pieces)])
            assert (shown + rest, calls) == (whole[0] + whole[1], whole[2])
            assert calls or shown + rest == "".join(pieces)


def call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


ROUND_TRIPS = [
    [call(0, "weather", city="Paris")],
    [
        call(
            0, "weather", city='Zürich "北京" \\ </tool_call> [ARGS]', days=2, parts=["a", None, True], more={"x": -1.5}
        )
    ],
    [call(0, "weather"), call(1, "f", a="\n")],
]


@pytest.mark.parametrize("calls", ROUND_TRIPS, ids=["one", "odd", "two"])
@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_calls_that_a_template_writes_come_back_and_are_written_alike(
    name: str, calls: list[dict[str, Any]], chat_of: Callable[[str], TemplateChat]
) -> None:
    """The tokens are those of the template's own text; control tokens among them are silent, as in the engine."""
    if name == "llama 3.1":
        calls = calls[:1]  # its template refuses several
    chat = chat_of(name)
    tokenizer = chat.tokenizer
    tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"properties": {}}}}]
    question: dict[str, Any] = {"role": "user", "content": "Hi"}
    prompt = chat.encode([question], tools)
    dialog = [question, {"role": "assistant", "content": "", "tool_calls": calls}]
    whole = chat.encode(dialog, tools)
    # A newline of the header may be part of a longer token.
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    answer = whole[len(list(same)) :]
    stream, decoder = chat.call_stream(tools, prompt), tokenizer.stream_decoder()
    assert stream is not None
    text = ""
    for token in answer:
        if token in tokenizer.stop_tokens:
            break
        text += stream.push(token, "" if token in tokenizer.special_tokens.values() else decoder.push(token))
    rest, found = stream.end()
    assert text + rest == ""
    assert [each["function"] for each in found] == [each["function"] for each in calls]
    back = [{**each, "id": made["id"]} for each, made in zip(found, calls, strict=True)]
    results = [{"role": "tool", "tool_call_id": each["id"], "name": "weather", "content": "[4]"} for each in calls]
    again = [question, {"role": "assistant", "content": text + rest, "tool_calls": back}, *results]
    assert chat.encode(again, tools) == chat.encode([*dialog, *results], tools)


def test_ids_are_the_models_own_or_nine_letters_that_differ(tokenizer: Tokenizer) -> None:
    """Mistral's template refuses ids of another length, and callers find results by them."""
    ids = []
    for prompt in ([1, 2], [1, 2, 3]):
        stream = ToolCallStream(TAGGED, tokenizer, prompt)
        stream.push(None, '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2)
        ids += [each["id"] for each in stream.end()[1]]
    assert len(set(ids)) == 4 and all(len(each) == 9 and each.isalnum() for each in ids)
    stream = ToolCallStream(MISTRAL, tokenizer)
    stream.push(None, '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "xyz"}]')
    assert [each["id"] for each in stream.end()[1]] == ["abc", "xyz"]


def test_the_form_is_told_by_the_template_or_else_by_the_control_tokens() -> None:
    for name, form in {
        "llama 3.1": LLAMA, "qwen": TAGGED, "hermes": TAGGED, "mistral 3": MISTRAL, "mistral 11": MISTRAL,
        "pythonic": LLAMA,
    }.items():  # fmt: skip
        assert find_call_form(TOOL_TEMPLATES[name][0], {}) is form
    # A fine-tune of Llama's with another one's format.
    assert find_call_form(TOOL_TEMPLATES["hermes"][0], {"<|python_tag|>": 1}) is TAGGED
    assert find_call_form("{{ tools }}", {"<|python_tag|>": 1}) is LLAMA
    assert find_call_form("{{ tools }}", {"<s>": 1}) is None


def test_an_unknown_form_is_told_once_and_calls_stay_text(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, _ = tokenizer_pair("{{ tools }}", ["<s>", "</s>"])
    chat = TemplateChat(tokenizer)
    assert [chat.call_stream([{"name": "f"}], [1]) for _ in range(2)] == [None, None]
    assert [each.getMessage() for each in caplog.records] == [
        "this model's chat template does not tell the form in which calls are written: they are left in the text"
    ]
    assert chat.call_stream(None, [1]) is None and len(caplog.records) == 1
