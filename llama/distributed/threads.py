"""The number of threads that a rank computes with: the host's physical cores are divided among its ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")


def share_cores(ranks: int) -> None:
    """Give this process its share of the cores of a host with `ranks` ranks, unless the user set OMP_NUM_THREADS."""
    if not _user_chose_threads():
        torch.set_num_threads(max(1, physical_cores() // ranks))


def physical_cores(cpus: Path = CPUS) -> int:
    """Count the physical cores that this process may run on: two threads of one core would slow each other down."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            cores.add((cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:  # not Linux: torch's own default is as good
            return min(len(allowed), torch.get_num_threads())
    return len(cores)


def _user_chose_threads() -> bool:
    """Tell whether the user set OMP_NUM_THREADS: where it is absent, torchrun sets it to 1 for its ranks."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value != "1":
        return value is not None
    try:
        return b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
