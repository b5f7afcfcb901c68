"""What takes long, as one line of a terminal that says how far it is, and goes when there is something else to read."""

from __future__ import annotations

import contextlib
import logging
import sys
import time

# What is counted is shown from here on: most models are loaded by then.
SECONDS_TO_SHOW = 1.0
SECONDS_TO_CHANGE = 0.1


class TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """Writes records to stderr; with shows_progress, and on a terminal, those of "llama.progress" on one line."""

    def __init__(self, shows_progress: bool) -> None:
        super().__init__(sys.stderr)
        self._shown = ""  # on the terminal's last line
        self._stage, self._began, self._changed = "", 0.0, 0.0
        if shows_progress and sys.stderr is not None and sys.stderr.isatty():
            logging.getLogger("llama.progress").setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "llama.progress":
            self.clear()
            super().emit(record)
            return
        now, stage = time.monotonic(), str(record.msg)
        if stage != self._stage:
            self._stage, self._began, self._changed = stage, now, 0.0
        counted = bool(record.args)
        if not counted or (now - self._began >= SECONDS_TO_SHOW and now - self._changed >= SECONDS_TO_CHANGE):
            self._changed = now
            self._write(record.getMessage())

    def clear(self) -> None:
        """Remove the progress that is shown."""
        if self._shown:
            self._write("")
            self._stage = ""

    def _write(self, text: str) -> None:
        # Spaces and not an escape sequence, which some terminals show.
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            self.stream.write("\r" + text.ljust(len(self._shown)) + ("" if text else "\r"))
            self.stream.flush()
        self._shown = text
