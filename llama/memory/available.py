"""How much memory is free on a device. Knows nothing of models."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from llama.distributed.cgroups import cgroup_folders

# Bytes of a rank before it has a model: Python, torch and this package (measured: 159 to 164 MB, Linux, no CUDA).
PROCESS = 165_000_000

# Of /proc/meminfo: how much may be allocated where no more is promised than there is, and how much is.
COMMITTED = ("CommitLimit", "Committed_AS")

# Returned where the free memory cannot be found out: more than any machine has.
UNKNOWN = 1 << 62

# Of control groups (cgroups), version 2 and 1: the files with the limit and the usage, and the keys of memory.stat
# that count pages of files in it.
CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def readable(n_bytes: int) -> str:
    """Format a number of bytes for people, like "1.50 GB"."""
    if n_bytes >= UNKNOWN:
        return "unknown"
    unit, size = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6) if n_bytes >= 1e6 else ("KB", 1e3)
    return f"{n_bytes / size:.2f} {unit}"


def free_bytes(device: torch.device, ranks: int, started: int | None = None) -> int:
    """Return the bytes that each of a host's `ranks` processes may take on its device.

    started: how many of them are running already; None: all.
    """
    if device.type == "cuda":
        # torch caches what this process has freed, for this process.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = min([_host_free(), commitable(Path("/")), *cgroups_free(Path("/"))])
    if device.type == "mps":  # a share of the host's memory
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free = min(free, _address_space() * ranks)
    to_start = 0 if started is None else max(0, ranks - started)
    return free if free >= UNKNOWN else max(0, free - PROCESS * to_start) // ranks


def _host_free() -> int:
    """Return the bytes that are available without swapping: free pages, and pages of files that can be read again."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        meminfo = ""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if available:
        return int(available[1]) * 1024
    if sys.platform == "darwin":
        return _vm_stat_free(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
    names = getattr(os, "sysconf_names", {})
    pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else UNKNOWN


def commitable(root: Path) -> int:
    """Return half of what may still be allocated where the system promises no more than it has (overcommit_memory 2).

    Half, since a cache is allocated before it is written, and others are to start meanwhile. root: of the file system.
    """
    with contextlib.suppress(OSError, ValueError):
        if int((root / "proc/sys/vm/overcommit_memory").read_text()) == 2:
            meminfo = (root / "proc/meminfo").read_text()
            limit, used = (re.search(rf"^{name}:\s+(\d+) kB", meminfo, re.MULTILINE) for name in COMMITTED)
            if limit and used:
                return max(0, int(limit[1]) - int(used[1])) * 1024 // 2
    return UNKNOWN


def _address_space() -> int:
    """Return half of the addresses that this process has left, where they are limited (ulimit -v)."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            return max(0, limit - used) // 2
    return UNKNOWN


def _vm_stat_free(text: str) -> int:
    """Return the bytes that are free or inactive by macOS's vm_stat, which counts pages."""
    page = re.search(r"page size of (\d+) bytes", text)
    counts = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, counts)) if page and counts else UNKNOWN


def cgroups_free(root: Path) -> list[int]:
    """Return the free bytes of each limited control group of this process; pages of files count as free.

    The limits are read once a process, the usage at every call. root: the root of the file system.
    """
    free = []
    for folder, limit, used, file_pages in _limited_cgroups(root):
        try:
            stat, now = (folder / "memory.stat").read_text(), int((folder / used).read_text())
        except (OSError, ValueError):
            continue
        pages = re.findall(rf"^(?:{'|'.join(file_pages)}) (\d+)$", stat, re.MULTILINE)
        free.append(max(0, limit - now + sum(map(int, pages))))
    return free


@functools.cache
def _limited_cgroups(root: Path) -> list[tuple[Path, int, str, tuple[str, ...]]]:
    """Return each control group that limits this process: its folder, its limit in bytes, and names of CGROUP_FILES."""
    limited: list[tuple[Path, int, str, tuple[str, ...]]] = []
    for folder in cgroup_folders("memory", root):
        for limit, used, file_pages in CGROUP_FILES:
            with contextlib.suppress(OSError):
                value = (folder / limit).read_text().strip()
                if value.isdecimal():
                    limited.append((folder, int(value), used, file_pages))
    return limited
