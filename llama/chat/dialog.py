"""Dialogs as callers give them, lists of messages, and the checks that formats share. Knows no format and no tokens."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

log = logging.getLogger("llama")

# "ipython" is Llama 3's name of what a tool answers.
Role = Literal["system", "user", "assistant", "tool", "ipython"]


class _Text(TypedDict):
    role: Role
    content: str


class Message(_Text, total=False):
    """One message of a dialog.

    Chat templates read more keys, as transformers hands them over: with tool_calls, content may be None or missing.
    """

    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    reasoning_content: str


Dialog = Sequence[Message]

# The other names of reasoning_content that templates and servers use.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def check_messages(dialog: object) -> None:
    """Raise ValueError unless a dialog is a list of messages, each with a role, and a content or tool calls."""
    if not isinstance(dialog, list | tuple):
        raise ValueError(f"a dialog is a list of messages, and dialogs are a list of those; got {dialog!r:.80}")
    if not dialog:
        raise ValueError("a dialog needs at least one message")
    for i, message in enumerate(dialog):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"a dialog is a list of messages, each a dictionary with 'role' and 'content'; message {i} is "
                f"{message!r:.80}"
            )
        content = message.get("content")
        if not isinstance(content, str | list | tuple) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"message {i} needs a content, or tool_calls, got {content!r:.80}")


def check_contents(dialog: object, chat_format: str) -> None:
    """Raise ValueError unless each message of a dialog is a role and a text, which is all that Meta's formats write.

    chat_format: what to call the format, which has no place for other keys; those are logged, once.
    """
    check_messages(dialog)
    assert isinstance(dialog, list | tuple)
    for i, message in enumerate(dialog):
        if message.get("tool_calls"):
            raise no_place_for_calls(i, chat_format)
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i} has a content that is no text, which is all that {chat_format} writes")
    tell_left_out(chat_format, keys_beside_text(dialog))


def keys_beside_text(dialog: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the keys of messages that hold something, but for role and content; all of reasoning under one name."""
    keys = {str(key) for message in dialog for key, value in message.items() if value} - {"role", "content"}
    return tuple(sorted({REASONING_KEYS[0] if key in REASONING_KEYS else key for key in keys}))


@functools.lru_cache(maxsize=256)  # once for the same keys
def tell_left_out(chat_format: str, keys: tuple[str, ...]) -> None:
    """Log keys of messages of which a prompt has nothing."""
    if keys:
        log.warning("%s has no place for %s: nothing of it is in the prompt", chat_format, " and ".join(keys))


def no_place_for_calls(index: int, chat_format: str) -> ValueError:
    """Return the error of a message that says nothing but what its tool_calls do."""
    return ValueError(
        f"message {index} has tool_calls, for which {chat_format} has no place: write them into its content as text, "
        "or use a model whose chat template has one"
    )


def check_roles(dialog: Sequence[Mapping[str, Any]], chat_format: str) -> None:
    """Raise ValueError unless roles are an optional system, then user and assistant in turn, ending with user.

    chat_format: as for `check_contents`.
    """
    check_contents(dialog, chat_format)
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            "a dialog is an optional 'system' message, then 'user' and 'assistant' in turn, ending with 'user'; "
            f"got {roles}"
        )


def check_continued(dialog: Sequence[Mapping[str, Any]]) -> str:
    """Return the text that an answer is to continue; raise ValueError unless it is an assistant's, at the end.

    Of a content that is a list it is the last text.
    """
    check_messages(dialog)
    role, content = dialog[-1]["role"], dialog[-1].get("content")
    if role != "assistant":
        raise ValueError(f"continue_final_message needs a dialog that ends with an 'assistant' message, got {role!r}")
    parts = [{"text": content}] if isinstance(content, str) else content or []
    texts = [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    if not texts:
        raise ValueError("continue_final_message needs a text in the last message, which has none")
    text: str = texts[-1]
    return text


def plain_messages(dialog: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a copy of the messages as JSON holds it, without keys that are None, as in transformers.

    Reasoning gets all the names that templates know. Raises ValueError for what is no message, and as `plain_json`.
    """
    check_messages(dialog)
    messages = []
    for i, message in enumerate(dialog):
        message = plain_json({key: each for key, each in message.items() if each is not None}, f"message {i} holds")
        reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        messages.append(message)
    return messages


def plain_json(value: Any, has: str) -> Any:
    """Return a copy of JSON data, with lone surrogates as U+FFFD; raise ValueError for a value that is none.

    has: what the error begins with, such as "message 0 holds".
    """
    try:
        copied = json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{has} a value that JSON has no form for: {error}") from None
    return map_texts(copied, _valid_unicode)


def map_texts(value: Any, change: Callable[[str], str], keep: Mapping[str, Collection[str]] | None = None) -> Any:
    """Return JSON data with every text changed, keys included.

    keep: keys that stay as they are, and of each the texts that stay as its value.
    """
    keep = keep or {}
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            name if name in keep else change(name): each
            if isinstance(each, str) and each in keep.get(name, ())
            else map_texts(each, change, keep)
            for name, each in value.items()
        }
    return [map_texts(each, change, keep) for each in value] if isinstance(value, list) else value


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text of JSON data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from texts_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)


def _valid_unicode(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
