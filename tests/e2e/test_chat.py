"""example_chat.py from a pipe and on a terminal, on one process and on several ranks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.checkpoints import TINY, chain_state, write_meta
from tests.e2e.processes import CHAT, python, started, torchrun, torchrun_command, without_notices
from tests.e2e.terminal import CTRL_C, CTRL_D, terminal

pytestmark = pytest.mark.slow

GREEDY = ["--temperature", "0", "--max_gen_len", "40"]
FULL_80 = "the context of 80 tokens is full"
CITIES = ["Paris", "Madrid", "Paris"]
CAPITAL = "What is the capital of France?"
# The second question makes sense after the first alone; blank lines are no messages.
CONVERSATION = f"{CAPITAL}\n\nAnd of Spain?\n/reset\nAnd of Spain?\n/exit\n{CAPITAL}\n"


@pytest.fixture(scope="module")
def piped(demo_model: Path) -> str:
    done = python(CHAT, *GREEDY, stdin=CONVERSATION)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_model_knows_the_capital_of_france(demo_model: Path) -> None:
    done = python(CHAT, "--temperature", "0", stdin=CAPITAL + "\n")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    loaded, report = done.stderr.splitlines()
    assert loaded.startswith("loaded ") and report.startswith("prefill ")


def test_lines_from_a_pipe_are_one_conversation_until_reset(piped: str) -> None:
    """Answers alone on stdout, one after another; /exit ends before the last message."""
    paris, madrid, rest = piped.split("\n", 2)
    assert "Paris" in paris
    assert "Madrid" in madrid
    assert rest.strip() and "Madrid" not in rest  # "And of Spain?" alone asks for nothing


def test_three_ranks_hold_the_same_conversation(demo_model: Path) -> None:
    flags = [*GREEDY, "--dtype", "float32"]
    conversation = f"{CAPITAL}\nAnd of Spain?\n/reset\n{CAPITAL}"  # a last line need not end
    three = torchrun(3, CHAT, *flags, stdin=conversation)
    assert three.returncode == 0, three.stderr
    assert three.stdout == python(CHAT, *flags, stdin=conversation).stdout
    assert [name in line for name, line in zip(CITIES, three.stdout.splitlines(), strict=True)] == [True] * 3
    assert three.stderr.count("loaded /") == three.stderr.count("prefill ") == 1


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a model that answers every message with "abababab...", and never ends by itself."""
    folder = tmp_path_factory.mktemp("endless")
    a, b, newline = b"ab\n"
    write_meta(folder, TINY, state=chain_state(TINY, {newline: a, a: b, b: a}))
    return ["--ckpt_dir", folder, "--temperature", "0", "--max_seq_len", "100000"]


def test_an_answer_streams_and_ctrl_c_stops_it_and_not_the_chat(endless: list[object]) -> None:
    with terminal([sys.executable, CHAT, *endless]) as chat:
        chat.wait_for("Ctrl-C stops an answer.\n> ")
        chat.type("hello\n")
        # The answer has no end: what is shown is shown while it is being made.
        assert chat.wait_for("ababab").startswith("hello\n")
        chat.press(CTRL_C)
        assert "error" not in chat.wait_for(" (stopped)\n> ")
        chat.type("once more\n")
        chat.wait_for("ababab")
        chat.press(CTRL_C)
        chat.wait_for(" (stopped)\n> ")
        chat.type("never sent")
        chat.wait_for("never sent")
        chat.press(CTRL_C)
        assert "/exit" not in chat.wait_for("\n> ")
        chat.press(CTRL_C)  # where nothing was typed
        assert "/help tells the commands, /exit or Ctrl-D ends the chat\n" in chat.wait_for("\n> ")
        chat.type("/quit\n")
        refused = "error: /quit is no command, and was not sent: did you mean /exit? (to send it, begin with a space)"
        assert chat.wait_for("\n> ") == f"/quit\n{refused}\n> "
        chat.type("/reset\n")
        chat.wait_for("\n> ")
        chat.press(CTRL_D)
        last = chat.wait_for_end()
        assert chat.echoes
    assert chat.process.returncode == 0
    assert last.startswith("\nprefill ")
    assert "Traceback" not in chat.screen


def test_a_full_context_is_told_and_the_oldest_messages_make_room(endless: list[object]) -> None:
    """An answer stopped in the middle without a word, and every later message was refused."""
    flags = [*endless, "--max_seq_len", "80"]
    done = python(CHAT, *flags, "--system", "be brief", stdin="one\ntwo\nthree\n/reset\none\n")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 4 and all(len(answer) >= 20 for answer in answers)  # a quarter of the context is kept free
    assert answers[0] == answers[3]
    cut = f"{FULL_80}, and the answer was cut: --max_seq_len makes room"
    forgotten = f"{FULL_80}: the oldest 2 messages are forgotten, as will be those after them"
    assert done.stderr.splitlines()[1:-1] == [cut, forgotten, cut, cut, cut]
    done = python(CHAT, *flags, "--overflow", "error", stdin=f"one\ntwo\n/reset\n{'long ' * 3}\n")
    refused, whole, _ = done.stdout.split("\n")[1:]
    assert (done.returncode, refused, len(whole) > 5) == (1, "", True)
    assert (
        "error: message 2 is too long for what is left of the context: with what was said before it has " in done.stderr
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_message_that_is_too_long_is_told_and_those_after_it_are_answered(ranks: int, endless: list[object]) -> None:
    """It ended the chat, with a line about "prompt 0"."""
    flags = [*endless, "--max_seq_len", "80", "--max_gen_len", "6"]
    conversation = f"one\n{'long ' * 20}\n/quit\n"
    done = torchrun(2, CHAT, *flags, stdin=conversation) if ranks == 2 else python(CHAT, *flags, stdin=conversation)
    assert (done.returncode, done.stdout) == (1, "ababab\n\nababab\n")  # what is piped is a message, whatever it is
    (error,) = done.errors
    assert error.startswith("error: message 2 is too long for the context: with what the chat format writes it has 1")
    assert error.endswith(" tokens, --max_seq_len is 80: shorten it, or give a larger --max_seq_len")


def test_a_context_without_room_for_any_message_is_told_at_the_start(endless: list[object]) -> None:
    """Every message was refused, one after the other."""
    done = python(CHAT, *endless, "--max_seq_len", "80", "--system", "be brief " * 9, stdin="one\ntwo\n")
    assert (done.returncode, done.stdout) == (1, "")
    (error,) = done.errors
    assert error.startswith("error: --system leaves no room for a message: with 'Hello' it has 1")
    assert error.endswith(" tokens, --max_seq_len is 80: shorten it, or give a larger --max_seq_len")
    (error,) = python(CHAT, *endless, "--max_seq_len", "9", stdin="one\n").errors
    assert error.startswith("error: the chat format leaves no room for a message: with 'Hello' it has ")


def test_an_answer_of_the_length_that_was_asked_for_is_not_called_cut(endless: list[object]) -> None:
    done = python(CHAT, *endless, "--max_seq_len", "200", "--max_gen_len", "8", stdin="one\ntwo\n")
    assert [len(answer) for answer in done.stdout.splitlines()] == [8, 8]
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["loaded", "prefill"]


def test_a_terminal_shows_one_conversation_and_exit_ends_it(demo_model: Path) -> None:
    with terminal([sys.executable, CHAT, *GREEDY, "--max_seq_len", "80"]) as chat:
        chat.wait_for("> ")
        chat.type(f"{CAPITAL}\n")
        assert "Paris" in chat.wait_for("\n> ")
        chat.type("And of Spain?\n")
        assert "Madrid" in chat.wait_for("\n> ")
        chat.type("And of Italy? " * 20 + "\n")
        said = chat.wait_for("\n> ")
        assert "error: message 3 is too long for the context: with what the chat format writes it has " in said
        assert "tokens, --max_seq_len is 80: shorten it, or give a larger --max_seq_len\n" in said
        chat.type("And of Italy?\n")
        assert f"{FULL_80}: the oldest 2 messages are forgotten, as will be those after them\n" in chat.wait_for("\n> ")
        chat.type("/reset\n")
        chat.wait_for("\n> ")
        chat.type(f"{CAPITAL}\n")
        assert "Paris" in chat.wait_for("\n> ")
        chat.type("/exit\n")
        assert chat.wait_for_end().splitlines()[1].startswith("prefill ")
    assert chat.process.returncode == 0


def test_prompt_toolkit_takes_what_is_pasted_as_one_message_and_leaves_the_terminal_in_order(
    endless: list[object],
) -> None:
    """Three pasted lines were three messages."""
    env = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}  # nobody tells it where the cursor is
    with terminal([sys.executable, CHAT, *endless, "--max_gen_len", "6"], env) as chat:
        chat.wait_for("\x1b[?2004h")  # tell me what is pasted
        chat.type("\x1b[200~one\ntwo\x1b[201~\r")
        chat.wait_for("ababab\n")
        chat.wait_for("\x1b[?2004h")
        chat.type("/show\r")
        chat.wait_for("> one\ntwo\nababab\n(2 messages, ")
        chat.wait_for("\x1b[?2004h")
        chat.type("half")
        chat.press(CTRL_C)
        chat.wait_for("\x1b[?2004h")
        chat.press(CTRL_D)
        assert "\x1b[?2004lprefill " in chat.wait_for_end() and chat.echoes
    assert chat.process.returncode == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_session_goes_on_without_reading_what_it_has_read(ranks: int, eight_shards: Path, tmp_path: Path) -> None:
    """The same answers as without a restart, and the same number of prompt tokens; two ranks keep a part each."""
    flags = ["--ckpt_dir", eight_shards, "--dtype", "float32", "--temperature", "0", "--max_gen_len", "16"]

    def chat(stdin: str, *more: object) -> tuple[str, int]:
        words = (CHAT, *flags, *more)
        done = torchrun(ranks, *words, stdin=stdin) if ranks > 1 else python(*words, stdin=stdin)
        read = re.search(r"^prefill (\d+) tokens", done.stderr, re.MULTILINE)
        assert done.returncode == 0 and read, done.stderr
        return done.stdout, int(read[1])

    whole = chat("Who are you?\nWhy?\n")
    parts = [chat(line, "--session", tmp_path / "talk") for line in ("Who are you?\n", "Why?\n")]
    assert whole == (parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk", *(f"talk.rank{i}" for i in range(ranks))]


@pytest.mark.parametrize("where", ["answer", "prompt"])
def test_ctrl_c_ends_all_ranks_and_leaves_the_terminal_in_order(where: str, endless: list[object]) -> None:
    """Ranks once stopped at different tokens, and waited for each other until torchrun killed them."""
    with terminal(torchrun_command(2, CHAT, *endless)) as chat:
        chat.wait_for("Ctrl-C ends, too.\n> ")
        if where == "answer":
            chat.type("hello\n")
            chat.wait_for("ababab")
        chat.press(CTRL_C)
        last = chat.wait_for_end()
        assert chat.echoes
    assert "forcefully" not in last
    assert "[rank" not in last


def test_two_ranks_chat_on_a_terminal(endless: list[object]) -> None:
    with terminal(torchrun_command(2, CHAT, *endless, "--max_gen_len", "6")) as chat:
        chat.wait_for("> ")
        chat.type("hello\n")
        assert chat.wait_for("\n> ") == "hello\nababab\n> "
        chat.press(CTRL_D)
        last = chat.wait_for_end()
    assert chat.process.returncode == 0
    assert last.startswith("\nprefill ")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_closed_pipe_ends_a_chat_quietly(ranks: int, endless: list[object]) -> None:
    """The other ranks, in the middle of an answer, once ended in tracebacks."""
    flags = [*endless, "--max_gen_len", "50"]
    command = torchrun_command(ranks, CHAT, *flags) if ranks else [sys.executable, CHAT, *flags]
    with started(command) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("hello\n" * 3)
        process.stdin.flush()
        assert process.stdout.read(1) == "a"
        process.stdout.close()
        process.stdin.close()
        stderr = without_notices(process.stderr.read())
        code = process.wait()
    lines = [line for line in stderr.splitlines() if not line.startswith("W")]
    assert code == 0 and lines[0].startswith("loaded "), stderr
    assert len(lines) == 1 or (ranks and len(lines) == 2 and lines[1].startswith("prefill ")), stderr


def test_utf_8_is_read_in_the_c_locale(endless: list[object]) -> None:
    """A valid message was called "not ascii", and ended the chat; a valid system prompt was called "not UTF-8"."""
    flags = [*endless, "--max_gen_len", "6", "--system", "très bref"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(CHAT, *flags, stdin="café\n", env=locale)
    assert (done.returncode, done.stdout) == (0, "ababab\n"), done.stderr


def test_an_unreadable_message_ends_all_ranks_with_one_line(endless: list[object]) -> None:
    done = torchrun(2, CHAT, *endless, stdin="caf\udce9\n", env={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 1
    assert done.errors == ["error: a line of stdin is not utf-8: b'caf\\xe9\\n'; convert it, with iconv for example"]
    assert "[rank" not in done.stderr
