"""Mutants by number, tried in processes with limits, many in each; and which of them fail.

A process that was warmed up forks those that try mutants, and forks another one when a mutant has ended one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.claims import silent
from tests.fuzz.seeds import FORMATS, write_seed
from tests.fuzz.structures import damage_file
from tests.fuzz.trial import Outcome, attempt, run_model

SPARE_BYTES = 1 << 30  # of address space, beyond what the warm process has
CPU_SECONDS, SECONDS = 10, 120  # for one mutant; the second for one that waits, on a machine that may be busy


@dataclass(frozen=True)
class Result:
    """What came of one mutant; `failure` says why it is a fault of the package, and is empty where it is none."""

    format: str
    number: int
    file: str
    outcome: Outcome
    failure: str = ""

    def __str__(self) -> str:
        said = (
            self.failure
            if self.failure == self.outcome.detail
            else f"{self.failure or self.outcome.kind}: {self.outcome.detail}"
        )
        return f"{self.format} {self.number} ({self.file}): {said[:400]}"


def mutant(format: str, number: int, folder: Path) -> tuple[str, bytes]:
    """Return the name of the file that is damaged, and its new content; folder: the whole model's."""
    rng = Random(f"{format} {number}")
    file = rng.choice(FORMATS[format].files)
    return file, damage_file(rng, file, (folder / file).read_bytes())


def run(format: str, numbers: Iterable[int]) -> Iterator[Result]:
    """Try mutants of one format; the caller's process must have no other threads, since it forks."""
    with tempfile.TemporaryDirectory() as temporary:
        seed = Path(temporary, "whole")
        write_seed(format, seed)
        left = list(numbers)
        while left:
            for result in _fork(format, list(left), seed, Path(temporary, "damaged")):
                left.remove(result.number)
                yield result


def _fork(format: str, numbers: list[int], seed: Path, folder: Path) -> Iterator[Result]:
    """Yield results of a process of their own, until one is missing because the process was killed, and that one."""
    reading, writing = os.pipe()
    errors = folder.with_name("stderr")
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        try:
            with os.fdopen(writing, "w") as pipe:
                _work(format, numbers, seed, folder, pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    at, done = 0, False
    with os.fdopen(reading) as pipe:
        for line in pipe:
            given = json.loads(line)
            outcome = Outcome(given["kind"], given["detail"], tuple(given["warnings"]))
            yield Result(format, numbers[at], given["file"], outcome, given["failure"])
            at += 1
    done = at == len(numbers)
    _, status = os.waitpid(pid, 0)
    if not done:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        kind = "hang" if name in ("SIGPROF", "SIGALRM") else "crash"
        said = errors.read_text(errors="replace")[-300:]
        file, _ = mutant(format, numbers[at], seed)
        yield Result(format, numbers[at], file, Outcome("killed", f"{name} {said!r}"), kind)


def _work(format: str, numbers: list[int], seed: Path, folder: Path, pipe: Any) -> None:
    """Try mutants one by one, and write what came of each as a line of JSON."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(seed, folder)
    chat = format == "chat"
    whole = run_model(folder, chat)
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert size is not None
    resource.setrlimit(resource.RLIMIT_AS, (int(size[1]) * 1024 + SPARE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        # The default action of either signal ends a process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        file, damaged = mutant(format, number, seed)
        original = (seed / file).read_bytes()
        (folder / file).write_bytes(damaged)
        outcome = attempt(folder, chat, whole)
        failure = outcome.detail if outcome.kind == "error" else ""
        if outcome.kind in ("same", "changed"):
            failure = silent(file, original, damaged, outcome)
        pipe.write(json.dumps({**asdict(outcome), "file": file, "failure": failure}) + "\n")
        pipe.flush()
        # A new file: views of the damaged one may still be mapped.
        (folder / file).unlink()
        (folder / file).write_bytes(original)
