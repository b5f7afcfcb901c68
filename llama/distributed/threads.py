"""The number of threads that a rank computes with: the host's physical cores are divided among its ranks."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import os
import re
import sys
from pathlib import Path

import torch

from llama.distributed.cgroups import cgroup_folders
from llama.distributed.torchrun_env import read_torchrun_env

log = logging.getLogger("llama")

# What nobody chose: torch's own number, later that of share_cores. Any other is the caller's, by torch.set_num_threads.
_default_threads = torch.get_num_threads()


def share_cores(ranks: int) -> None:
    """Give this process its share of the cores of a host with `ranks` ranks, unless the user chose another number."""
    global _default_threads
    threads = torch.get_num_threads()
    chosen = user_chose_threads()
    if not chosen:
        threads = max(1, usable_cores(Path("/")) // ranks)
    sure = openmp_threads()
    if sure < min(threads, torch.get_num_threads()):
        log.warning(
            "threads: %d, as OpenMP may give fewer than are asked for, and torch's products are wrong then: unset "
            "OMP_DYNAMIC, OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS for %d",
            sure,
            threads,
        )
    elif chosen and threads == _default_threads:
        _tell_if_cut(os.environ.get("OMP_NUM_THREADS", ""), threads)
    threads = min(sure, threads)
    if not chosen:
        _default_threads = threads
    torch.set_num_threads(threads)


@functools.cache  # a job is joined several times
def _tell_if_cut(value: str, threads: int) -> None:
    """Log where OMP_NUM_THREADS asks for more threads than torch gives, which is one for each physical core."""
    asked = re.match(r"\s*\d+", value)  # of a list, the outermost level counts
    if asked and int(asked[0]) > threads:
        log.info("threads: %d, and not the %d of OMP_NUM_THREADS, as there are no more cores", threads, int(asked[0]))


def user_chose_threads() -> bool:
    """Tell whether the user chose a number, by OMP_NUM_THREADS or torch.set_num_threads.

    Where OMP_NUM_THREADS is absent, torchrun sets it to 1 for its ranks.
    """
    if torch.get_num_threads() != _default_threads:
        return True
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value != "1" or not read_torchrun_env().torchrun:
        return value != ""
    try:
        return b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False


def usable_cores(root: Path) -> int:
    """Count the physical cores that this process may use, of those that a container's quota of CPU time pays for.

    Two threads of one core would slow each other down; a thread that has used up its quota holds up all others. root:
    the root of the file system.
    """
    cpus = allowed_cpus()
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:  # not Linux: torch's own default is as good
            return min(len(cpus), torch.get_num_threads())
    return max(1, math.floor(min(len(cores), _cpu_quota(root))))


def allowed_cpus() -> set[int]:
    """Return the numbers of the CPUs that this process may run on.

    With OMP_PROC_BIND or OMP_PLACES, OpenMP has bound this thread to the first of its places: those of all count.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cpus, openmp = os.sched_getaffinity(0), ctypes.CDLL(None)  # torch's OpenMP is among the process's symbols
    with contextlib.suppress(AttributeError):  # a torch without OpenMP
        for place in range(openmp.omp_get_num_places()):
            ids = (ctypes.c_int * openmp.omp_get_place_num_procs(place))()
            openmp.omp_get_place_proc_ids(place, ids)
            cpus |= set(ids)
    return cpus


def openmp_threads() -> int:
    """Return how many threads OpenMP is sure to give: torch's products in bf16 are wrong, or NaN, where it gives fewer.

    oneDNN, which computes them, deals out its work to as many threads as it asks for, and does not count those it got.
    """
    try:
        openmp = ctypes.CDLL(None)
        if openmp.omp_get_dynamic() or not openmp.omp_get_max_active_levels():
            return 1
        return int(openmp.omp_get_thread_limit())
    except (AttributeError, TypeError):  # a torch without OpenMP; a system where a process's symbols have no name
        return sys.maxsize


def _cpu_quota(root: Path) -> float:
    """Return the CPUs' worth of time that control groups allow this process, or infinity."""
    quotas = [math.inf]
    for folder in cgroup_folders("cpu", root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no number
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                if quota > 0:  # version 1 has -1 for no limit
                    quotas.append(quota / period)
    return min(quotas)
