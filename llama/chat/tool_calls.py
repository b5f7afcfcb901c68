"""Calls of tools in the answers of models: the forms that they are written in, told from text as it comes.

Knows nothing of jinja, and runs nothing that a model writes (see D72).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama.chat.dialog import plain_json
from llama.chat.python_calls import PythonCall, read_code, read_list
from llama.tokenizer import Tokenizer

ID_LETTERS = 9  # of a call's id: as many letters and digits as Mistral's templates ask for
# What an object that is a whole answer begins with if it is a call.
FIRST_KEYS = ("name", "type", "function", "parameters", "arguments", "id")
PYTHON_TAG, TOOL_CALLS, TOOL_CALL = "<|python_tag|>", "[TOOL_CALLS]", "<tool_call>"
MISTRAL_NAME = re.compile(r"\s*([\w.\-/]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?(?=\s*\{)")
BEGINNING_OF_LIST = re.compile(r"\[\s*(\{.*|[A-Za-z_][\w.]*\s*(\(.*)?)?", re.DOTALL)
BEGINNING_OF_OBJECT = re.compile(r'\{\s*("(?P<key>\w*)(?P<end>".*)?)?', re.DOTALL)
JSON = json.JSONDecoder(strict=False)  # models write newlines in texts as they are


class _Call(NamedTuple):
    name: str
    arguments: dict[str, Any]
    id: str | None = None


class _Found(NamedTuple):
    calls: list[_Call]
    stop: int  # where in the text they end


@dataclass(frozen=True)
class CallForm:
    """A form in which models write calls.

    Args:
        marks: what a call begins with, anywhere in an answer; the first is a control token of most tokenizers.
        inner: other control tokens that are parts of calls.
        read: reads what is at a place of an answer, a mark or the beginning: its calls, None where they are malformed.
        may_begin: whether an answer that begins like this may be calls without a mark; once it is not, it never is.
    """

    marks: tuple[str, ...]
    inner: tuple[str, ...]
    read: Callable[[str, int], _Found | None]
    may_begin: Callable[[str], bool] = lambda text: False


def find_call_form(template: str, control_tokens: Mapping[str, int]) -> CallForm | None:
    """Return the form in which a model writes calls, as its template or else its control tokens tell; None for others.

    TAGGED is that of Hermes, Qwen and their kin: <tool_call>{"name": ..., "arguments": ...}</tool_call>. MISTRAL is
    [TOOL_CALLS] and a JSON list, or [TOOL_CALLS]name[ARGS]{...}, as from the tokenizer's version 11 on. LLAMA is a
    whole answer {"name": ..., "parameters": ...} or [name(a=1), other(b="x")], or what follows <|python_tag|>.
    """
    for written in (template, control_tokens):
        for mark, form in ((TOOL_CALLS, MISTRAL), (TOOL_CALL, TAGGED), (PYTHON_TAG, LLAMA)):
            if mark in written:
                return form
    return LLAMA if re.search(r"\[\w+\(\w+=", template) else None


class ToolCallStream:
    """Tells text from calls in one answer, as its tokens come. Text that may be a call is held back until the end.

    >>> stream = llm.chat_format.call_stream(tools, prompt)
    >>> text = "".join(stream.push(event.token, event.text) for event in events)
    >>> rest, calls = stream.end()
    """

    def __init__(self, form: CallForm, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """prompt: what is answered, from which ids follow where the model gives none: each turn has others."""
        self._form, self._prompt = form, prompt
        special = tokenizer.special_tokens
        self._spelled = {special[text]: text for text in (*form.marks, *form.inner) if text in special}
        self._text, self._n_shown = "", 0
        self._may_begin, self._holds = True, False  # whether all of it may be calls, and whether one may have begun

    def push(self, token: int | None, text: str) -> str:
        """Return the text to show after a token of the answer; text: what it adds, nothing for a control token."""
        self._text += self._spelled.get(token, "") + text if token is not None else text
        if not self._holds:
            shown, self._n_shown = self._n_shown, max(self._n_shown, self._shown_length())
            return self._text[shown : self._n_shown]
        return ""

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text, and the calls, in the form of a message's `tool_calls`.

        Their arguments are a dictionary, as chat templates take them back. Whitespace before a call is left out.
        """
        text, calls = _split(self._text, self._form)
        rest, self._n_shown = text[self._n_shown :], len(text)
        found = [
            {
                "id": call.id or self._new_id(number),
                "type": "function",
                "function": {"name": call.name, "arguments": plain_json(call.arguments, "a call holds")},
            }
            for number, call in enumerate(calls)
        ]
        return rest, found

    def _shown_length(self) -> int:
        """Return how much of the text is surely no call."""
        self._may_begin = self._may_begin and self._form.may_begin(self._text.lstrip())
        if self._may_begin:
            return 0
        places = [at for at in (self._text.find(mark, self._n_shown) for mark in self._form.marks) if at >= 0]
        self._holds = bool(places)
        if places:
            stop = min(places)
        else:
            stop = len(self._text) - max(_begun(self._text, mark) for mark in self._form.marks)
        return len(self._text[:stop].rstrip())

    def _new_id(self, number: int) -> str:
        key = json.dumps([number, *map(int, self._prompt)]).encode()
        return hashlib.blake2b(key, digest_size=ID_LETTERS).hexdigest()[:ID_LETTERS]


def _begun(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that a mark begins with."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def _split(text: str, form: CallForm) -> tuple[str, list[_Call]]:
    """Return the text of an answer beside its calls, and these. What is malformed is text."""
    kept, calls, done = "", list[_Call](), 0
    place = 0 if form.may_begin(text.lstrip()) else _next_mark(text, 0, form)
    while place >= 0:
        found = form.read(text, place)
        if found is None or not all(_is_json(call.arguments) for call in found.calls):
            place = _next_mark(text, place + 1, form)
            continue
        kept += text[done:place].rstrip()
        calls += found.calls
        done = found.stop
        place = _next_mark(text, done, form)
    return kept + (text[done:].rstrip() if calls else text[done:]), calls


def _is_json(arguments: dict[str, Any]) -> bool:
    """Tell whether JSON has a form for arguments, which may hold infinite or far too long numbers."""
    try:
        return bool(json.dumps(arguments, allow_nan=False))
    except (ValueError, RecursionError):
        return False


def _next_mark(text: str, start: int, form: CallForm) -> int:
    return min((at for at in (text.find(mark, start) for mark in form.marks) if at >= 0), default=-1)


def _read_tagged(text: str, place: int) -> _Found | None:
    found = _read_json(text, place + len(TOOL_CALL))
    call = None if found is None else _as_call(found[0])
    if found is None or call is None:
        return None
    end = re.compile(r"\s*(</tool_call>|$)").match(text, found[1])
    return None if end is None else _Found([call], end.end())


def _read_mistral(text: str, place: int) -> _Found | None:
    start = place + len(TOOL_CALLS)
    named = MISTRAL_NAME.match(text, start)
    found = _read_json(text, named.end() if named else start)
    if found is None:
        return None
    value, stop = found
    if named:
        return _Found([_Call(named[1], value, named[2])], stop) if isinstance(value, dict) else None
    calls = _as_calls(value)
    end = re.compile(r"\s*\[/TOOL_CALLS\]").match(text, stop)
    return None if calls is None else _Found(calls, end.end() if end else stop)


def _read_llama(text: str, place: int) -> _Found | None:
    is_marked = text.startswith(PYTHON_TAG, place)
    rest = text[place:].removeprefix(PYTHON_TAG).strip()
    calls: list[_Call] | None = []
    if rest.startswith("{") or re.match(r"\[\s*\{", rest):
        calls = _read_objects(rest)
    elif rest.startswith("["):
        calls = _of_python(read_list(rest))
    elif is_marked:
        calls = _of_python(read_code(rest))
    return _Found(calls, len(text)) if calls else None


def _of_python(calls: list[PythonCall] | None) -> list[_Call] | None:
    return None if calls is None else [_Call(*call) for call in calls]


def _read_objects(text: str) -> list[_Call] | None:
    """Return the calls of JSON objects that a text holds, with semicolons, commas or whitespace between them."""
    calls: list[_Call] = []
    place = 0
    while place < len(text):
        found = _read_json(text, place)
        more = None if found is None else _as_calls(found[0])
        if found is None or more is None:
            return None
        calls += more
        between = re.compile(r"[\s;,]*").match(text, found[1])
        place = between.end() if between else found[1]
    return calls


def _may_begin_llama(text: str) -> bool:
    """Tell whether a text may be the beginning of calls, whatever comes after it; an empty one may."""
    if text.startswith("["):
        return BEGINNING_OF_LIST.fullmatch(text) is not None
    begun = BEGINNING_OF_OBJECT.fullmatch(text)
    if begun is None:
        return not text
    if begun["end"]:
        return begun["key"] in FIRST_KEYS
    return begun["key"] is None or any(key.startswith(begun["key"]) for key in FIRST_KEYS)


def _read_json(text: str, start: int) -> tuple[Any, int] | None:
    """Return the JSON value that begins at a place of a text, or after whitespace there, and where it ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _as_calls(value: Any) -> list[_Call] | None:
    calls = [_as_call(each) for each in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _as_call(value: Any) -> _Call | None:
    """Return the call that an object stands for; None where it is none."""
    if not isinstance(value, dict):
        return None
    function = value["function"] if isinstance(value.get("function"), dict) else value
    name = function.get("name", function.get("function"))
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        found = _read_json(arguments, 0)
        arguments = None if found is None or arguments[found[1] :].strip() else found[0]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    call_id = value.get("id")
    return _Call(name, arguments, call_id if isinstance(call_id, str) and call_id else None)


TAGGED = CallForm((TOOL_CALL,), ("</tool_call>",), _read_tagged)
MISTRAL = CallForm((TOOL_CALLS,), ("[/TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), _read_mistral)
LLAMA = CallForm((PYTHON_TAG,), (), _read_llama, _may_begin_llama)
