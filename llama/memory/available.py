"""How much memory a device has to give. Knows nothing of models."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

# What a rank takes before it has a model: Python, torch and this package (measured: 159 to 164 MB, Linux, no CUDA).
PROCESS = 165_000_000

# Where nothing tells: more than any machine has.
UNKNOWN = 1 << 62

# Files of a control group, version 2 and 1: the limit, what is used, and what of that are pages of files.
CGROUP_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def readable(n_bytes: int) -> str:
    if n_bytes >= UNKNOWN:
        return "unknown"
    unit, size = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6) if n_bytes >= 1e6 else ("KB", 1e3)
    return f"{n_bytes / size:.2f} {unit}"


def free_bytes(device: torch.device, ranks: int, started: int | None = None) -> int:
    """What one of a host's `ranks` processes may take on its device, when all or `started` of them are running."""
    if device.type == "cuda":
        # What this process freed is kept by torch, for this process.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = min([_host_free(), *cgroups_free(Path("/"))])
    if device.type == "mps":  # a share of the host's memory
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    to_start = 0 if started is None else max(0, ranks - started)
    return free if free >= UNKNOWN else max(0, free - PROCESS * to_start) // ranks


def _host_free() -> int:
    """Memory that can be had without swapping: free pages, and pages of files that can be read again."""
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


def _vm_stat_free(text: str) -> int:
    """Free and inactive memory from macOS's vm_stat, which counts pages."""
    page = re.search(r"page size of (\d+) bytes", text)
    counts = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)", text, re.MULTILINE)
    return int(page[1]) * sum(map(int, counts)) if page and counts else UNKNOWN


def cgroups_free(root: Path) -> list[int]:
    """What each limited control group of this process leaves it below `root`; pages of files are given back if needed.

    Which groups have limits is read once a process, what they use each time.
    """
    rooms = []
    for folder, limit, used, file_pages in _limited_cgroups(root):
        try:
            stat, now = (folder / "memory.stat").read_text(), int((folder / used).read_text())
        except (OSError, ValueError):
            continue
        pages = re.findall(rf"^(?:{'|'.join(file_pages)}) (\d+)$", stat, re.MULTILINE)
        rooms.append(max(0, limit - now + sum(map(int, pages))))
    return rooms


@functools.cache
def _limited_cgroups(root: Path) -> list[tuple[Path, int, str, tuple[str, ...]]]:
    """The folder of each control group that limits this process, its limit in bytes, and the names to read there."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limited: list[tuple[Path, int, str, tuple[str, ...]]] = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # A container sees its own group at the top, whatever the path says.
        folders = [top / path.strip("/"), *(top / path.strip("/")).parents]
        for folder in folders[: folders.index(top) + 1]:
            for limit, used, file_pages in CGROUP_FILES:
                with contextlib.suppress(OSError):
                    most = (folder / limit).read_text().strip()
                    if most.isdecimal():
                        limited.append((folder, int(most), used, file_pages))
    return limited
