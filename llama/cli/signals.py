"""What is done when somebody ends the process: clean up on the way out, or first print what is complete."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, `kill` and torchrun, and a terminal that is closed, which is no signal on Windows. What a parent ignores, as
# nohup does, stays ignored.
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Whoever reads stdout may have stopped reading.
SECONDS_TO_PRINT = 5


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Make signals exceptions in this block: Ctrl-C is a KeyboardInterrupt, and the others are a SystemExit."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    with _handled(stop):
        yield


@contextlib.contextmanager
def before_end(finish: Callable[[], None]) -> Iterator[None]:
    """Have a signal that ends the process in this block call finish first.

    It is called in a thread of its own: the main thread may be in a kernel or in a collective, and cannot be asked.
    """
    reader, writer = socket.socketpair()  # Windows has no pipes that do not block
    writer.setblocking(False)  # as set_wakeup_fd asks

    def wait() -> None:
        if signalled := reader.recv(1):
            code = 128 + signalled[0]
            timer = threading.Timer(SECONDS_TO_PRINT, os._exit, (code,))
            timer.daemon = True
            timer.start()
            with contextlib.suppress(OSError):
                finish()
            os._exit(code)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    with _handled(lambda number, frame: None):
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            thread.join()
            reader.close()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    heeded = [number for number in ENDING if before[number] not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
