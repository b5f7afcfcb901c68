"""The commands of a chat do what /help says of them, and a mistake in one loses nothing."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.cli.chat import converse
from llama.cli.chat_commands import CHAT_COMMANDS, Next, completions, perform, settable, with_value, word_of
from llama.cli.conversation import Conversation, TooLongError
from llama.sampling import SamplingParams
from tests.checkpoints import TINY, chain_state, write_meta
from tests.models import build

EOT = 265  # of Llama 3's format


@pytest.fixture(scope="module")
def obliging(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """A model that answers every message with "OK"."""
    folder = tmp_path_factory.mktemp("obliging")
    write_meta(folder, state=chain_state(TINY, {ord("\n"): ord("O"), ord("O"): ord("K"), ord("K"): EOT}))
    return build(folder, max_seq_len=256)


@pytest.fixture
def chat(obliging: Llama) -> Conversation:
    return Conversation(obliging, SamplingParams(temperature=0))


class Typist:
    """Somebody who types these lines, and then Ctrl-D."""

    left = ""

    def __init__(self, *lines: str) -> None:
        self.lines, self.drafts = list(lines), list[str]()

    def read(self, draft: str = "") -> str:
        self.drafts.append(draft)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def type_lines(chat: Conversation, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Typist:
    typist = Typist(*lines)
    monkeypatch.setattr("llama.cli.chat.terminal_reader", lambda complete: typist)
    converse(chat, None, interactive=True)
    return typist


def said(chat: Conversation) -> list[str]:
    return [str(message["content"]) for message in chat.messages]


def test_undo_retry_and_edit_change_the_last_turn_alone(chat: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    typist = type_lines(chat, monkeypatch, "one", "two", "/undo", "/retry", "three", "/edit four", "/edit", "five")
    assert said(chat) == ["one", "OK", "five", "OK"]
    assert typist.drafts[-2:] == ["four", ""]


def test_a_message_that_is_edited_stays_where_the_editing_ends_without_one(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C gives an empty line, and the message after it is a new one."""
    type_lines(chat, monkeypatch, "one", "/edit", "", "two", "/edit", "/reset")
    assert said(chat) == []
    type_lines(chat, monkeypatch, "one", "/edit", "", "two")
    assert said(chat) == ["one", "OK", "two", "OK"]


def test_what_is_no_command_is_told_with_the_nearest_and_not_sent(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(chat, monkeypatch, "/quit now", "/rtry", "/usr/bin holds programs", " /reset", "/show me", "/exit", "no")
    assert said(chat) == ["/usr/bin holds programs", "OK", "/reset", "OK"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: /quit is no command, and was not sent: did you mean /exit? (to send it, begin with a space)",
        "error: /rtry is no command, and was not sent: did you mean /retry? (to send it, begin with a space)",
        "error: /show takes nothing after it, got 'me'",
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [("/set x 1", "/set"), ("/x\nb", "/x"), ("/a/b c", None), (" /set", None), ("/", None), ("/1", None)],
)
def test_a_line_is_a_command_by_its_first_word(line: str, word: str | None) -> None:
    assert word_of(line) == word


def test_commands_without_a_message_to_change_are_told(chat: Conversation) -> None:
    for line in ("/undo", "/retry", "/edit", "/edit x"):
        with pytest.raises(ValueError, match="nothing was said yet"):
            perform(chat, line)


def test_every_command_is_listed_by_help(chat: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform(chat, "/help") is Next.READ
    shown = capsys.readouterr().err
    assert all(f"  {name} " in shown for name in CHAT_COMMANDS)
    assert max(map(len, shown.splitlines())) <= 120


VALUES: list[tuple[str, str, Any]] = [
    ("temperature", "0.3", 0.3),
    ("max_gen_len", "12", 12),
    ("max_gen_len", "None", None),
    ("top_k", "40", 40),
    ("ignore_eos", "true", True),
    ("stop", "\\n", ("\\n",)),
    ("stop", '"\\n"', ("\n",)),
    ("stop", '["a", "b"]', ("a", "b")),
    ("stop", "7", ("7",)),
    ("stop_token_ids", "7", (7,)),
    ("banned_tokens", "[1, 2]", (1, 2)),
    ("logit_bias", '{"504": -2.5}', {504: -2.5}),
    ("regex", "[0-9]+", "[0-9]+"),
    ("regex", "5", "5"),
    ("regex", "none", None),
    ("seed", "3", 3),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_set_takes_every_kind_of_value(name: str, text: str, value: Any) -> None:
    changed = with_value(SamplingParams(presence_penalty=1), name, text)
    assert getattr(changed, name) == value and changed.presence_penalty == 1


def test_every_parameter_that_a_chat_can_use_can_be_set_to_what_it_is() -> None:
    params = SamplingParams()
    for name in settable():
        assert with_value(params, name, json.dumps(getattr(params, name))) == params


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "warm", "temperature must be a number from 0 to 1e.15, got 'warm'"),
        ("temperature", "-1", "temperature must be a number"),
        ("top_k", "1.5", "top_k must be an integer"),
        ("ignore_eos", "maybe", "ignore_eos is on or off, got 'maybe'"),
        ("tempreature", "1", "there is no 'tempreature' to set: did you mean temperature"),
        ("temp", "1", "there is no 'temp' to set: did you mean temperature"),
        ("repeat_penalty", "1.1", "there is no 'repeat_penalty' to set: did you mean repetition_penalty"),
        ("n", "2", "there is no 'n' to set"),
        ("regex", "[", "regex"),
        ("json_schema", "nowhere.json", "json_schema 'nowhere.json' is no file"),
        ("banned_tokens", "[[[", "banned_tokens must be a list of token ids"),
    ],
)
def test_a_wrong_value_is_told_and_changes_nothing(chat: Conversation, name: str, text: str, message: str) -> None:
    before = chat.params
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        perform(chat, f"/set {name} {text}")
    assert chat.params is before


def test_a_dialog_is_saved_and_loaded(chat: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a talk.json"
    type_lines(chat, monkeypatch, "/system be brief", "één\ntwo", f"/save {file}", "more", f"/save {file}")
    kept = said(chat)
    assert kept == ["be brief", "één\ntwo", "OK", "more", "OK"]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": chat.messages}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    type_lines(chat, monkeypatch, "/reset", '/system ""', f"/load {file}", "on")
    assert said(chat) == [*kept, "on", "OK"]
    file.write_text(json.dumps(chat.messages[1:]))  # a bare list, without a system prompt
    type_lines(chat, monkeypatch, f"/load {file}")
    assert chat.system is None and said(chat) == [*kept[1:], "on", "OK"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"messages": [{"role": "user", "con', b"[1]", b"\xff\xfe", b'{"messages": [{"role": "user"}]}', b"[[]]",
        b'[{"role": "user", "content": "unanswered"}]', b'[{"role": "assistant", "content": "first"}]',
    ],
)  # fmt: skip
def test_what_is_no_dialog_is_not_loaded(chat: Conversation, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    chat.ask("one")
    chat.answer()
    with pytest.raises(ValueError, match=r"holds no messages|a conversation begins with"):
        perform(chat, f"/load {file}")
    assert said(chat) == ["one", "OK"]


def test_saving_overwrites_nothing_but_dialogs(chat: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path, message in (
        (file, "it was not overwritten"),
        (tmp_path, "is no file"),
        (tmp_path / "a" / "b", "no folder"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            perform(chat, f"/save {path}")
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_oldest_turns_make_room_and_it_is_told_once(chat: Conversation, caplog: pytest.LogCaptureFixture) -> None:
    """It was told at each answer. The system prompt stays, and nothing is lost of what /save writes."""
    perform(chat, "/system be brief")
    for number in range(8):
        chat.ask(f"message {number}")
        chat.answer()
    assert len(chat.turns) == 16 and chat.n_forgotten > 2
    decoded = bytes(token for token in chat.tokens if token < 256)
    assert b"be brief" in decoded and b"message 7" in decoded and b"message 0" not in decoded
    records = [record.getMessage() for record in caplog.records if "is full" in record.getMessage()]
    assert len(records) == 1 and records[0].startswith("the context of 256 tokens is full: the oldest ")
    for _ in range(8):
        perform(chat, "/undo")
    assert chat.n_forgotten == 0


def test_where_memory_gives_less_than_the_context_turns_are_forgotten_too(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error ended a pipe of messages. Memory cannot be taken away, so its free bytes are a number here."""
    for number in range(3):
        chat.ask(f"message {number}")
        chat.answer()
    assert chat.n_forgotten == 0
    n_before = len(chat.tokens)
    # Less and less, until there is room for the next message but not for all.
    free = 1 << 24
    with pytest.raises(TooLongError, match=r"cannot be answered: a prompt of \d+ tokens"):
        while chat.n_forgotten == 0:
            monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args, free=free: free)
            chat.ask("more")
            chat.answer()
            chat.undo()
            free = int(free * 0.97)
        assert "memory has no room for all that was said: the oldest " in caplog.text
        assert len(chat.tokens) < n_before
        monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args: 0)
        chat.ask("more")
        chat.answer()


def test_with_overflow_error_a_message_is_refused_and_nothing_is_forgotten(
    obliging: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Conversation(obliging, SamplingParams(temperature=0), overflow="error")
    type_lines(chat, monkeypatch, "a" * 90, "b" * 140, "/reset", "d" * 90, "e" * 300)
    assert said(chat) == ["d" * 90, "OK"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(
        "error: message 2 is too long for what is left of the context: with what was said before it has "
    )
    assert errors[0].endswith("/reset forgets that, --overflow forget the oldest of it; or give a larger --max_seq_len")
    assert len(errors) == 2 and errors[1].startswith("error: message 2 is too long for the context: with what the chat")


def test_a_refused_change_of_the_last_message_leaves_it(chat: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(chat, monkeypatch, "one", "/edit " + "x" * 300, "/set stop_token_ids 99999999999")
    assert said(chat) == ["one", "OK"]
    with pytest.raises(TooLongError):
        chat.ask("y" * 300)
        chat.answer()


def test_a_line_is_completed_to_commands_parameters_and_files(tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    (tmp_path / "talks").mkdir()
    assert completions("/s") == ["/system", "/set", "/show", "/save", "/stats"]
    assert completions("/set temp") == ["temperature"]
    assert completions(f"/load {tmp_path}/ta") == [f"{tmp_path}/talk.json", f"{tmp_path}/talks/"]
    assert completions("hello /s") == completions("hello") == completions("") == completions("/set top_k 4") == []
