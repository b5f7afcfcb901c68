"""Prompts from files and from stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llama.cli.prompts import read_prompts

STDIN = Path("-")


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is redirected to stdin, "two\\n\\n lines \\r\\n" unless a test writes another text."""
    path = tmp_path / "stdin"
    path.write_bytes(b"two\n\n lines \r\n")
    monkeypatch.setattr(sys, "stdin", path.open())
    return path


def test_stdin_is_one_prompt_without_the_end_of_its_last_line(pipe: Path) -> None:
    assert read_prompts(["one", "-"], None) == ["one", "two\n\n lines "]


def test_a_prompt_file_has_a_prompt_a_line_but_for_blank_ones(pipe: Path) -> None:
    assert read_prompts(None, pipe) == read_prompts(None, STDIN) == ["two", " lines "]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [("\ufeffone\n-", ["one", "-"]), (json.dumps(["a\nb", ""]), ["a\nb", ""]), ('["a",\n1]', ['["a",', "1]"])],
    ids=str,
)
def test_a_file_may_be_a_json_list_of_texts(text: str, prompts: list[str], pipe: Path) -> None:
    pipe.write_text(text)
    assert read_prompts(None, pipe) == read_prompts(None, STDIN) == prompts


def test_a_file_holds_more_prompts_than_a_command_line(pipe: Path) -> None:
    """A list of 170 kB was "Argument list too long"."""
    texts = [f"prompt {i} " + "x" * 1000 for i in range(200)]
    pipe.write_text("\n".join(texts))
    assert read_prompts(None, pipe) == texts


def test_a_folder_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    """The message was the system's `[Errno 21] Is a directory`."""
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder: name a file of text$"):
        read_prompts(None, tmp_path)


def test_without_flags_there_is_no_prompt_and_an_empty_stdin_is_nothing_to_tell(
    pipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.write_text("")
    assert read_prompts(None, None) is None
    assert read_prompts(["one"], None) == ["one"]
    assert caplog.messages == []


def test_stdin_that_nothing_reads_is_told(pipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was silently ignored."""
    with pytest.raises(ValueError, match="stdin holds text, but no flag says to read it: --prompt - takes it as one"):
        read_prompts(None, None)
    assert read_prompts(["one"], None) == ["one"]
    (message,) = caplog.messages
    assert message.startswith("stdin holds text, and is not read: --prompt - takes it as one prompt")


@pytest.mark.parametrize(
    ("prompt", "prompt_file", "error"),
    [
        (["a"], STDIN, "--prompt and --prompt_file both give prompts: leave one out"),
        (["-", "-"], None, "--prompt - is there 2 times, and stdin can be read once"),
        ([], None, "the list of prompts is empty: give at least one"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant_are_told(
    prompt: list[str], prompt_file: Path | None, error: str, pipe: Path
) -> None:
    with pytest.raises(ValueError, match=error):
        read_prompts(prompt, prompt_file)
