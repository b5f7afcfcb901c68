"""Programs that are stopped, and streams that are closed, full or in another encoding."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import TINY, chain_state, write_meta
from tests.e2e.processes import CHAT, COMPLETION, LLAMA, ROOT, Finished, llama, prompts, run, started, torchrun_command
from tests.e2e.terminal import CTRL_C, terminal

pytestmark = pytest.mark.slow

END = 257  # <|end_of_text|> of the byte tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a model that says nothing after "c", "c" after "d", and "abab..." without end after "b"."""
    folder = tmp_path_factory.mktemp("model")
    a, b, c, d, newline = b"abcd\n"
    write_meta(folder, TINY, state=chain_state(TINY, {a: b, b: a, newline: a, c: END, d: c}))
    return ["--ckpt_dir", folder, "--temperature", "0", "--max_seq_len", "100000", "--max_gen_len", "None"]


@pytest.mark.parametrize("program", ["example_infilling.py", "example_text_completion.py", "example_chat.py", "llama"])
def test_ctrl_c_while_a_program_imports_ends_it_without_a_word(program: str, tmp_path: Path) -> None:
    """It was a page of traceback, or an abort inside torch."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(100)\n")
    words = [*LLAMA, "complete"] if program == "llama" else [program]
    with started([sys.executable, *words], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == -signal.SIGINT


@pytest.mark.parametrize(("ranks", "number"), [(0, signal.SIGINT), (0, signal.SIGTERM), (2, signal.SIGTERM)])
def test_a_stopped_job_has_printed_all_that_is_complete(ranks: int, number: int, model: list[object]) -> None:
    """All was once lost. The last prompt ends first, and waits for the second, which never ends."""
    flags = [*model, *prompts(["d", "b", "c"]), "--json"]
    command = torchrun_command(ranks, COMPLETION, *flags) if ranks else [sys.executable, COMPLETION, *flags]
    with started(command) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline()]
        process.send_signal(number)
        lines += process.stdout.read().splitlines()
        stderr = process.stderr.read()
        assert process.wait() == (1 if ranks else 128 + number), stderr
    assert [json.loads(line)["prompt"] for line in lines] == ["d", "c"]
    if not ranks:
        assert [line.split()[0] for line in stderr.splitlines()] == ["loaded"]


def test_a_terminal_shows_a_completion_as_it_comes_and_ctrl_c_ends_it(model: list[object]) -> None:
    with terminal([sys.executable, COMPLETION, *model, "--prompt", "b"]) as screen:
        screen.wait_for("b\n> ababab")
        screen.press(CTRL_C)
        assert screen.wait_for_end().endswith("\n")
    assert screen.process.returncode == 130
    assert "Traceback" not in screen.screen


def test_sigterm_while_a_chat_waits_leaves_the_terminal_in_order(model: list[object]) -> None:
    """readline turns echo off, and nobody turned it on again."""
    with terminal([sys.executable, CHAT, *model]) as chat:
        chat.wait_for("> ")
        while chat.echoes:  # readline is about to wait for keys
            time.sleep(0.01)
        time.sleep(1)  # CPython notices a signal that comes just before readline waits only with the next key
        chat.process.send_signal(signal.SIGTERM)
        chat.wait_for_end()
        assert chat.echoes
    assert chat.process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("where", [">&-", ">/dev/full", "| true"], ids=str)
def test_an_error_is_told_where_stdout_cannot_be_written(where: str) -> None:
    """Closed, it was a traceback."""
    done = shell(f"{sys.executable} -m llama --wrong {where}")
    assert done.returncode == 1 and len(done.errors) == 1
    assert done.stderr.startswith("error: a command comes before its flags")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_closed_stdout_is_told() -> None:
    """The result went nowhere, with exit code 0."""
    done = shell(f"{sys.executable} -m llama complete --prompt a --max_gen_len 1 >&-")
    assert done.returncode == 1
    assert done.errors == ["error: stdout is closed, so nothing could be printed: leave out >&-"]


def test_a_full_disk_is_told() -> None:
    """Python writes what is left when it ends, too late for an error line and for an exit code."""
    for words in ("--help", "complete --help"):
        done = shell(f"{sys.executable} -m llama {words} >/dev/full")
        assert done.returncode == 1
        assert done.stderr == "error: [Errno 28] No space left on device: make room on the disk\n"


def shell(line: str) -> Finished:
    return run(["bash", "-o", "pipefail", "-c", line], env={"PYTHONUNBUFFERED": ""})


def test_stdin_reaches_the_model_or_is_asked_about(model: list[object]) -> None:
    flags = ["complete", *model, "--max_gen_len", "0", "--json"]
    (answer,) = llama(*flags, "--prompt", "-", stdin="two\nlines\n").json_lines
    assert answer["prompt"] == "two\nlines"
    done = llama(*flags, stdin="hello")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: stdin holds text")
