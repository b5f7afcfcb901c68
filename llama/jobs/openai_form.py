"""Lines of OpenAI's batch files, by the field names of its chat and completions endpoints, and answers in its shape.

What cannot be done here is refused, as long as its value asks for anything. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from llama.jobs.line_forms import LineForm, LineRequest, LineResult, PlainForm, load_json, names_of, request_of, text_of
from llama.outputs import AnswerPrediction, CompletionPrediction
from llama.sampling import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Fields of a body, and what they are called here.
OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "max_tokens": "max_gen_len",
    "max_completion_tokens": "max_gen_len",
    "n": "n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "logit_bias": "logit_bias",
}
CHAT_BODY_FIELDS = ("messages", "top_logprobs", "continue_final_message", "tools", "tool_choice", "parallel_tool_calls")
# Fields that change no text.
IGNORED = ("model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")
# Fields that ask for nothing with these values, or with null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "suffix": ("",),
}


class OpenAIForm:
    """A line with a custom_id, a url and a body."""

    def __init__(self, fields: Mapping[str, Any], number: int, model: str) -> None:
        """Take the fields of a line; number: the line's; model: what to call the model where the body does not."""
        self._fields, self._number = fields, number
        body = fields.get("body")
        self._body: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
        self._model = self._body.get("model") or model
        url = fields.get("url")
        self._is_chat = url == CHAT if url is not None else "messages" in self._body

    def request(self, defaults: SamplingParams) -> LineRequest:
        fields, body = self._fields, self._body
        if unknown := fields.keys() - {"custom_id", "method", "url", "body"}:
            raise ValueError(f"unknown fields {names_of(sorted(unknown))} beside custom_id, method, url and body")
        if not isinstance(fields.get("body"), Mapping):
            raise ValueError(f"body must be an object, got {fields.get('body')!r:.80}")
        if fields.get("url") not in (None, CHAT, COMPLETIONS):
            raise ValueError(f"url must be {CHAT} or {COMPLETIONS}, got {fields['url']!r:.80}")
        if fields.get("method") not in (None, "POST"):
            raise ValueError(f"method must be POST, got {fields['method']!r:.80}")
        own = CHAT_BODY_FIELDS if self._is_chat else ("prompt", "echo", "best_of")
        options: dict[str, Any] = {}
        for name, value in body.items():
            if name in OPTIONS:
                if value is not None:
                    options[OPTIONS[name]] = value
            elif name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    raise ValueError(f"{name} is not supported, got {value!r:.80}: leave it out")
            elif name not in (*own, "logprobs", "response_format") and name not in IGNORED:
                raise ValueError(f"unknown field {name!r:.80} in body")
        if body.get("logprobs") is not None:
            options |= self._scores(body["logprobs"])
        if body.get("response_format") is not None:
            options |= _format(body["response_format"])
        for name in ("echo", "best_of", "top_logprobs"):
            if name in own and body.get(name) is not None:
                options[name] = body[name]
        params = dataclasses.replace(defaults, **options)
        if "top_logprobs" in options and params.top_logprobs and not params.logprobs:
            raise ValueError("top_logprobs must come with logprobs")
        if self._is_chat:
            asked = {"messages": _as_templates_read(body.get("messages")), "tools": self._tools()}
            return request_of(asked | {"continue_final_message": body.get("continue_final_message")}, params)
        prompt = body.get("prompt")
        return request_of({"prompt": prompt} if isinstance(prompt, str) else {"tokens": prompt}, params)

    def result(self, result: LineResult) -> dict[str, Any]:
        body = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{self._number}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": 0,  # so that the same job gives the same file
            "model": self._model,
            "choices": [self._choice(*each) for each in enumerate(result.predictions)],
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "completion_tokens": result.completion_tokens,
                "total_tokens": result.prompt_tokens + result.completion_tokens,
            },
        }
        return self._answer({"status_code": 200, "request_id": f"req_{self._number}", "body": body}, None)

    def _choice(self, index: int, found: AnswerPrediction) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": found["finish_reason"]}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": found["generation"], "refusal": None}
            if calls := [_as_openai_writes(call) for call in found.get("tool_calls", [])]:
                message["content"] = found["generation"] or None
                message["tool_calls"] = calls[:1] if self._body.get("parallel_tool_calls") is False else calls
                if found["finish_reason"] == "stop":
                    choice["finish_reason"] = "tool_calls"
            choice["message"] = message
        else:
            choice |= {"text": found["generation"]}
        if "logprobs" in found:
            choice["logprobs"] = _chat_logprobs(found) if self._is_chat else _completion_logprobs(found)
        return choice

    def error(self, message: str) -> dict[str, Any]:
        return self._answer(None, {"code": "invalid_request", "message": message})

    def _answer(self, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": f"batch_req_{self._number}",
            "custom_id": self._fields.get("custom_id"),
            "response": response,
            "error": error,
        }

    def _tools(self) -> Any:
        """Return the tools that the answer may call, None where the body does not say."""
        choice, parallel = self._body.get("tool_choice"), self._body.get("parallel_tool_calls")
        if choice not in (None, "none", "auto"):
            raise ValueError(f"tool_choice must be none or auto, as nothing makes a model call, got {choice!r:.80}")
        if not isinstance(parallel, bool | None):
            raise ValueError(f"parallel_tool_calls must be true or false, got {parallel!r:.80}")
        return [] if choice == "none" else self._body.get("tools")

    def _scores(self, value: Any) -> dict[str, Any]:
        """Return the options that `logprobs` stands for; a completion's number is of the likeliest tokens."""
        if isinstance(value, bool) and self._is_chat:
            return {"logprobs": value}
        if type(value) is int and not self._is_chat:
            return {"logprobs": True, "top_logprobs": value}
        raise ValueError(f"logprobs must be {'true or false' if self._is_chat else 'a number'}, got {value!r:.80}")


def _as_templates_read(messages: Any) -> Any:
    """Return messages with the arguments of calls as objects, where they are texts of JSON, as OpenAI has them."""
    if not isinstance(messages, list):
        return messages
    read = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_with_arguments(call, _read_arguments) for call in calls]}
        read.append(message)
    return read


def _as_openai_writes(call: Any) -> Any:
    return _with_arguments(call, lambda arguments: json.dumps(arguments, ensure_ascii=False))


def _with_arguments(call: Any, change: Callable[[Any], Any]) -> Any:
    """Return a call with its arguments changed; as it is where it has none."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}


def _read_arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the arguments of a call must be a JSON object, as a text, got {arguments!r:.80}")
    return found


def _format(value: Any) -> dict[str, Any]:
    """Return the options that a response_format stands for."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    described = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(described, Mapping) and isinstance(described.get("schema"), Mapping):
        return {"json_schema": described["schema"]}
    raise ValueError(
        f"response_format must have the type text, json_object, or json_schema with a schema, got {value!r:.80}"
    )


def line_form(content: bytes, is_json: bool, number: int, model: str) -> LineForm:
    """Return what a line is, by its fields; ValueError where it is neither a text nor an object."""
    value = load_json(content) if is_json else text_of(content)
    if isinstance(value, str):
        return PlainForm({"prompt": value})
    if not isinstance(value, dict):
        raise ValueError(f"a line is a text or an object, got {value!r:.80}")
    return OpenAIForm(value, number, model) if "body" in value or "custom_id" in value else PlainForm(value)


def _chat_logprobs(found: CompletionPrediction) -> dict[str, Any]:
    likeliest = found.get("top_logprobs") or [[]] * len(found["tokens"])
    scored = zip(found["tokens"], found["logprobs"], likeliest, strict=True)
    content = [
        _scored(token, score) | {"top_logprobs": [_scored(each["token"], each["logprob"]) for each in top]}
        for token, score, top in scored
    ]
    return {"content": content, "refusal": None}


def _scored(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _completion_logprobs(found: CompletionPrediction) -> dict[str, Any]:
    starts, likeliest = [0], found.get("top_logprobs")
    for token in found["tokens"]:
        starts.append(starts[-1] + len(token))
    return {
        "tokens": found["tokens"],
        "token_logprobs": found["logprobs"],
        "top_logprobs": [{each["token"]: each["logprob"] for each in top} for top in likeliest] if likeliest else None,
        "text_offset": starts[:-1],
    }
