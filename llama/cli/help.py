"""The help page of a command: its docstring, with its flags under headings, as wide as the terminal."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Callable

from llama.cli.flags import REQUIRED, Flag, flags_of, placeholder, section

# Of a line: as many as the terminal has, or as most have where help goes elsewhere.
MOST_COLUMNS, USUAL_COLUMNS = 100, 80
OF_THIS_RUN = "this run"
# What a reader looks for elsewhere than beside the rest of its object: after the flags there.
HEADINGS = {
    "seed": "sampling",
    **dict.fromkeys(("logprobs", "top_logprobs", "echo", "n", "json", "show_probs", "html"), "output"),
}


def page(command: Callable[..., None], name: str, is_short: bool = False) -> str:
    """The help of a command, which the user calls by `name`: "llama complete", or a script's file.

    is_short: rare flags are only named, below the others of their heading.
    """
    columns = min(MOST_COLUMNS, shutil.get_terminal_size((USUAL_COLUMNS, 24)).columns)
    flags = flags_of(command)
    summary = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
    usage = textwrap.fill(_usage(flags, name), columns, subsequent_indent="    ", break_on_hyphens=False)
    parts = [usage, *(textwrap.fill(" ".join(text.split()), columns) for text in summary.split("\n\n"))]
    shown = [flag for flag in flags.values() if not (is_short and flag.is_rare)]
    indent = 4 + max((len(_left(flag)) for flag in shown), default=0)
    for heading, group in _by_heading(flags).items():
        entries = [_entry(flag, indent, columns) for flag in group if flag in shown]
        if unshown := [flag.shown for flag in group if flag not in shown]:
            more = f"and, told by --help_all: {', '.join(unshown)}"
            wrapped = textwrap.wrap(more, columns - 4, break_on_hyphens=False)
            entries.append("  " + "\n    ".join(wrapped))
        parts.append("\n".join([f"{heading}:", *entries]))
    examples = section(command, "Examples")
    if examples:
        parts.append("\n".join(["examples:", *(_example(_called(line, name), columns) for line in examples)]))
    return "\n\n".join(parts)


def _by_heading(flags: dict[str, Flag]) -> dict[str, list[Flag]]:
    """The command's own flags first, and rare ones last; one that has no others needs no headings."""
    if not any(flag.heading for flag in flags.values()):
        return {"flags": list(flags.values())} if flags else {}
    groups: dict[str, list[Flag]] = {OF_THIS_RUN: []}
    for flag in sorted(flags.values(), key=lambda flag: (flag.is_rare, flag.name in HEADINGS)):
        groups.setdefault(HEADINGS.get(flag.name, flag.heading or OF_THIS_RUN), []).append(flag)
    return {heading: group for heading, group in groups.items() if group}


def _usage(flags: dict[str, Flag], name: str) -> str:
    """The words and flags that must be given are named; the others are not."""
    parts = [f"usage: {name}"]
    for flag in flags.values():
        if flag.is_word:
            word = flag.name.upper() + "..." * (list[str] in flag.types)
            parts.append(word if flag.default is REQUIRED else f"[{word}]")
        elif flag.default is REQUIRED:
            parts.append(_left(flag))
    return " ".join([*parts, "[--flag value]..."] if len(parts) <= len(flags) else parts)


def _entry(flag: Flag, indent: int, columns: int) -> str:
    """A flag and its meaning beside it; "; default: what" in the docstring and the default's value look alike."""
    meaning, _, default = flag.meaning.rstrip(".").partition("; default: ")
    if (
        not default
        and flag.default is not REQUIRED
        and flag.default is not None
        and flag.default is not False
        and flag.default != ()
    ):
        default = json.dumps(flag.default) if isinstance(flag.default, tuple) else str(flag.default)
    text = meaning + (f" (default: {default})" if default else "")
    lines = textwrap.wrap(text, max(columns - indent, 24), break_on_hyphens=False, break_long_words=False)
    return f"  {_left(flag):{indent - 2}}" + ("\n" + " " * indent).join(lines)


def _left(flag: Flag) -> str:
    return f"{flag.shown} {placeholder(flag)}".strip() if flag.shown.startswith("--") else flag.shown


def _example(line: str, columns: int) -> str:
    """An example in lines that a shell takes as one; what is quoted stays together."""
    lines = ["  "]
    for word in re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", line):
        if len(lines[-1]) + len(word) > columns - 3 and lines[-1].strip():  # room for a space and a backslash
            lines[-1] += "\\"
            lines.append("      ")
        lines[-1] += word + " "
    return "\n".join(lines).rstrip()


def _called(example: str, name: str) -> str:
    """An example as the user has to type it who does not call the command by `llama`."""
    if name.startswith("llama "):
        return example
    return re.sub(r"^llama \w+", f"python {name}", re.sub(r"-m llama \w+", name, example))
