"""Run the examples, scripts and torchrun as a user does: in processes of their own, which end with the test."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.backends.cpu.build import library

ROOT = Path(__file__).parents[2]
COMPLETION = ROOT / "example_text_completion.py"
CHAT = ROOT / "example_chat.py"
LLAMA = ("-m", "llama")
TORCHRUN = Path(sys.executable).with_name("torchrun")
WORKER = Path(__file__).parent / "worker.py"

# Only so that a hang ends: no test measures time.
TIMEOUT = 240
# torchrun gives its ranks 30 s to end before it kills them.
SECONDS_TO_END = 40

# What a launcher, or the shell that runs the tests, may have set and a user's shell has not.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "PYTHONIOENCODING")


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str
    all_stderr: str = ""  # of `run`: with notices that there are no kernels

    @property
    def json_lines(self) -> list[dict[str, Any]]:
        """stdout, which must hold one JSON object a line and nothing else."""
        assert self.returncode == 0, self.stderr
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if "error:" in line]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A user's environment on a machine without CUDA devices, with `changes`."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return env | {"CUDA_VISIBLE_DEVICES": ""} | dict(changes or {})


def heed_interrupts() -> None:
    """A suite that runs in the background may have SIGINT ignored, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(
    command: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, with pipes unless told otherwise; it has ended when the block is left."""
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    options = {**pipes, "preexec_fn": heed_interrupts, **options}
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, env=environment(env), cwd=cwd, text=True, errors="surrogateescape", start_new_session=True, **options
    ) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, so that torchrun ends its ranks, and kill what does not."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[object], *, stdin: str = "", **options: Any) -> Finished:
    with started(command, **options) as process:
        stdout, stderr = process.communicate(stdin, TIMEOUT)
        return Finished(process.returncode, stdout, without_notices(stderr), stderr)


def without_notices(stderr: str) -> str:
    """stderr less what it says on a machine without a C++ compiler: why, and what blocks became."""
    if library() is not None:
        return stderr
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("no CPU kernels") and " loaded as " not in line)


def python(*words: object, env: Mapping[str, str] | None = None, **options: Any) -> Finished:
    """`python *words`: in a fork of a process that has imported torch, or with changes of the environment from scratch.

    Libraries read their variables when they are imported.
    """
    return run([forked_python() if env is None else sys.executable, *words], env=env, **options)


@functools.cache
def forked_python() -> Path:
    """An executable that does what python does in a fork of a process of tests.e2e.forks, which ends with this one."""
    folder = Path(tempfile.mkdtemp(prefix="llama-forks-"))
    atexit.register(shutil.rmtree, folder)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.forks", folder / "socket"],
        stdin=subprocess.PIPE,  # it ends when this process ends
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
        preexec_fn=heed_interrupts,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    client = Path(__file__).with_name("forked_python.py")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" "{folder}/socket" "$@"\n')
    path.chmod(0o755)
    return path


def llama(*arguments: object, **options: Any) -> Finished:
    """The `llama` command, as `python -m llama`."""
    return python(*LLAMA, *arguments, **options)


def elsewhere(folder: Path) -> Path:
    """A folder from which `python -m llama` runs this package, though not from a checkout: no models/ is beside it."""
    site = folder / "site"
    site.mkdir()
    (site / "llama").symlink_to(ROOT / "llama")
    return site


def torchrun_command(ranks: int, script: object, *arguments: object, launcher: Sequence[object] = ()) -> list[object]:
    return [TORCHRUN, "--nproc_per_node", ranks, *launcher, script, *arguments]


def torchrun(
    ranks: int, script: object, *arguments: object, env: Mapping[str, str] | None = None, **options: Any
) -> Finished:
    """Run torchrun and its ranks as `python` runs programs."""
    command = torchrun_command(ranks, script, *arguments)
    if not env:
        command = [forked_python(), *command]
        env = {"PYTHON_EXEC": str(forked_python())}  # what it starts ranks with
    return run(command, env=env, **options)


def prompts(texts: Sequence[str]) -> list[str]:
    """The flags that give these prompts, one each."""
    return [word for text in texts for word in ("--prompt", text)]
