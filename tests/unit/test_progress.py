"""What takes long is shown on a terminal, and nowhere else."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from llama.cli.progress import TerminalHandler

log = logging.getLogger("llama")
progress = logging.getLogger("llama.progress")


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def lines(self) -> list[str]:
        """As a terminal shows them, where a carriage return leads to a line's beginning."""
        shown = []
        for line in self.getvalue().split("\n"):
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells).rstrip())
        return shown


@pytest.fixture
def restored() -> Iterator[None]:
    level, own = log.level, progress.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)
    progress.setLevel(own)
    for handler in [each for each in log.handlers if isinstance(each, TerminalHandler)]:
        log.removeHandler(handler)


def screen(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, shows_progress: bool = True) -> Screen:
    found = Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", found)
    log.addHandler(TerminalHandler(shows_progress))
    return found


def test_a_terminal_shows_the_newest_state_until_there_is_more_to_read(
    monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    shown = screen(monkeypatch, is_terminal=True)
    progress.debug("compiling ...")
    assert shown.lines == ["compiling ..."]
    log.info("made")
    assert shown.lines == ["made", ""]
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for i in range(1, 101):
        progress.debug("loading weights: %d of %d", i, 100)
        clock[0] += 0.04
    assert shown.lines[:1] == ["made"] and shown.lines[1].startswith("loading weights: 9")
    assert 20 < shown.getvalue().count("loading") < 60  # not in the first second, and ten a second from there on
    log.info("ok")
    assert shown.lines == ["made", "ok", ""]


def test_what_is_done_at_once_is_not_shown(monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    shown = screen(monkeypatch, is_terminal=True)
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for i in range(1, 101):
        progress.debug("loading weights: %d of %d", i, 100)
        clock[0] += 0.009
    assert shown.getvalue() == ""


@pytest.mark.parametrize(("is_terminal", "shows_progress"), [(False, True), (True, False)], ids=["pipe", "other rank"])
def test_a_pipe_and_other_ranks_get_lines_alone(
    is_terminal: bool, shows_progress: bool, monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    shown = screen(monkeypatch, is_terminal, shows_progress)
    progress.debug("compiling ...")
    log.info("made")
    assert shown.getvalue() == "made\n"
