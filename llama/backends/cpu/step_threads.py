"""How many threads a step has, beside what other processes take of the cores.

Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

from llama.backends.cpu import ops
from llama.distributed.threads import allowed_cpus

# Seconds between looks at what other processes take: 25 of the kernel's ticks.
SECONDS_TO_LOOK = 0.25
# Cores that others may keep busy before a thread gives way; one that shares its core with another process counts half.
TOLERATED = 0.3


class CpuTimes(NamedTuple):
    """Ticks since a machine and this process started, of the CPUs that it may run on."""

    elapsed: float
    busy: int
    own: int

    @classmethod
    def read(cls, cpus: set[int], root: Path) -> CpuTimes:
        """Read the kernel's accounts; raise OSError where there are none. root: the root of the file system."""
        names = {f"cpu{cpu}" for cpu in cpus}
        lines = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
        rows = [list(map(int, words[1:9])) for words in lines if words and words[0] in names]
        # user, nice, system, idle, iowait, irq, softirq, steal. Processes that are nicer than this one give way to it.
        nice = os.getpriority(os.PRIO_PROCESS, 0) > 0
        busy = sum(row[0] + row[1] * nice + row[2] + row[5] + row[6] for row in rows)
        own = (root / "proc/self/stat").read_text().rpartition(")")[2].split()[11:13]
        return cls(sum(map(sum, rows)) / max(1, len(rows)), busy, sum(map(int, own)))


class StepThreads:
    """A context with as many threads as other processes leave cores free, and at most torch's number of them.

    Threads wait for each other some 150 times a token: where one has to wait for a core, all wait. It is for work whose
    results do not depend on the number (see D30), which torch's matrix products do not promise. Only the thread that
    enters is told. A number that the user chose stays.
    """

    def __init__(self, share: int, root: Path = Path("/"), seconds: float = SECONDS_TO_LOOK) -> None:
        """Give way where torch's number of threads is `share`; look every `seconds`. root: of the file system."""
        self._root, self._seconds = root, seconds
        self._share = self._threads = share
        self._cpus = allowed_cpus()
        self._look_at = math.inf
        if self._share > 1:
            with contextlib.suppress(OSError):
                self._times = CpuTimes.read(self._cpus, root)
                self._look_at = time.monotonic() + seconds

    def __enter__(self) -> None:
        if time.monotonic() >= self._look_at:
            self._look()
        self._torchs = torch.get_num_threads()
        if self._threads < self._torchs == self._share:
            ops.set_openmp_threads(self._threads)

    def __exit__(self, *error: object) -> None:
        if self._threads < self._torchs == self._share:
            ops.set_openmp_threads(self._torchs)

    def _look(self) -> None:
        self._look_at = time.monotonic() + self._seconds
        try:
            before, now = self._times, CpuTimes.read(self._cpus, self._root)
        except OSError:  # too many open files, at the moment
            return
        elapsed = now.elapsed - before.elapsed
        if elapsed > 0:
            others = ((now.busy - before.busy) - (now.own - before.own)) / elapsed
            free = int(len(self._cpus) - others + TOLERATED)
            self._threads, self._times = max(1, min(self._share, free)), now
