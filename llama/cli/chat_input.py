"""How a message is typed: with prompt_toolkit, with readline where it is missing, or with what Python has by itself.

Knows nothing of what a line means.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "
MOST_REMEMBERED = 1000  # messages
# Terminals that obey no escape sequences, by TERM.
PLAIN_TERMINALS = ("dumb", "unknown")

# What the line before the cursor may be completed to: see `completed_part`.
Complete = Callable[[str], list[str]]


class LineReader(Protocol):
    """Reads a message from a terminal.

    Raises EOFError for Ctrl-D where nothing is typed, and KeyboardInterrupt for Ctrl-C.
    """

    def read(self, draft: str = "") -> str:
        """Return what is typed; draft: what there is already, to be edited."""
        ...

    @property
    def left(self) -> str:
        """What was typed before Ctrl-C."""
        ...


def terminal_reader(complete: Complete) -> LineReader:
    """Return the best way of reading that is installed and that the terminal can do."""
    history = History(history_file())
    if os.environ.get("TERM") not in PLAIN_TERMINALS:
        with contextlib.suppress(ImportError):
            return PromptToolkitReader(complete, history)
    with contextlib.suppress(ImportError):
        return ReadlineReader(complete, history)
    return PlainReader()


def history_file() -> Path:
    """Return where what was typed is kept: in the user's folder of state."""
    folder = os.environ.get("XDG_STATE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(folder) if folder else Path(os.path.expanduser("~/.local/state"))) / "llama" / "chat_history"


class History:
    """What was typed in earlier runs and in this one: a JSON text a line, in a file that only its owner reads.

    Where the file cannot be read or written, there is this run's alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_REMEMBERED:]:
                with contextlib.suppress(ValueError):
                    self.lines += [text] if isinstance(text := json.loads(line), str) else []

    def add(self, text: str) -> None:
        """Remember a text, unless it is the last one again."""
        if not text.strip() or self.lines[-1:] == [text]:
            return
        self.lines.append(text)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")


class PromptToolkitReader:
    """Edits messages of several lines: Enter sends, Alt-Enter begins a line, and what is pasted stays one message."""

    def __init__(self, complete: Complete, history: History) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.shortcuts import CompleteStyle

        class LineCompleter(Completer):
            def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
                line = document.text_before_cursor
                for found in complete(line):
                    yield Completion(found, start_position=-len(completed_part(line)))

        self._history = history
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(history.lines),
            completer=LineCompleter(),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, number, is_wrapped: " " * width,
            key_bindings=_keys(),
        )

    def read(self, draft: str = "") -> str:
        """See `LineReader`."""
        try:
            text = self._session.prompt(PROMPT, default=draft)
        except Exception as error:
            if type(error).__module__ != "termios":
                raise
            raise EOFError from error  # the terminal has gone, or belongs to another program
        self._history.add(text)
        return text

    @property
    def left(self) -> str:
        """See `LineReader`."""
        return self._session.default_buffer.text


def _keys() -> KeyBindings:
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys, in_message = KeyBindings(), has_focus(DEFAULT_BUFFER)  # and not where the history is searched

    @keys.add("enter", filter=in_message)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=in_message)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class ReadlineReader:
    """Edits with readline, which takes what is pasted as one message where the terminal says so."""

    def __init__(self, complete: Complete, history: History) -> None:
        import readline

        self._readline, self._history = readline, history
        for line in history.lines:
            self._remember(line)
        readline.set_auto_history(False)
        readline.set_completer(lambda text, number: next(iter(complete(self._before_cursor())[number:]), None))
        readline.set_completer_delims(" ")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if os.environ.get("TERM") not in PLAIN_TERMINALS:
                readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
            readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter

    def read(self, draft: str = "") -> str:
        """See `LineReader`."""
        self._readline.set_startup_hook(lambda: self._readline.insert_text(draft))
        try:
            text = typed()
        finally:
            self._readline.set_startup_hook(None)
        self._remember(text)
        self._history.add(text)
        return text

    def _remember(self, text: str) -> None:
        with contextlib.suppress(UnicodeEncodeError):  # what the locale cannot write, as in the C locale
            self._readline.add_history(text)

    @property
    def left(self) -> str:
        """See `LineReader`."""
        return self._readline.get_line_buffer()

    def _before_cursor(self) -> str:
        return self._readline.get_line_buffer()[: self._readline.get_endidx()]


class PlainReader:
    """Reads a line as the terminal gives it, on Windows with its own editing."""

    left = ""

    def read(self, draft: str = "") -> str:
        """See `LineReader`; the draft is shown, to be typed anew."""
        if draft:
            print(f"it was: {draft}", file=sys.stderr)
        return typed()


def typed() -> str:
    """Return a line from the terminal; Ctrl-C and Ctrl-D end the line that they are typed on."""
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        print()
        raise


def completed_part(line: str) -> str:
    """Return what completions stand for: what is behind the first space of a line, or else all of it."""
    return line.partition(" ")[2] if " " in line else line
