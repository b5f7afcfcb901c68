"""What a line of an input asks for, and how its results are worded: a text, or an object with fields of our own.

Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from llama.chat.tools import Tools
from llama.outputs import AnswerPrediction
from llama.sampling import SamplingParams

SAMPLING_FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
SWITCHES = [field.name for field in dataclasses.fields(SamplingParams) if isinstance(field.default, bool)]
# One of them is what a line is about.
PROMPT_FIELDS = ("prompt", "messages", "tokens")
# What a line with messages may say beside them.
CHAT_FIELDS = ("tools", "continue_final_message")
FIELDS = [*PROMPT_FIELDS, "id", *CHAT_FIELDS, *SAMPLING_FIELDS]


@dataclass(frozen=True)
class LineRequest:
    """What is to be completed: the one that is given of a text, a dialog and token ids; and how.

    tools and continue_final_message are those of a dialog, as in `Llama.chat_completion`.
    """

    params: SamplingParams
    prompt: str | None = None
    messages: list[Any] | None = None
    tokens: list[Any] | None = None
    tools: Tools | None = None
    continue_final_message: bool = False


@dataclass(frozen=True)
class LineResult:
    """The completions of a line; prompt_tokens and completion_tokens, of all together, are counts."""

    predictions: list[AnswerPrediction]
    prompt_tokens: int
    completion_tokens: int


class LineForm(Protocol):
    """One way of asking and of answering."""

    def request(self, defaults: SamplingParams) -> LineRequest:
        """Return what the line asks for, the defaults where it says nothing; ValueError where it is wrong."""
        ...

    def result(self, result: LineResult) -> dict[str, Any]:
        """Return the fields of the line's result."""
        ...

    def error(self, message: str) -> dict[str, Any]:
        """Return the fields of the result of a line that cannot be completed."""
        ...


class PlainForm:
    """A line of a text file, a string, or an object with one of PROMPT_FIELDS, an id and sampling options."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def request(self, defaults: SamplingParams) -> LineRequest:
        for name in self._fields:
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, 1)
                fix = f"did you mean {close[0]}?" if close else f"a line has {', '.join(FIELDS)}"
                raise ValueError(f"unknown field {name!r:.80}: {fix}")
        options = {name: value for name, value in self._fields.items() if name in SAMPLING_FIELDS}
        return request_of(self._fields, dataclasses.replace(defaults, **options))

    def result(self, result: LineResult) -> dict[str, Any]:
        counts = {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens}
        choices = [_choice(each) for each in result.predictions]
        fields: dict[str, Any] = choices[0] if len(choices) == 1 else {"choices": choices}
        return {"id": self._fields.get("id"), **fields, **counts}

    def error(self, message: str) -> dict[str, Any]:
        return {"id": self._fields.get("id"), "error": message}


def _choice(found: AnswerPrediction) -> dict[str, Any]:
    fields: dict[str, Any] = {"generation": found["generation"], "finish_reason": found["finish_reason"]}
    if "tool_calls" in found:
        fields["tool_calls"] = found["tool_calls"]
    for name in ("logprobs", "top_logprobs"):
        if name in found:
            fields |= {"tokens": found["tokens"], name: found[name]}
    return fields


def request_of(fields: Mapping[str, Any], params: SamplingParams) -> LineRequest:
    """Return the request of a line with one of PROMPT_FIELDS; ValueError where it has none, several or a wrong one."""
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"a line has one of {', '.join(PROMPT_FIELDS)}, this one has {' and '.join(given) or 'none of them'}"
        )
    for switch in SWITCHES:
        if not isinstance(getattr(params, switch), bool):
            raise ValueError(f"{switch} must be true or false, got {getattr(params, switch)!r:.80}")
    (name,) = given
    value = fields[name]
    if not isinstance(value, str if name == "prompt" else list):
        raise ValueError(f"{name} must be a {'text' if name == 'prompt' else 'list'}, got {value!r:.80}")
    if name != "messages" and (beside := [each for each in CHAT_FIELDS if fields.get(each)]):
        raise ValueError(f"{' and '.join(beside)} must come with messages, this line has {name}")
    tools, continues = fields.get("tools"), fields.get("continue_final_message")
    if not isinstance(tools, list | None):
        raise ValueError(f"tools must be a list, got {tools!r:.80}")
    if not isinstance(continues, bool | None):
        raise ValueError(f"continue_final_message must be true or false, got {continues!r:.80}")
    # The value is of the type of its field, as is looked at above.
    return LineRequest(params, **{name: value}, tools=tools, continue_final_message=bool(continues))  # type: ignore[arg-type]


def load_json(content: bytes) -> Any:
    """Return the value of a line of JSON; ValueError for anything else."""
    try:
        return json.loads(_decoded(content), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def text_of(content: bytes) -> str:
    """Return a line of a text file; ValueError where it is not UTF-8."""
    return _decoded(content)


def names_of(fields: Iterable[str]) -> str:
    """Return names of fields for a message."""
    return ", ".join(f"{name!r:.80}" for name in fields)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 from byte {error.start} on") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
