"""What the commands of a chat do: `/help` and those that it lists. Knows nothing of how a line was typed."""

from __future__ import annotations

import dataclasses
import enum
import glob
import json
import os
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.chat.dialog import Message
from llama.cli.constraints import read_constraints
from llama.cli.conversation import Conversation, check_opening, tell
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.suggestions import suggestion
from llama.distributed.job import agree, from_first_rank
from llama.engine.session_file import new_file
from llama.sampling import SamplingParams

# Sampling parameters that say what is returned of a completion, or how many: a chat shows one, as text.
NOT_OF_A_CHAT = ("logprobs", "echo", "n", "best_of", "top_logprobs")
COMMAND_WORD = re.compile(r"/[A-Za-z?][\w-]*")
WORDS_OF_VALUES = {"none": None, "null": None, "true": True, "on": True, "false": False, "off": False}


class Next(enum.Enum):
    """What the chat does after a command."""

    READ = enum.auto()
    ANSWER = enum.auto()
    EDIT = enum.auto()
    LEAVE = enum.auto()


@dataclass(frozen=True)
class ChatCommand:
    """One command: what may follow it, what it is for, and what it does with what followed."""

    words: str
    meaning: str
    run: Callable[[Conversation, str], Next]


def word_of(line: str) -> str | None:
    """Return the word of a line that is a command, or meant as one; None for a message, as are /a/path and " /x"."""
    word = line.split(maxsplit=1)[0] if line.startswith("/") else ""
    return word if COMMAND_WORD.fullmatch(word) else None


def perform(chat: Conversation, line: str) -> Next:
    """Do what a line with a command says, on every rank; ValueError or OSError where it cannot be done."""
    word = line.split(maxsplit=1)[0]
    argument = line[len(word) :]
    command = CHAT_COMMANDS.get(word)
    if command is None:
        close = suggestion(word, CHAT_COMMANDS)
        hint = f"did you mean {close}?" if close else "/help tells what there is"
        raise ValueError(f"{word} is no command, and was not sent: {hint} (to send it, begin with a space)")
    argument = argument.strip()
    if argument and not command.words:
        raise ValueError(f"{word} takes nothing after it, got {argument!r:.80}")
    return command.run(chat, argument)


def completions(line: str) -> list[str]:
    """Return what a line may become: its command or, behind the first space, a parameter or a file."""
    word, space, rest = line.partition(" ")
    if not space:
        return [name for name in CHAT_COMMANDS if word.startswith("/") and name.startswith(word)]
    if word == "/set" and " " not in rest:
        return [name for name in settable() if name.startswith(rest)]
    if word in ("/save", "/load"):
        return sorted(path + os.sep * os.path.isdir(path) for path in glob.glob(os.path.expanduser(rest) + "*"))
    return []


def settable() -> dict[str, Any]:
    """Return the sampling parameters that a chat can use, with their types."""
    hints = typing.get_type_hints(SamplingParams)
    fields = (field.name for field in dataclasses.fields(SamplingParams))
    return {name: hints[name] for name in fields if name not in NOT_OF_A_CHAT}


def with_value(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """Return sampling parameters with one that is given as text: a text as it is, anything else as JSON.

    ValueError names what is wrong.
    """
    kinds = settable()
    if name not in kinds:
        close = suggestion(name, kinds)
        raise ValueError(f"there is no {name!r} to set: " + (f"did you mean {close}?" if close else "/set lists all"))
    kind = kinds[name]
    types = typing.get_args(kind) or (kind,)
    value: Any = text
    if text.lower() in WORDS_OF_VALUES and (bool in types or type(None) in types):
        value = WORDS_OF_VALUES[text.lower()]
    elif str not in types or text[:1] in ("[", '"'):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
    if bool in types and not isinstance(value, bool):
        raise ValueError(f"{name} is on or off, got {text!r:.80}")
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(value)
    changed: Mapping[str, Any] = {name: value}
    return dataclasses.replace(params, **changed)


def write_dialog(path: Path, messages: Sequence[Message]) -> None:
    """Write messages as JSON; ValueError where another kind of file is there."""
    if path.exists():
        read_dialog(path, "is there, and holds no messages: it was not overwritten")
    with new_file(path) as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=False, indent=1).encode() + b"\n")


def read_dialog(path: Path, otherwise: str = "holds no messages, as /save writes them") -> list[Message]:
    """Return the messages of a JSON file, which may also be a bare list of them.

    Raises ValueError, which goes on with `otherwise`, for any other file, and OSError where it cannot be read.
    """
    if path.exists() and not path.is_file():  # to read a terminal would wait for it
        raise ValueError(f"{path} is no file")
    try:
        found = json.loads(path.read_bytes())
        messages = found["messages"] if isinstance(found, dict) else found
        is_right = isinstance(messages, list) and all(
            isinstance(each["role"], str) and isinstance(each["content"], str) for each in messages
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_right = False
    if not is_right:
        raise ValueError(f"{path} {otherwise}")
    return typing.cast(list[Message], messages)


def _help(chat: Conversation, argument: str) -> Next:
    for name, command in CHAT_COMMANDS.items():
        tell(f"  {f'{name} {command.words}':<19} {command.meaning}")
    tell("Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves. A space before a / makes it a message.")
    return Next.READ


def _reset(chat: Conversation, argument: str) -> Next:
    chat.reset()
    return Next.READ


def _undo(chat: Conversation, argument: str) -> Next:
    text = chat.last_message
    chat.undo()
    tell(f"undone: {_beginning(text)}")
    return Next.READ


def _retry(chat: Conversation, argument: str) -> Next:
    chat.unanswer()
    return Next.ANSWER


def _edit(chat: Conversation, argument: str) -> Next:
    if not argument:
        chat.last_message  # noqa: B018  # raises where there is none
        return Next.EDIT
    chat.undo()
    chat.ask(argument)
    return Next.ANSWER


def _system(chat: Conversation, argument: str) -> Next:
    if argument:
        system = None if argument == '""' else argument
        check_opening(chat.llm, system, "the system prompt")
        chat.system = system
    tell("no system prompt" if chat.system is None else f"system prompt: {chat.system}")
    return Next.READ


def _set(chat: Conversation, argument: str) -> Next:
    name, _, text = argument.partition(" ")
    if text:
        chat.params = read_constraints(with_value(chat.params, name, text.strip()))
    elif name and name not in settable():
        with_value(chat.params, name, "")  # raises
    for each in [name] if name else settable():
        value = getattr(chat.params, each)
        tell(f"{each} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return Next.READ


def _show(chat: Conversation, argument: str) -> Next:
    for message in chat.messages:
        before = {"user": "> ", "assistant": ""}.get(message["role"], f"{message['role']}: ")
        tell(f"{before}{message['content']}")
    defaults = SamplingParams()
    always = ("temperature", "top_p")
    values = {name: getattr(chat.params, name) for name in settable()}
    shown = [f"{name} {value}" for name, value in values.items() if name in always or value != getattr(defaults, name)]
    forgotten = f", {chat.n_forgotten} of them forgotten" if chat.n_forgotten else ""
    tell(
        f"({len(chat.messages)} messages{forgotten}, about {chat.count()} of {chat.llm.model.args.max_seq_len} tokens; "
        f"{', '.join(shown)})"
    )
    return Next.READ


def _save(chat: Conversation, argument: str) -> Next:
    path = _path("/save", argument)
    with agree():
        if is_first_rank():
            write_dialog(path, chat.messages)
    tell(f"saved {len(chat.messages)} messages in {path}")
    return Next.READ


def _load(chat: Conversation, argument: str) -> Next:
    path = _path("/load", argument)
    messages: list[Message] = []
    with agree():
        if is_first_rank():
            messages = read_dialog(path)
    chat.replace(from_first_rank(messages))
    tell(f"loaded {len(chat.messages)} messages from {path}")
    return Next.READ


def _stats(chat: Conversation, argument: str) -> Next:
    if is_first_rank():
        report(chat.llm)
    return Next.READ


def _leave(chat: Conversation, argument: str) -> Next:
    return Next.LEAVE


def _path(word: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{word} needs a file, as in {word} talk.json")
    return Path(os.path.expanduser(argument))


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


CHAT_COMMANDS = {
    "/help": ChatCommand("", "tells the commands", _help),
    "/reset": ChatCommand("", "forgets the conversation, but for the system prompt", _reset),
    "/undo": ChatCommand("", "takes the last message and its answer back", _undo),
    "/retry": ChatCommand("", "has the last message answered again", _retry),
    "/edit": ChatCommand("[TEXT]", "changes the last message, and has it answered", _edit),
    "/system": ChatCommand("[TEXT]", 'tells or changes the system prompt; "" is none', _system),
    "/set": ChatCommand("[NAME [VALUE]]", "tells or changes a sampling parameter: /set temperature 0.3", _set),
    "/show": ChatCommand("", "shows the conversation, and how full the context is", _show),
    "/save": ChatCommand("FILE", "writes the messages as JSON", _save),
    "/load": ChatCommand("FILE", "goes on from messages in a file", _load),
    "/stats": ChatCommand("", "tells speeds and memory", _stats),
    "/exit": ChatCommand("", "ends the chat, as does Ctrl-D", _leave),
}
