"""The prompts of a command: from its flags, from a file, or from stdin."""

from __future__ import annotations

import logging
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from llama.cli.flags import json_texts
from llama.cli.runner import is_first_rank
from llama.distributed.job import TIMEOUT, agree, from_first_rank, join_job

log = logging.getLogger("llama")

_T = typing.TypeVar("_T")

STDIN = "-"
HOW_TO_READ = f"--prompt {STDIN} takes it as one prompt, and --prompt_file {STDIN} takes each line as one"


def read_prompts(
    prompt: list[str] | None, prompt_file: Path | None, timeout: float = TIMEOUT, needed: bool = True
) -> list[str] | None:
    """The texts that --prompt and --prompt_file give; None where there are neither.

    The job's first rank reads files and stdin for all. ValueError, on every rank, where there is no text, and where
    prompts are needed, none are given and text waits at stdin.
    """
    return on_first_rank(lambda: _read_prompts(prompt, prompt_file, needed), timeout)


def on_first_rank(read: Callable[[], _T], timeout: float) -> _T:
    """On every rank what the job's first rank reads, or its ValueError or OSError; timeout as in `BuildOptions`."""
    join_job(timeout)
    with agree():
        value = read() if is_first_rank() else None
    return typing.cast(_T, from_first_rank(value))


def _read_prompts(prompt: list[str] | None, prompt_file: Path | None, needed: bool) -> list[str] | None:
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt_file both give prompts: leave one out")
    reads_stdin = prompt_file == Path(STDIN) or (prompt is not None and STDIN in prompt)
    given = prompt is not None or prompt_file is not None
    if not reads_stdin and (given or needed) and _stdin_waits():
        if not given:
            raise ValueError(f"stdin holds text, but no flag says to read it: {HOW_TO_READ}")
        log.warning("stdin holds text, and is not read: %s", HOW_TO_READ)
    if prompt_file is not None:
        return _prompts_of_lines(prompt_file)
    if prompt == []:
        raise ValueError("the list of prompts is empty: give at least one")
    if prompt is None or not reads_stdin:
        return prompt
    if prompt.count(STDIN) > 1:
        raise ValueError(f"--prompt {STDIN} is there {prompt.count(STDIN)} times, and stdin can be read once")
    content = read_text(Path(STDIN))
    whole = content.removesuffix("\n").removesuffix("\r")  # that ends the file, not the prompt
    return [whole if text == STDIN else text for text in prompt]


def _prompts_of_lines(path: Path) -> list[str]:
    """The lines of a file but for blank ones, or the texts of the JSON list that it holds."""
    content = read_text(path).removeprefix("\ufeff")
    texts = json_texts(content)
    if texts is None:
        lines = (line.removesuffix("\r") for line in content.split("\n"))
        texts = [line for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{_name(path)} holds no prompts: give one a line")
    return texts


def read_text(path: Path) -> str:
    """The text of a file, or for - of stdin, byte for byte. ValueError when it is empty or not UTF-8, or OSError."""
    if path == Path(STDIN):
        if sys.stdin.isatty():
            log.info("reading from the terminal; Ctrl-D at the beginning of a line ends the text")
        content = sys.stdin.buffer.read()
    elif path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file of text")
    else:
        content = path.read_bytes()
    if not content:
        raise ValueError(f"{_name(path)} is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{_name(path)} is not UTF-8 from byte {error.start} on: convert it, with iconv for example"
        ) from None


def _name(path: Path) -> str:
    return "stdin" if path == Path(STDIN) else str(path)


def _stdin_waits() -> bool:
    """Whether somebody has piped or redirected text to stdin; what a slow program will write later is not known."""
    try:
        import fcntl
        import termios

        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        return not sys.stdin.isatty() and any(waiting)
    except (ImportError, OSError):  # Windows; a device such as /dev/null, which holds nothing, or no file at all
        return False
