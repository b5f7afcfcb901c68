"""A rank that dies, stops, goes astray or never comes: the others end soon, with one line that says so."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.checkpoints import TINY, chain_state, write_meta
from tests.e2e.processes import COMPLETION, LLAMA, TIMEOUT, Finished, forked_python, python, started, torchrun
from tests.e2e.terminal import terminal
from tests.models import BYTE_EOS

pytestmark = pytest.mark.slow

FAULTY_RANK = Path(__file__).with_name("faulty_rank.py")
FLAGS = ("--prompt", "Hi", "--max_gen_len", "2", "--temperature", "0")

OWN_SCRIPT = """
import atexit, os, pathlib, sys
from llama import Llama

done, rank, stdout = pathlib.Path(sys.argv[2]), os.environ["RANK"], sys.stdout  # a build mutes later ranks
if rank == "1":
    # The last thing that it does.
    atexit.register(lambda: print("the first rank is done:", done.exists(), file=stdout))
Llama.build(sys.argv[1], max_seq_len=64).text_completion(["Hello"], temperature=0, max_gen_len=2)
print("done", flush=True, file=stdout)
if rank == "0":
    sys.stdin.readline()
    done.touch()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def rank_env(rank: int, port: int) -> dict[str, str]:
    """What a launcher other than torchrun, which ends no rank when another one ends, tells one of two ranks."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def two_ranks(fault: str, ckpt_dir: Path) -> list[Finished]:
    """Two ranks of which the second has the fault, and is killed where it has not ended when the first has."""
    port = free_port()
    command: Sequence[object] = [forked_python(), FAULTY_RANK, ckpt_dir, fault]
    with (
        started(command, env=rank_env(0, port)) as first,
        started(command, env=rank_env(1, port)) as second,
    ):
        outputs = [first.communicate(timeout=TIMEOUT)]
        if fault == "stopped" and (pid := re.search(r"process (\d+)", outputs[0][1])):
            os.kill(int(pid[1]), signal.SIGKILL)
        outputs.append(second.communicate(timeout=TIMEOUT))
        return [Finished(rank.returncode, *output) for rank, output in zip((first, second), outputs, strict=True)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("killed", ["rank 1 of 2 (process ", "has ended or was killed"]),
        ("stopped", ["rank 1 of 2 (process ", "gave no sign of life for ", "it is stopped"]),
        ("astray", ["ranks wait for each other", "the same calls in the same order"]),
    ],
)
def test_a_rank_that_is_lost_is_named_in_one_line(fault: str, words: list[str], tiny_folder: Path) -> None:
    """A rank that was killed gave forty lines of traceback, and one that was stopped nothing for half an hour."""
    ranks = two_ranks(fault, tiny_folder)
    living = ranks if fault == "astray" else ranks[:1]
    assert [rank.returncode for rank in living] == [1] * len(living)
    lines = "".join(rank.stderr for rank in living).splitlines()
    (error,) = [line for line in lines if not line.startswith("loaded ")]
    assert [word for word in ("error: ", *words) if word not in error] == []


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_a_job_whatever_the_timeout_and_what_is_written_stays_whole(
    stopped: int, tmp_path: Path
) -> None:
    """The first rank leads the other, and holds the store; for either nothing was said for ten minutes."""
    a, b, d = b"abd"
    write_meta(tmp_path, TINY, state=chain_state(TINY, {a: b, b: a, d: BYTE_EOS}))
    questions, answers, port = tmp_path / "in.jsonl", tmp_path / "out.jsonl", free_port()
    questions.write_text('"d"\n' * 40 + '"b"\n' * 4)  # the last four have no end
    flags = ["--ckpt_dir", tmp_path, "--max_seq_len", 100_000, "--max_gen_len", "None", "--temperature", 0]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(2):
            program = sys.executable if rank == stopped else forked_python()
            command = [program, *LLAMA, "batch", questions, answers, *flags]
            ranks.append(stack.enter_context(started(command, env=rank_env(rank, port))))
        while not answers.exists() or len(answers.read_text().splitlines()) < 40:
            time.sleep(0.1)
        ranks[stopped].send_signal(signal.SIGSTOP)
        _, stderr = ranks[1 - stopped].communicate(timeout=TIMEOUT)
        ranks[stopped].kill()
    told = ("loaded ", "rank ")  # that one waits for the other, which takes longer to start
    (error,) = [line for line in stderr.splitlines() if not line.startswith(told)]
    assert error.startswith(f"error: rank {stopped} of 2 (process ") and "it is stopped" in error
    assert ranks[1 - stopped].returncode == 1
    assert {json.loads(line)["index"] for line in answers.read_text().splitlines()} == set(range(40))


def test_a_chat_that_waits_for_its_user_ends_when_another_rank_has_ended(tiny_folder: Path) -> None:
    """It waited on, and told the user after the next message; ended by a thread, it left the terminal without echo."""
    port = free_port()
    command: Sequence[object] = [forked_python(), *LLAMA, "chat", "--ckpt_dir", tiny_folder, "--max_seq_len", 100]
    variables = [f"{name}={value}" for name, value in rank_env(0, port).items()]
    with (
        started(command, env=rank_env(1, port)) as other,
        terminal(["env", *variables, *command]) as chat,
    ):
        chat.wait_for("\n> ")
        while chat.echoes:  # readline is about to wait for keys
            time.sleep(0.01)
        other.kill()
        shown = chat.wait_for_end()
        assert chat.echoes
    assert chat.process.returncode == 1
    assert shown.count("\n") == 1 and "error: rank 1 of 2 (process " in shown and "has ended or was killed" in shown


@pytest.mark.parametrize(("output", "code"), [("/dev/full", 1), ("nobody", 0)])
def test_two_ranks_whose_output_goes_nowhere_say_so_in_one_line_or_none(
    output: str, code: int, tiny_folder: Path
) -> None:
    """`| head -1` and a full disk ended in the traceback of the rank that did not print."""
    with contextlib.ExitStack() as stack:
        if output == "nobody":
            reader, writer = socket.socketpair()
            reader.close()
            stdout = stack.enter_context(writer).fileno()
        else:
            stdout = stack.enter_context(open(output, "w")).fileno()
        done = torchrun(2, COMPLETION, "--ckpt_dir", tiny_folder, *FLAGS, stdout=stdout)
    assert done.returncode == code, done.stderr
    assert done.errors == ["error: [Errno 28] No space left on device: make room on the disk"] * code
    assert "[rank" not in done.stderr


def test_a_rank_that_nobody_joins_says_what_to_unset(tiny_folder: Path) -> None:
    """It waited for seven days. What a scheduler left cannot be told from a job whose other ranks come late."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [forked_python(), COMPLETION, "--ckpt_dir", tiny_folder, "--timeout", 1, *FLAGS]
    with started(command, env=env) as first:
        _, stderr = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 1
    (error,) = stderr.splitlines()
    assert error.startswith(f"error: rank 0 of 2 at 127.0.0.1:{env['MASTER_PORT']} did not meet the others in 1 s")
    assert "unset RANK, WORLD_SIZE" in error


def test_variables_that_are_left_over_change_nothing(tiny_folder: Path) -> None:
    """RANK=1 alone printed nothing; RANK, WORLD_SIZE=1 and an address out of reach waited for minutes."""
    alone = python(COMPLETION, "--ckpt_dir", tiny_folder, *FLAGS)
    for variables in ("RANK=1 LOCAL_WORLD_SIZE=0", "RANK=0 WORLD_SIZE=1 MASTER_ADDR=192.0.2.1 MASTER_PORT=1"):
        words = [forked_python(), COMPLETION, "--ckpt_dir", tiny_folder, *FLAGS]
        with started(words, env=dict(word.split("=") for word in variables.split())) as process:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, stdout) == (0, alone.stdout)
        assert stderr.count("this process runs alone") == (variables[:6] == "RANK=1"), stderr


def test_a_rank_of_a_users_own_script_leaves_when_the_others_are_done(tiny_folder: Path, tmp_path: Path) -> None:
    """One that ended while others still ran could abort in gloo's threads. Forks would leave without their clean-up."""
    script, done, port = tmp_path / "own.py", tmp_path / "done", free_port()
    script.write_text(OWN_SCRIPT)
    command = [sys.executable, script, tiny_folder, done]
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (
        started(command, env=env | rank_env(0, port)) as first,
        started(command, env=env | rank_env(1, port)) as other,
    ):
        assert other.stdout is not None and other.stdout.readline() == "done\n"
        stdout, _ = first.communicate("\n", TIMEOUT)
        rest, _ = other.communicate(timeout=TIMEOUT)
        assert (first.returncode, other.returncode) == (0, 0)
        assert (stdout, rest) == ("done\n", "the first rank is done: True\n")
