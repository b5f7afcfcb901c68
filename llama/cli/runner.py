"""Run a command: flags from the command line, one line and exit code 1 for a user's error, on one rank or many.

Imports torch only where ranks have to leave together, so that help and small commands come at once.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from llama.cli.flags import parse
from llama.cli.help import page
from llama.cli.progress import TerminalHandler
from llama.distributed.torchrun_env import read_torchrun_env
from llama.errors import error_line, is_caused_by_user

if typing.TYPE_CHECKING:
    from llama.distributed.watch import Watch

log = logging.getLogger("llama")

# Ranks that are not to speak wait this long for torchrun to end them, so that it does not end the one that speaks.
SECONDS_TO_SPEAK = 30


def is_first_rank() -> bool:
    """Whether this is the one process of the job that prints results; before any process group exists, too."""
    return read_torchrun_env().rank == 0


def run(command: Callable[..., None]) -> None:
    """Run a script's only command with the flags in sys.argv."""
    supervise(lambda: call(command, Path(sys.argv[0]).name, sys.argv[1:]))


def call(command: Callable[..., None], name: str, argv: Sequence[str]) -> None:
    """Call a command with flags, or print its help; ValueError where a flag is wrong."""
    arguments = parse(command, argv)
    if not isinstance(arguments, str):
        command(**arguments)
    elif is_first_rank():
        print(page(command, name, is_short=arguments in ("--help", "-h")))


def supervise(job: Callable[[], None]) -> None:
    """Do what a user asked for. A user's error is one line on stderr, from one rank, and exit code 1."""
    import llama.cli.ctrl_c  # noqa: F401  # changes what Ctrl-C does

    stdout_is_closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, and the next file to be opened would have its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # for as long as the process lives
    try:
        first = is_first_rank()
    except ValueError as error:
        _fail(error_line(error))
    handler = TerminalHandler(shows_progress=first)
    logging.basicConfig(handlers=[handler], level=logging.WARNING if first else logging.ERROR, format="%(message)s")
    log.setLevel(logging.INFO if first else logging.ERROR)  # other libraries' notes are for their own developers
    use_utf_8()
    try:
        try:
            job()
        except SystemExit:
            sys.stdout.flush()
            raise
        if stdout_is_closed and is_first_rank():
            raise ValueError("stdout is closed, so nothing could be printed: leave out >&-")
        _leave_together()
    except BrokenPipeError:
        discard_stdout()
        if (watch := _watch()) is not None:
            watch.end(None)
    except KeyboardInterrupt:
        handler.clear()
        sys.exit(130)
    except Exception as error:
        handler.clear()
        if not is_caused_by_user(error):
            raise
        _fail(error_line(error))


def use_utf_8() -> None:
    """Have texts be UTF-8 whatever the locale, but for a terminal's own encoding and that of PYTHONIOENCODING."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In the C locale Python takes ASCII alone, and makes characters of all other bytes. On Windows a file or a
            # pipe has the code page that the country had in 1985; what is read from one may be in it (`decode_text`).
            name = codecs.lookup(stream.encoding).name
            is_file = stream is not sys.stdin and not stream.isatty() and not os.environ.get("PYTHONIOENCODING")
            is_ours = name == "ascii" or (is_file and name != "utf-8")
            # A character that the terminal lacks shall not lose the rest.
            errors = "strict" if stream is sys.stdin else "backslashreplace"
            if is_ours or stream.errors != errors:
                stream.reconfigure(encoding="utf-8" if is_ours else None, errors=errors)


def discard_stdout() -> None:
    """Print to nobody from here on: the reader of stdout has seen enough, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _watch() -> Watch | None:
    """Return what watches the ranks, where this process has joined several."""
    job = sys.modules.get("llama.distributed.job")
    return None if job is None else job.watch_of_job()


def _leave_together() -> None:
    """End all ranks of a finished job at once, without the interpreter's clean-up.

    A rank that ends while another still talks to it can abort there: see D18.
    """
    if read_torchrun_env().world_size > 1:
        from llama.distributed.job import agree

        with agree():
            sys.stdout.flush()
        if (watch := _watch()) is not None:
            watch.leave()
        os._exit(0)
    sys.stdout.flush()


def _fail(message: str) -> typing.NoReturn:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        discard_stdout()
    if (watch := _watch()) is not None:
        watch.end(message)
    with contextlib.suppress(ValueError):  # which is the error
        if read_torchrun_env().local_rank > 0:
            time.sleep(SECONDS_TO_SPEAK)  # whoever lives on is the only one that failed
    sys.stderr.write(f"error: {message}\n")
    sys.exit(1)
