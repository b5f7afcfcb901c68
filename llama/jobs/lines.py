"""The lines of a job's input, one at a time: of a file that any number of replicas read, or of a pipe.

Knows nothing of what a line says.
"""

from __future__ import annotations

import codecs
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# The name of stdin and stdout on a command line.
STANDARD_STREAM = Path("-")
# Names that say what a line is; else the first line says it.
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIX = ".txt"
# Lines that a replica takes at once: so few that the last ones to end hold nobody for long.
BUNDLE_LINES = 16
# A bundle that no input has: whoever takes it, or a later one, is done.
NO_BUNDLE = 1 << 40
# Lines of a pipe that are read before they are asked for.
LINES_AHEAD = 64


class InputLine(NamedTuple):
    """A line of an input that is not blank."""

    number: int  # from 0, blank ones counted
    content: bytes  # without its end
    stop: int  # bytes of the input, up to the end of the line


class JobInput:
    """The lines of an input, from its beginning on each time that it is iterated, if it is a file."""

    def __init__(self, path: Path, is_text: bool = False) -> None:
        """Open a file, or stdin for -; raise OSError where it cannot be read.

        is_text: whether each line is a prompt as it stands, whatever the name and the first line say.
        """
        self.path = path
        self._file = sys.stdin.buffer if path == STANDARD_STREAM else path.open("rb")
        self._stat = os.fstat(self._file.fileno())
        # Whether lines are JSON; known when the first line is.
        self.is_json = path.suffix.lower() in JSON_SUFFIXES and not is_text
        self._is_known = is_text or self.is_json or path.suffix.lower() == TEXT_SUFFIX

    @property
    def name(self) -> str:
        """What messages call it."""
        return "stdin" if self.path == STANDARD_STREAM else str(self.path)

    @property
    def is_file(self) -> bool:
        """Whether it can be read again: stdin is not, even if it is a file."""
        return self.path != STANDARD_STREAM and stat.S_ISREG(self._stat.st_mode)

    @property
    def nbytes(self) -> int | None:
        """Its size, where that is known before it is read."""
        return self._stat.st_size if stat.S_ISREG(self._stat.st_mode) else None

    def is_same_file(self, path: Path) -> bool:
        """Tell whether a path leads to this file."""
        return path.exists() and os.path.samestat(self._stat, path.stat())

    def __iter__(self) -> Iterator[InputLine]:
        if self.is_file:
            self._file.seek(0)
        stop = 0
        for number, raw in enumerate(self._file):
            stop += len(raw)
            content = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 0:
                content = content.removeprefix(codecs.BOM_UTF8)
            if content and not content.isspace():
                if not self._is_known:
                    self.is_json, self._is_known = content.lstrip()[:1] in (b"{", b'"'), True
                yield InputLine(number, content, stop)


def deal(lines: Iterable[InputLine], take: Callable[[], int]) -> Iterator[InputLine]:
    """Yield one replica's lines of those that all replicas see: the bundles whose numbers it takes, when it needs them.

    take: returns 0, 1, 2 and so on, each to one of the replicas.
    """
    mine = -1
    for place, line in enumerate(lines):
        while mine < place // BUNDLE_LINES:
            mine = take()
        if mine >= NO_BUNDLE:
            return
        if mine == place // BUNDLE_LINES:
            yield line


def read_ahead(lines: Iterable[InputLine]) -> Callable[[bool], InputLine | None]:
    """Read lines that may come slowly in a thread, so that who runs those that are there need not wait for more.

    Return a function for the next line: its argument says whether to wait, without which it returns None where none is
    there yet. It raises EOFError after the last line, and what reading raises.
    """
    found: queue.Queue[InputLine | BaseException] = queue.Queue(LINES_AHEAD)

    def read() -> None:
        try:
            for line in lines:
                found.put(line)
            found.put(EOFError())
        except Exception as error:
            found.put(error)

    threading.Thread(target=read, name="llama-input", daemon=True).start()

    def next_line(wait: bool) -> InputLine | None:
        try:
            line = found.get(wait)
        except queue.Empty:
            return None
        if isinstance(line, BaseException):
            raise line
        return line

    return next_line


def read_now(lines: Iterable[InputLine]) -> Callable[[bool], InputLine | None]:
    """Return a function for the next line, as of `read_ahead`, of a file whose lines are there."""
    left = iter(lines)

    def next_line(wait: bool) -> InputLine | None:
        for line in left:
            return line
        raise EOFError

    return next_line
