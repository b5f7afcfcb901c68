"""What processes take of this machine's CPUs, as the kernel of Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


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
