"""`llama batch` as users run it: ended in every way and started again, on replicas, hosts, pipes and a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import (
    LLAMA,
    TIMEOUT,
    Finished,
    forked_python,
    llama,
    run,
    started,
    torchrun,
    torchrun_command,
)
from tests.e2e.terminal import terminal

pytestmark = pytest.mark.slow

N_LINES = 160


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short prompts with all kinds of lines among them, greedy so that ranks that share a model say the same."""
    numbers = random.Random(0)
    lines: list[Any] = []
    for i in range(N_LINES):
        text = "".join(numbers.choices("abcdef ", k=numbers.randint(1, 12)))
        lines.append({"prompt": text, "id": f"é{i}", "max_gen_len": numbers.randint(1, 30)})
    lines[5:8] = [text, {"nonsense": 1}, {"custom_id": "c", "body": {"prompt": "abc", "max_tokens": 4}}]
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def flags(tiny_folder: Path) -> list[object]:
    sizes = ["--max_seq_len", 64, "--max_batch_size", 4, "--max_gen_len", 9]
    return ["--ckpt_dir", tiny_folder, "--dtype", "float32", "--temperature", 0, *sizes]


@pytest.fixture(scope="module")
def expected(prompts_file: Path, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The sorted lines of a job that nothing has ended."""
    path = tmp_path_factory.mktemp("expected") / "out.jsonl"
    done = llama("batch", prompts_file, path, *flags, "--ordered")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert f"{N_LINES} lines in {path}, 1 of them with an error\n" in done.stderr
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(N_LINES))
    return sorted(lines)


def sorted_lines(path: Path) -> list[str]:
    return sorted(path.read_text(encoding="utf-8").splitlines())


def wait_for_lines(path: Path, count: int) -> None:
    """Wait until the output and its parts together have so many lines."""
    deadline = time.monotonic() + TIMEOUT
    while sum(part.read_bytes().count(b"\n") for part in path.parent.glob(f"{path.name}*")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_job_that_is_ended_goes_on_where_it_was(
    number: signal.Signals, prompts_file: Path, flags: list[object], expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    command = [forked_python(), *LLAMA, "batch", prompts_file, path, *flags]
    with started(command) as process:
        wait_for_lines(path, 30)
        for pid in writers(path):
            os.kill(pid, number)
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
    kept = path.read_bytes()
    assert 30 <= kept.count(b"\n") < N_LINES
    if number != signal.SIGKILL:
        assert kept.endswith(b"\n") and "the same command goes on from there" in stderr and "Traceback" not in stderr
    with path.open("ab") as file:
        file.write(b'{"index": 7, "dig')  # as if it had been ended in the middle of a line
    done = llama("batch", prompts_file, path, *flags)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(kept) and sorted_lines(path) == expected
    before = path.stat().st_mtime_ns
    done = llama("batch", prompts_file, path, *flags)
    assert done.stderr == f"{path} has the results of all {N_LINES} lines already\n"  # no weights were read
    assert path.stat().st_mtime_ns == before


def writers(path: Path) -> list[int]:
    """The processes that have the output, or a part of it, open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(str(path)):
                found.add(int(link.parts[2]))
    return sorted(found)


def test_replicas_of_two_hosts_write_what_one_process_writes(
    prompts_file: Path, flags: list[object], expected: list[str], tmp_path: Path
) -> None:
    """Two launchers with two ranks each, which share a model; their lines come from one queue."""
    path = tmp_path / "out.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "e2e"]
    launcher += ["-m"]
    words = ["llama", "batch", prompts_file, path, *flags, "--model_parallel_size", 2, "--ordered"]
    command = [forked_python(), *torchrun_command(2, *words, launcher=launcher)]
    with contextlib.ExitStack() as stack:
        env = {"PYTHON_EXEC": str(forked_python())}
        hosts = [stack.enter_context(started(command, env=env)) for _ in range(2)]
        ended = [Finished(host.wait(TIMEOUT), *host.communicate()) for host in hosts]
    assert [host.returncode for host in ended] == [0, 0], ended
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == expected and [json.loads(line)["index"] for line in lines] == list(range(N_LINES))
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]


def test_killed_replicas_lose_double_and_change_no_line(
    prompts_file: Path, flags: list[object], expected: list[str], tmp_path: Path
) -> None:
    """torchrun starts all ranks again each time that one is killed."""
    path, numbers = tmp_path / "out.jsonl", random.Random(1)
    words = ["llama", "batch", prompts_file, path, *flags, "--model_parallel_size", 1]
    command = [forked_python(), *torchrun_command(3, *words, launcher=["--max_restarts", 9, "-m"])]
    with started(command, env={"PYTHON_EXEC": str(forked_python())}) as process:
        for count in (10, 60, 110):
            wait_for_lines(path, count)
            time.sleep(numbers.random() / 10)
            if found := writers(path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(numbers.choice(found), signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, stderr
    assert sorted_lines(path) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_pipe_gets_each_answer_before_the_next_question(flags: list[object]) -> None:
    """A program that asks and waits for the answer would wait for ever, if lines were read ahead before they run."""
    with started([forked_python(), *LLAMA, "batch", "-", "-", *flags]) as process:
        assert process.stdin is not None and process.stdout is not None
        for i in range(3):
            process.stdin.write(f"question {i}\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["index"] == i
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parametrize(
    ("target", "code", "error"),
    [
        ("/dev/full", 1, "error: [Errno 28] No space left on device: make room on the disk"),
        ("- > /dev/full", 1, "error: [Errno 28] No space left on device: make room on the disk"),
        ("- | head -1", 0, None),
        ("/nonexistent/out", 1, "error: [Errno 2] No such file or directory: '/nonexistent/out'"),
    ],
)
def test_an_output_that_cannot_be_written_ends_in_one_line_or_none(
    target: str, code: int, error: str | None, prompts_file: Path, flags: list[object]
) -> None:
    words = " ".join(map(str, [forked_python(), *LLAMA, "batch", prompts_file, *flags]))
    first, _, rest = words.partition(f" {prompts_file} ")
    done = run(["bash", "-o", "pipefail", "-c", f"{first} {rest} {prompts_file} {target}"])
    assert done.returncode == code, done.stderr
    assert done.errors == ([] if error is None else [error]) and "Traceback" not in done.stderr
    assert done.stdout.count("\n") == (code == 0)


def test_what_cannot_be_right_is_refused_before_weights_are_read(
    prompts_file: Path, flags: list[object], tmp_path: Path
) -> None:
    path, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    other.write_text('"a"\n"b"\n')
    assert llama("batch", other, path, *flags).returncode == 0
    kept = path.read_bytes()
    torn = kept[: kept.index(b"\n") + 5]
    path.write_bytes(torn)
    words: list[tuple[list[object], str]] = [
        ([prompts_file, path], f"error: {path} has results of another input"),
        ([other, path, "--temperature", 1], f"error: {path} has results of another input, or of other sampling flags"),
        ([other, other], f"error: {other} is the input"),
        ([other, prompts_file], f"error: {prompts_file} is there already, and its line 1 is no result of a job"),
        ([tmp_path / "none", path], "error: [Errno 2] No such file"),
    ]
    for arguments, error in words:
        done = llama("batch", *flags, *arguments)
        assert done.returncode == 1 and done.stderr.startswith(error) and done.stderr.count("\n") == 1, done.stderr
    assert path.read_bytes() == torn
    done = torchrun(2, "-m", "llama", "batch", "-", path, *flags, "--model_parallel_size", 1)
    assert done.errors == ["error: 2 replicas cannot share stdin: give a file that all hosts can reach"]


def test_a_strict_job_stops_at_a_wrong_line_on_every_replica(
    prompts_file: Path, flags: list[object], tmp_path: Path
) -> None:
    words = ["-m", "llama", "batch", prompts_file, tmp_path / "out", *flags, "--model_parallel_size", 1, "--strict"]
    done = torchrun(2, *words)
    assert done.returncode == 1
    assert len(done.errors) == 1 and "line 7 of the input (index 6): unknown field 'nonsense'" in done.errors[0]


def test_a_terminal_shows_how_far_a_job_is(prompts_file: Path, flags: list[object], tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with terminal([forked_python(), *LLAMA, "batch", prompts_file, path, *flags]) as screen:
        screen.wait_for("left")
        screen.wait_for_end()
    assert "tokens/s |" in screen.screen and " %, " in screen.screen
    assert screen.process.returncode == 0
