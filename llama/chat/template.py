"""The chat format that comes with a model: a jinja template, rendered by another process (template_worker.py)."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.chat.dialog import (
    REASONING_KEYS,
    check_continued,
    keys_beside_text,
    map_texts,
    no_place_for_calls,
    plain_json,
    plain_messages,
    tell_left_out,
    texts_of,
)
from llama.chat.llama2_tags import SPECIAL_TAGS
from llama.chat.placeholders import choose_placeholders, unused_characters
from llama.chat.template_renderer import TemplateRenderer
from llama.chat.tool_calls import CallForm, ToolCallStream, find_call_form
from llama.chat.tools import Tools, no_place_for_tools, plain_tools
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
# The keys that templates read by name, of messages, tools and documents, and their values that are compared.
MESSAGE_KEYS = "content", "text", "title", "name", "tool_calls", "tool_call_id", "id", "function", "arguments"
SCHEMA_KEYS = "parameters", "description", "properties", "required", "enum", "items", "default", "anyOf", "return"
TYPES = "function", "text", "object", "string", "array", "integer", "number", "boolean", "null"
KEPT: dict[str, Sequence[str]] = dict.fromkeys((*MESSAGE_KEYS, *REASONING_KEYS, *SCHEMA_KEYS), ())
KEPT |= {"role": ROLES, "type": TYPES}
# What a template gets in every call, and a user does not name in template_kwargs.
OWN_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now")
MAX_TEMPLATE_BYTES = 1 << 20  # the longest known template has 20 KB
# Matches nowhere; has a group, like the patterns of _any_of.
NOTHING = re.compile("((?!))")


class TemplateChat:
    """A chat template: encodes the prompt that transformers' apply_chat_template renders.

    A control token in the prompt becomes its id only where the template wrote all of it. What came from a message, from
    a tool's description or from `arguments` is text, whatever it spells: whole, in pieces that template and message
    complete together, or after the template has trimmed, split, sliced, joined, upper-cased or JSON-encoded it.

    To know where a character came from, all of it is rendered twice: as it is, and with placeholders for those
    characters that occur in the spellings of control tokens. The two prompts must be equal apart from the
    placeholders, so that ids are always those of the text that transformers renders. ValueError is raised for a message
    where they are not: where the template compares it with a number, say, or looks for a control token in it.

    Two things never get placeholders: whitespace, which templates trim, and the structure of messages, which they look
    up and compare: `ROLES`, from which templates build control tokens too, and the other keys and values of `KEPT`.
    Texts that the template spells as constants and looks for in a message, such as "</think>", get none if the prompts
    differ otherwise and no control token can overlap them. (A template could still make a part of such a text into a
    control token, if it cuts the text up and writes the rest of the token around that part.)

    Rendering runs no code of the template outside jinja's sandbox, opens no files, and takes at most SECONDS and, on
    Linux, 512 MiB of a process of its own (see D14). A template can still write any prompt it likes.

    Text between control tokens is encoded in one piece. SentencePiece's prefix space is put before each piece, or only
    before the prompt, as the tokenizer's `prefix_space_after_special` says. The lstrip and rstrip of added tokens are
    ignored.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, name: str = "template") -> None:
        """source: the jinja text; None is the tokenizer's own `chat_template`, without which ValueError is raised.

        name: that of the format, for messages.
        """
        source = source or tokenizer.chat_template
        if not source:
            raise ValueError("chat_format template: this model brings no chat template")
        self.tokenizer, self._source = tokenizer, source
        self._name = "this model's chat template" if name == "template" else f"chat format {name}"
        self._placed: set[str] = set()  # keys of messages, beside role and content, that have changed a prompt
        self._places_tools = False  # whether tools have changed one
        spelling_of = {token: text for text, token in tokenizer.special_tokens.items()}
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._variables = {name: spelling_of[token] for name, token in named.items() if token in spelling_of}
        self._arguments: dict[str, Any] = {}
        self._spellings = [text for text in tokenizer.special_tokens if text.strip()]
        self._characters = frozenset("".join(self._spellings))
        self._renderer = TemplateRenderer()

    def check(self) -> None:
        """Raise ValueError where the template is no jinja."""
        self._ask([])

    def set_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Give the template more to read, such as {"enable_thinking": False}, in every prompt from now on.

        Raise ValueError for a name that is taken, and for a value that JSON has no form for.
        """
        for name in arguments:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"template_kwargs cannot have {name!r}, which each prompt has of its own")
        self._arguments = plain_json(dict(arguments), "template_kwargs hold")

    def encode(
        self, dialog: Sequence[Mapping[str, Any]], tools: Tools | None = None, continue_final_message: bool = False
    ) -> list[int]:
        """Encode the prompt of a dialog; BOS is where the template writes it, and nowhere else."""
        context = {**self._arguments, "messages": plain_messages(dialog), "tools": plain_tools(tools)}
        self._check_places(context)
        if continue_final_message:
            prompt, originals = self._render_continued(context)
        else:
            prompt, originals = self._render(context)
        ids: list[int] = []
        for i, part in enumerate(self._control.split(prompt)):
            if i % 2 == 1:
                ids.append(self.tokenizer.special_tokens[part])
            else:
                prefix_space = i == 0 or self.tokenizer.prefix_space_after_special
                ids += self.tokenizer.encode(part.translate(originals), False, False, add_prefix_space=prefix_space)
        return ids

    def is_unsafe(self, dialog: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a message spells out tags of Llama 2 that this template writes as plain text."""
        tags = [tag for tag in SPECIAL_TAGS if tag in self._source and tag not in self.tokenizer.special_tokens]
        return any(tag in text for text in texts_of(dialog) for tag in tags)

    def call_stream(self, tools: Tools | None, prompt: Sequence[int]) -> ToolCallStream | None:
        """Return what tells calls in an answer to a prompt; None where no tools are offered, or their form is unknown.

        Tools are offered by `tools`, or by builtin_tools or custom_tools among the template's arguments.
        """
        if not tools and not any(self._arguments.get(name) for name in ("builtin_tools", "custom_tools")):
            return None
        return None if self._call_form is None else ToolCallStream(self._call_form, self.tokenizer, prompt)

    @functools.cached_property
    def _call_form(self) -> CallForm | None:
        form = find_call_form(self._source, self.tokenizer.special_tokens)
        if form is None:
            log.warning("%s does not tell the form in which calls are written: they are left in the text", self._name)
        return form

    def _check_places(self, context: dict[str, Any]) -> None:
        """Log keys of messages that the template leaves out: the prompt is the same without them.

        Raise ValueError where tools are left out, or tool_calls of a message that says nothing else.
        """
        dialog = context["messages"]
        new = [key for key in keys_beside_text(dialog) if key not in self._placed]
        calls = (i for i, each in enumerate(dialog) if each.get("tool_calls") and each.get("content") is None)
        call = next(calls, None)
        without = [{**context, "messages": _without(dialog, key)} for key in new]
        are_tools_new = bool(context["tools"]) and not self._places_tools
        if are_tools_new:
            without.append({**context, "tools": None})
        try:
            plain, *others = self._ask([context, *without])["prompts"] if without else [""]
        except ValueError:
            if call is not None and "tool_calls" not in self._source:
                raise no_place_for_calls(call, self._name) from None
            raise
        if are_tools_new:
            if others.pop() == plain:
                raise no_place_for_tools(self._name)
            self._places_tools = True
        left_out = tuple(key for key, prompt in zip(new, others, strict=True) if prompt == plain)
        self._placed |= {*new} - {*left_out}
        if call is not None and "tool_calls" in left_out:
            raise no_place_for_calls(call, self._name)
        if "tool_calls" in self._placed:  # many templates write calls and results in order, without their ids
            left_out = tuple(key for key in left_out if key != "tool_call_id")
        tell_left_out(self._name, left_out)

    def _render_continued(self, context: dict[str, Any]) -> tuple[str, dict[int, str]]:
        """Return what `_render` does, up to where the text of the last message ends, as transformers cuts it."""
        begun = check_continued(context["messages"])
        texts = [self._source, *texts_of(context)]
        mark = next(unused_characters({*"".join(texts)} | self._characters))
        *before, last = context["messages"]
        messages = [*before, {**last, "content": _with_end(last["content"], mark + " ")}]
        prompt, originals = self._render({**context, "messages": messages, "add_generation_prompt": False})
        start, found, end = prompt.rpartition(mark)
        if not found or begun.strip() not in start.translate(originals):
            raise ValueError(
                f"{self._name} changes or leaves out the last message: it cannot be continued; end the dialog with a "
                "user's message, or shorten the one to continue to its plain text"
            )
        return start if end.startswith(" ") else start.rstrip(), originals

    def _render(self, context: dict[str, Any]) -> tuple[str, dict[int, str]]:
        """Return the prompt with placeholders for characters of a context, and the original of each placeholder."""
        texts = list(texts_of(context))
        placeholders = choose_placeholders(texts, self._characters, used=set("".join([self._source, *texts])))
        originals = {ord(placeholder): original for original, placeholder in placeholders.items()}
        table = str.maketrans(placeholders)
        # As tojson(ensure_ascii=true) writes them; what they stand for, it would have left as it is.
        escaped = {json.dumps(char)[1:-1]: char for original, char in placeholders.items() if original.isascii()}
        escapes = _any_of(list(escaped))

        def replace(text: str, unchanged: re.Pattern[str]) -> str:
            parts = unchanged.split(text)  # odd ones match
            return "".join([part if i % 2 else part.translate(table) for i, part in enumerate(parts)])

        for keep_constants in (False, True):
            change = functools.partial(replace, unchanged=self._constants if keep_constants else NOTHING)
            replaced = {name: map_texts(value, change, KEPT) for name, value in context.items()}
            plain, prompt = self._ask([context, replaced])["prompts"]
            if prompt is not None:
                prompt = escapes.sub(lambda match: escaped[match[0]], prompt)
                if prompt.translate(originals) == plain:
                    return prompt, originals
        raise ValueError(
            "the chat template reads a message in a way that cannot be kept apart from control tokens: "
            "say it in other words, or choose another chat_format"
        )

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches the spellings of control tokens."""
        return _any_of(self._spellings)

    @functools.cached_property
    def _constants(self) -> re.Pattern[str]:
        """Matches the texts that the template spells as constants, in any case, where no control token overlaps."""
        constants: list[str] = self._ask([])["constants"]
        return _any_of(_apart(constants, self._spellings), re.IGNORECASE)

    def _ask(self, contexts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the prompts of contexts, and the template's constants."""
        contexts = [{**self._variables, **context} for context in contexts]
        return self._renderer.ask({"source": self._source, "contexts": contexts})


def read_template(template: str | os.PathLike[str]) -> str:
    """Return a jinja template: the text that is given, or that of the file which it names.

    Raise OSError or ValueError where there is none.
    """
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        return template
    path = Path(template).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no chat template {path}: give a file of jinja's text")
    with path.open("rb") as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    text = data.decode("utf-8", "replace")
    if len(data) > MAX_TEMPLATE_BYTES or "\ufffd" in text or not ("{{" in text or "{%" in text):
        raise ValueError(f"{path} is no chat template: expected a file of jinja's text, with {{{{ or {{% in it")
    return text


def _without(dialog: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return a dialog without a key of its messages, or without any of those that reasoning has."""
    keys = REASONING_KEYS if key in REASONING_KEYS else (key,)
    return [{name: value for name, value in message.items() if name not in keys} for message in dialog]


def _with_end(content: Any, end: str) -> Any:
    """Return a message's content with an end to its text, or to the last of its texts."""
    if isinstance(content, str):
        return content + end
    last = max(i for i, part in enumerate(content) if "text" in part)
    return [{**part, "text": part["text"] + end} if i == last else part for i, part in enumerate(content)]


def _any_of(texts: list[str], flags: int = 0) -> re.Pattern[str]:
    """Return a pattern with one group that matches any of the texts, the longest that matches at a position."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")", flags)


def _apart(texts: list[str], spellings: list[str]) -> list[str]:
    """Return the texts that can nowhere overlap one of the spellings, whatever the case."""
    spellings = [spelling.lower() for spelling in spellings]
    starts = {spelling[:i] for spelling in spellings for i in range(1, len(spelling) + 1)}
    ends = {spelling[i:] for spelling in spellings for i in range(len(spelling))}

    def overlaps(text: str) -> bool:
        inside = any(text in spelling or spelling in text for spelling in spellings)
        return inside or any(text[i:] in starts or text[: i + 1] in ends for i in range(len(text)))

    return [text for text in texts if not overlaps(text.lower())]
