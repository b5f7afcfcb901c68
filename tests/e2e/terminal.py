"""A pseudo terminal with a program on it, and the hands of a user."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence

from tests.e2e.processes import TIMEOUT, heed_interrupts, started

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    def __init__(self, descriptor: int, process: subprocess.Popen[str]) -> None:
        self.descriptor = descriptor
        self.process = process
        self.screen = ""  # everything that was waited for
        self._pending = ""

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def press(self, key: str) -> None:
        """Type a key after a human's pause: CPython loses a Ctrl-C that comes just before readline waits for keys."""
        time.sleep(1)
        self.type(key)

    def wait_for(self, text: str) -> str:
        """What is newly shown, up to and with `text`; AssertionError or EOFError when it never comes."""
        shown = ""
        while text not in shown:
            shown += self._read()
        stop = shown.index(text) + len(text)
        self._pending = shown[stop:]  # the rest belongs to the next wait
        self.screen += shown[:stop]
        return shown[:stop]

    def wait_for_end(self) -> str:
        """What is newly shown until the program ends."""
        shown = ""
        with contextlib.suppress(EOFError):
            while True:
                shown += self._read()
        self.process.wait(TIMEOUT)
        self.screen += shown
        return shown

    @property
    def echoes(self) -> bool:
        """Whether what is typed is shown, as a shell expects."""
        return bool(termios.tcgetattr(self.descriptor)[3] & termios.ECHO)

    def _read(self) -> str:
        if self._pending:
            pending, self._pending = self._pending, ""
            return pending
        ready, _, _ = select.select([self.descriptor], [], [], TIMEOUT)
        assert ready, f"nothing new after:\n{self.screen}"
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:  # Linux: the program has closed the terminal
            data = b""
        if not data:
            raise EOFError(f"the program ended after:\n{self.screen}")
        return data.decode(errors="replace").replace("\r\n", "\n")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    heed_interrupts()


@contextlib.contextmanager
def terminal(command: Sequence[object], env: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """Start a program on a terminal of its own, which Ctrl-C reaches as it would a user's.

    env: changes of its environment, in which it shows no escape sequences and keeps no history.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    with started(
        command,
        env={"TERM": "dumb", "XDG_STATE_HOME": os.devnull, **(env or {})},
        stdin=its,
        stdout=its,
        stderr=its,
        preexec_fn=_take_terminal,
    ) as process:
        os.close(its)
        try:
            yield Terminal(ours, process)
        finally:
            os.close(ours)
