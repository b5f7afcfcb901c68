"""The line of an error shows what it says, whatever names stand in it, and obeys no stranger's control characters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.cli import verify
from llama.cli.runner import supervise
from llama.errors import visible
from tests.checkpoints import write_meta


@pytest.fixture(autouse=True)
def level_of_log() -> Iterator[None]:
    """A command sets how much is logged, for as long as its process lives; other tests run in this one."""
    log = logging.getLogger("llama")
    level = log.level
    yield
    log.setLevel(level)


def said(capsys: pytest.CaptureFixture[str], message: str) -> str:
    def job() -> None:
        raise ValueError(message)

    with pytest.raises(SystemExit):
        supervise(job)
    return capsys.readouterr().err


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor's name could clear the screen, set the title of the window, or turn the line around."""
    message = "m.gguf: \x1b[2J\x1b]0;owned\x07 \u202egnp.exe \u200b\x9b1m\x00 é 你 lacks\nmany\ttensors"
    expected = "m.gguf: \\x1b[2J\\x1b]0;owned\\x07 \\u202egnp.exe \\u200b\\x9b1m\\x00 é 你 lacks many tensors"
    assert said(capsys, message) == f"error: {expected}\n"
    assert visible("plain text, é 你") == "plain text, é 你"


def test_a_table_of_findings_shows_control_characters_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_meta(tmp_path)
    (tmp_path / "a\x1b[31m.json").write_text("{")
    with pytest.raises(SystemExit):
        verify.main(tmp_path)
    assert "a\\x1b[31m.json" in capsys.readouterr().out
