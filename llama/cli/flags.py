"""From words on a command line to arguments of a function, by its types: values are taken verbatim.

A parameter whose type is a dataclass becomes one flag for each field. Knows nothing of models or of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.cli.suggestions import suggestion

REQUIRED = inspect.Parameter.empty
# What asks for help, and for all of it.
HELP = ("--help", "-h", "--help_all", "--help-all")
# Types whose flags may be repeated, and may hold a JSON list.
TEXTS = (list[str], tuple[str, ...])
IDS = tuple[int, ...]
BIASES = Mapping[int, float]


@dataclass(frozen=True)
class Late:
    """A default that is looked up only where its flag is not given; help calls it by its name."""

    name: str
    find: Callable[[], Any]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fields:
    """How the fields of a dataclass become flags of a command: `options: Annotated[Options, Fields(...)]`.

    Args:
        heading: what help puts above them.
        hidden: fields that are no flags.
        words: fields that may come without their flag, too, in this order.
        defaults: values of fields that are not given, hidden ones included, where they are not the dataclass's own.
        rare: fields whose flags a short help only names.
    """

    heading: str
    hidden: Sequence[str] = ()
    words: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rare: Sequence[str] = ()


@dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Args:
        name: the flag without its dashes.
        types: the types that its value may have.
        meaning: what it is for, from the docstring.
        default: its value where it is not given; REQUIRED where it must be.
        parameter: the function's parameter that gets the value, or the object with the value in it.
        is_word: whether the value may come without the flag.
        heading: what help puts above it.
        is_rare: whether a short help only names it.
    """

    name: str
    types: tuple[Any, ...]
    meaning: str
    default: Any
    parameter: str
    is_word: bool
    heading: str | None = None
    is_rare: bool = False

    @property
    def takes_texts(self) -> bool:
        """Whether it may be repeated for several texts."""
        return any(kind in TEXTS for kind in self.types)

    @property
    def shown(self) -> str:
        """How messages call it: DST for a word that must be given, else --dst."""
        return self.name.upper() if self.is_word and self.default is REQUIRED else f"--{self.name}"


def flags_of(command: Callable[..., None]) -> dict[str, Flag]:
    """All flags of a command by their names: its parameters, and for a dataclass the fields in its place."""
    flags: dict[str, Flag] = {}
    meanings = _meanings(command)
    for parameter, hint in _parameters(command):
        kind, fields = _dataclass(hint)
        if kind is None:
            is_word = parameter.kind is not parameter.KEYWORD_ONLY
            name = parameter.name
            flags[name] = Flag(name, _types(hint), meanings[name], parameter.default, name, is_word)
            continue
        hints, field_meanings = typing.get_type_hints(kind), _meanings(kind)
        for each in dataclasses.fields(kind):
            if each.name not in fields.hidden:
                default = REQUIRED if each.default is dataclasses.MISSING else each.default
                flags[each.name] = Flag(
                    each.name,
                    _types(hints[each.name]),
                    field_meanings[each.name],
                    fields.defaults.get(each.name, default),
                    parameter.name,
                    each.name in fields.words,
                    fields.heading,
                    each.name in fields.rare,
                )
    return flags


def parse(command: Callable[..., None], argv: Sequence[str]) -> dict[str, Any] | str:
    """The arguments of a command, or the flag that asks for help. ValueError names the flag that is wrong."""
    flags = flags_of(command)
    texts = _read(flags, argv)
    if isinstance(texts, str):
        return texts
    missing = [flag.shown for flag in flags.values() if flag.default is REQUIRED and flag.name not in texts]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given: see --help")
    values = {name: _value(flags[name], text) for name, text in texts.items()}
    arguments: dict[str, Any] = {}
    for parameter, hint in _parameters(command):
        given = {name: value for name, value in values.items() if flags[name].parameter == parameter.name}
        kind, fields = _dataclass(hint)
        if kind is None:
            arguments |= given
            continue
        defaults = {name: value for name, value in fields.defaults.items() if name not in given}
        found = {name: value.find() if isinstance(value, Late) else value for name, value in defaults.items()}
        arguments[parameter.name] = kind(**found, **given)
    return arguments


def section(documented: object, title: str) -> list[str]:
    """The lines of a docstring's section, such as Args, without their indentation; none where there is none."""
    lines = (inspect.getdoc(documented) or "").splitlines()
    if f"{title}:" not in lines:
        return []
    start = lines.index(f"{title}:") + 1
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return [line[4:] for line in lines[start:stop]]


def _meanings(documented: object) -> dict[str, str]:
    """The Args of a docstring by name; lines that are indented further go on."""
    entries = re.split(r"\n(?! )", "\n".join(section(documented, "Args")))
    pairs = [entry.partition(": ") for entry in entries if entry]
    return {name: " ".join(meaning.split()) for name, _, meaning in pairs}


def _parameters(command: Callable[..., None]) -> list[tuple[inspect.Parameter, Any]]:
    hints = typing.get_type_hints(command, include_extras=True)
    return [(parameter, hints[parameter.name]) for parameter in inspect.signature(command).parameters.values()]


def _dataclass(hint: Any) -> tuple[Any, Fields]:
    """The dataclass that a hint names, or None, and how its fields become flags."""
    kind, *metadata = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    fields = next((each for each in metadata if isinstance(each, Fields)), Fields("options"))
    return (kind if dataclasses.is_dataclass(kind) else None), fields


def _types(hint: Any) -> tuple[Any, ...]:
    """The types of a union, and a type that is none as it is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _read(flags: Mapping[str, Flag], argv: Sequence[str]) -> dict[str, Any] | str:
    """The text of each flag that is given, a list of them where it may be repeated; or the flag that asks for help."""
    texts: dict[str, Any] = {}
    rest = iter(argv)
    for word in rest:
        if word in HELP:
            return word
        if not word.startswith("--"):
            words = (flag for flag in flags.values() if flag.is_word)
            name = next((flag.name for flag in words if flag.name not in texts or list[str] in flag.types), None)
            if name is None:
                is_prompt = "prompt" in flags and not word.startswith("-")
                close = suggestion(word[1:], flags) if word.startswith("-") else None
                other = f": did you mean --{close}?" if close else ": see --help"
                example = f", as in --prompt {word!r}" if is_prompt else other
                raise ValueError(f"unexpected argument {word!r}: every value follows its flag{example}")
            texts[name] = [*texts.get(name, []), word] if list[str] in flags[name].types else word
            continue
        said, given, text = word[2:].partition("=")
        name = said.replace("-", "_")
        if name not in flags:
            close = suggestion(name, flags)
            raise ValueError(f"unknown flag --{said}: " + (f"did you mean --{close}?" if close else "see --help"))
        if bool in flags[name].types:
            texts[name] = text or "True"
            continue
        if not given:
            try:
                text = next(rest)
            except StopIteration:
                raise ValueError(f"--{said} needs a value") from None
        if flags[name].takes_texts:
            texts[name] = texts.get(name, []) + _verbatim(name, text)
        elif IDS in flags[name].types:
            texts[name] = texts.get(name, []) + [text]
        else:
            texts[name] = text
    return texts


def _verbatim(name: str, text: str) -> list[str]:
    """One text as it is, unless it is a JSON list of texts."""
    text = _typed_text(name, text)
    texts = json_texts(text)
    return [text] if texts is None else texts


def _typed_text(name: str, word: str) -> str:
    """A word of the command line as the text that was typed, whatever Python's locale made of it."""
    try:
        return decode_text(os.fsencode(word), sys.getfilesystemencoding())
    except UnicodeError:
        raise ValueError(f"--{name} is not valid UTF-8: {word!a}") from None


def decode_text(data: bytes, encoding: str) -> str:
    """Bytes as UTF-8 or, where they are none, in the locale's encoding, which may be ASCII: UnicodeDecodeError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
        raise error from None


def json_texts(text: str) -> list[str] | None:
    """The texts of a JSON list that holds nothing else; None where it is no such list."""
    if text.lstrip().startswith("["):
        try:
            texts = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(texts, list) and all(isinstance(each, str) for each in texts):
            return texts
    return None


def _value(flag: Flag, text: Any) -> Any:
    """The value of a flag from its text, by its types."""
    if Path in flag.types or os.PathLike[str] in flag.types:
        if not text:  # an unset variable; as a path it would be the current folder
            raise ValueError(f"{flag.shown} must be a path, got ''")
        text = os.path.expanduser(text)  # a shell does not look behind the = of --name=~/x
    elif str in flag.types:
        return _typed_text(flag.name, text)
    if flag.takes_texts:
        return text if list[str] in flag.types else tuple(text)
    if str in flag.types:
        return text
    if IDS in flag.types:
        return tuple(token for part in text for token in _ids(flag, part))
    if type(None) in flag.types and text == "None":
        return None
    if BIASES in flag.types:
        return _biases(flag, text)
    if Path in flag.types:
        return Path(text)
    if bool in flag.types:
        if text not in ("True", "False", "true", "false"):
            raise ValueError(f"--{flag.name} is on or off: give it alone, got {text!r}")
        return text.lower() == "true"
    number = float if float in flag.types else int
    try:
        return number(text)
    except ValueError:
        what = "a number" if number is float else "an integer"
        raise ValueError(f"--{flag.name} must be {what}, got {text!r}") from None


def _ids(flag: Flag, text: str) -> list[int]:
    """Token ids from 1,2,3 or from a JSON list."""
    inside = text.strip().removeprefix("[").removesuffix("]")
    try:
        return [int(each) for each in inside.split(",")] if inside.strip() else []
    except ValueError:
        raise ValueError(f"--{flag.name} must be token ids, as 1,2,3 or [1, 2, 3] are, got {text!r}") from None


def _biases(flag: Flag, text: str) -> dict[int, float]:
    """Numbers for token ids from a JSON object."""
    try:
        found = {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError, RecursionError):
        found = {0: math.nan}
    if any(math.isnan(bias) for bias in found.values()):
        example = '\'{"504": -2.5, "30": 1}\''
        raise ValueError(f"--{flag.name} must be a JSON object of token ids and numbers, as {example} is, got {text!r}")
    return found


def placeholder(flag: Flag) -> str:
    """What help puts in the place of a value: nothing for a switch."""
    words: dict[Any, str] = {bool: "", **dict.fromkeys(TEXTS, "TEXT"), IDS: "IDS", BIASES: "JSON"}
    words |= {Path: "PATH", os.PathLike[str]: "PATH", float: "X", int: "N"}
    return next((word for kind, word in words.items() if kind in flag.types), "VALUE")
