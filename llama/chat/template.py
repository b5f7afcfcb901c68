"""The chat format that comes with a model: a jinja template, rendered by another process (template_worker.py)."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama.chat.dialog import (
    REASONING_KEYS,
    keys_beside_text,
    map_texts,
    no_place_for_calls,
    plain_messages,
    tell_left_out,
    texts_of,
)
from llama.chat.llama2_tags import SPECIAL_TAGS
from llama.errors import one_line
from llama.tokenizer import Tokenizer

SECONDS = 5.0  # limit for one prompt, which takes a few milliseconds
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
# The keys of messages that templates read by name, and the values of them that templates compare with constants.
KEPT: dict[str, Sequence[str]] = dict.fromkeys(
    ("content", "text", "name", "tool_calls", "tool_call_id", "id", "function", "arguments", *REASONING_KEYS), ()
)
KEPT |= {"role": ROLES, "type": ("function", "text")}
# With -S and the caller's own path, jinja2 is found as the caller finds it, and no site module runs at the start.
START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
# Matches nowhere; has a group, like the patterns of _any_of.
NOTHING = re.compile("((?!))")


class TemplateChat:
    """A chat template: encodes the prompt that transformers' apply_chat_template renders.

    A control token in the prompt becomes its id only where the template wrote all of it. What came from a message is
    text, whatever it spells: whole, in pieces that template and message complete together, or after the template
    has trimmed, split, sliced, joined, upper-cased or JSON-encoded it.

    To know where a character came from, the dialog is rendered twice: as it is, and with placeholders for those
    characters of messages that occur in the spellings of control tokens. The two prompts must be equal apart from the
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
        spelling_of = {token: text for text, token in tokenizer.special_tokens.items()}
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._variables = {name: spelling_of[token] for name, token in named.items() if token in spelling_of}
        self._spellings = [text for text in tokenizer.special_tokens if text.strip()]
        self._characters = frozenset("".join(self._spellings))
        self._renderer = _Renderer()

    def encode(self, dialog: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encode the prompt of a dialog; BOS is where the template writes it, and nowhere else."""
        messages = plain_messages(dialog)
        self._check_keys(messages)
        prompt, originals = self._render(messages)
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

    def _check_keys(self, dialog: list[dict[str, Any]]) -> None:
        """Log keys of messages that the template leaves out: the prompt is the same without them.

        Raise ValueError where a message says nothing without its tool_calls, and those are left out.
        """
        new = [key for key in keys_beside_text(dialog) if key not in self._placed]
        calls = (i for i, each in enumerate(dialog) if each.get("tool_calls") and each.get("content") is None)
        call = next(calls, None)
        try:
            plain, *others = self._ask([dialog, *(_without(dialog, key) for key in new)])["prompts"] if new else [""]
        except ValueError:
            if call is not None and "tool_calls" not in self._source:
                raise no_place_for_calls(call, self._name) from None
            raise
        left_out = tuple(key for key, prompt in zip(new, others, strict=True) if prompt == plain)
        self._placed |= {*new} - {*left_out}
        if call is not None and "tool_calls" in left_out:
            raise no_place_for_calls(call, self._name)
        tell_left_out(self._name, left_out)

    def _render(self, dialog: list[dict[str, Any]]) -> tuple[str, dict[int, str]]:
        """Return the prompt with placeholders for characters of messages, and the original of each placeholder."""
        texts = list(texts_of(dialog))
        placeholders = _choose_placeholders(texts, self._characters, used=set("".join([self._source, *texts])))
        originals = {ord(placeholder): original for original, placeholder in placeholders.items()}
        table = str.maketrans(placeholders)
        # As tojson(ensure_ascii=true) writes them; what they stand for, it would have left as it is.
        escaped = {json.dumps(char)[1:-1]: char for original, char in placeholders.items() if original.isascii()}
        escapes = _any_of(list(escaped))

        def replace(text: str, unchanged: re.Pattern[str]) -> str:
            parts = unchanged.split(text)  # odd ones match
            return "".join([part if i % 2 else part.translate(table) for i, part in enumerate(parts)])

        for keep_constants in (False, True):
            unchanged = self._constants if keep_constants else NOTHING
            replaced = map_texts(dialog, functools.partial(replace, unchanged=unchanged), KEPT)
            plain, prompt = self._ask([dialog, replaced])["prompts"]
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

    def _ask(self, dialogs: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Return the prompts of dialogs, and the template's constants."""
        return self._renderer.ask({"source": self._source, "variables": self._variables, "dialogs": dialogs})


def _without(dialog: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return a dialog without a key of its messages, or without any of those that reasoning has."""
    keys = REASONING_KEYS if key in REASONING_KEYS else (key,)
    return [{name: value for name, value in message.items() if name not in keys} for message in dialog]


class _Renderer:
    """The process that renders templates, started when it is first needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; raise ValueError for an error of the template or a lack of time or memory."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start_process()
                self._end = weakref.finalize(self, _end_process, self._process)
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            line = ""
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                pass  # the process has ended
            finally:
                timer.cancel()
                if not line.endswith("\n"):  # also after Ctrl-C: a late answer would be taken for the next one
                    self._end()
        if not line.endswith("\n"):
            raise ValueError(f"the chat template was stopped: it takes more than {SECONDS:g} s or too much memory")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(one_line(answer["error"]))
        return answer


def _start_process() -> subprocess.Popen[str]:
    """Start template_worker.py, and wait until it is ready; raise ChildProcessError where it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", START, str(Path(__file__).with_name("template_worker.py")), *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _end_process(process)
        raise ChildProcessError("the process that renders chat templates did not start: is jinja2 installed?")
    return process


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes its pipes and waits


def _choose_placeholders(texts: list[str], characters: frozenset[str], used: set[str]) -> dict[str, str]:
    """Choose an unused character for each character of texts that is one of `characters`, in lower or upper case.

    Letters are replaced by letters of rare scripts, so that a change of case changes the placeholder alike.
    """
    used = used | characters
    pairs, singles = _unused_letters(used), _unused_characters(used)
    placeholders: dict[str, str] = {}
    for char in sorted(set("".join(texts))):
        forms = {char, *char.lower(), *char.upper(), *char.title()}
        if char in placeholders or char.isspace() or not forms & characters:
            continue
        lower, upper = char.lower(), char.upper()
        if lower != upper and lower.upper() == upper and upper.lower() == lower:
            placeholders[lower], placeholders[upper] = next(pairs, None) or (next(singles), next(singles))
        else:
            placeholders[char] = next(singles)
    return placeholders


def _unused_letters(used: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the lower and upper cases of letters of rare scripts that are not in use, Deseret's first."""
    for upper in map(chr, range(0x10400, 0x1E944)):
        lower = upper.lower()
        if lower != upper and lower.upper() == upper and not {lower, upper} & used:
            yield lower, upper


def _unused_characters(used: set[str]) -> Iterator[str]:
    """Yield private-use characters that are not in use; raise ValueError when there are no more."""
    for char in map(chr, itertools.chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))):
        if char not in used:
            yield char
    raise ValueError("a dialog uses all private-use characters of Unicode: leave out some")


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
