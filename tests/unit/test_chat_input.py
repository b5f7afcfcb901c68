"""What is typed on a terminal becomes messages, and is remembered."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llama.cli.chat_commands import completions
from llama.cli.chat_input import History, PlainReader, PromptToolkitReader, history_file, terminal_reader

ENTER, ALT_ENTER, UP, TAB, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\t", "\x03", "\x04"


def read(keys: str, tmp_path: Path, draft: str = "", count: int = 1) -> list[str]:
    """What these keys give in prompt_toolkit, message by message."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        reader = PromptToolkitReader(completions, History(tmp_path / "history"))
        pipe.send_text(keys)
        return [reader.read(draft) for _ in range(count)]


def test_what_is_pasted_is_one_message(tmp_path: Path) -> None:
    """Three pasted lines were three messages."""
    assert read(f"see: \x1b[200~one\r\ntwo\nthree\n\x1b[201~{ENTER}", tmp_path) == ["see: one\ntwo\nthree\n"]


def test_alt_enter_begins_a_line_and_enter_sends_all(tmp_path: Path) -> None:
    assert read(f"one{ALT_ENTER}two{ENTER}three{ENTER}", tmp_path, count=2) == ["one\ntwo", "three"]


def test_tab_completes_what_can_only_be_one_thing(tmp_path: Path) -> None:
    assert read(f"/ret{TAB}{ENTER}/set temp{TAB} 1{ENTER}", tmp_path, count=2) == ["/retry", "/set temperature 1"]


def test_a_draft_is_edited(tmp_path: Path) -> None:
    assert read("\x7f" * 3 + f"two{ENTER}", tmp_path, "message one") == ["message two"]


def test_ctrl_c_and_ctrl_d_are_what_they_are_in_a_shell(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(f"half a{CTRL_C}", tmp_path)
    with pytest.raises(EOFError):
        read(CTRL_D, tmp_path)


def test_what_was_typed_comes_back_in_the_next_run(tmp_path: Path) -> None:
    read(f"one{ALT_ENTER}two{ENTER}/undo{ENTER}/undo{ENTER}", tmp_path, count=3)
    assert History(tmp_path / "history").lines == ["one\ntwo", "/undo"]
    assert read(f"{UP}{ENTER}", tmp_path) == ["/undo"]
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_that_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('"good"\nno JSON\n[1]\n"last"\n')
    assert History(tmp_path / "file").lines == ["good", "last"]
    history = History(tmp_path / "file" / "below")
    history.add("one")
    assert history.lines == ["one"]


def test_the_history_lies_in_the_users_folder_of_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "llama" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert history_file() == Path(os.path.expanduser("~")) / ".local" / "state" / "llama" / "chat_history"


def test_a_chat_reads_without_prompt_toolkit_and_without_readline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on Windows, where there may be neither."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("prompt_toolkit", "readline"):
        for module in [each for each in sys.modules if each.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    assert isinstance(terminal_reader(completions), PlainReader)


def test_readline_remembers_what_the_c_locale_cannot_write(tmp_path: Path) -> None:
    """A message with an accent ended the chat there: readline's own history takes the locale's characters alone."""
    pytest.importorskip("readline")
    script = (
        "import sys; from pathlib import Path; from llama.cli.chat_input import History, ReadlineReader\n"
        "history = History(Path(sys.argv[1])); sys.stdin.reconfigure(encoding='utf-8')\n"
        "print([ascii(ReadlineReader(lambda line: [], history).read()) for _ in range(2)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "history"],
        input="caf\u00e9\nagain\n",
        encoding="utf-8",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    )
    assert "\"'caf\\\\xe9'\", \"'again'\"" in done.stdout, done.stderr
    assert History(tmp_path / "history").lines == ["caf\u00e9", "again"]
