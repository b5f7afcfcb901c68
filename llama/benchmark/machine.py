"""What the figures of a benchmark are held against: the machine's name, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Beyond any cache's size, and long enough to read that starting does not count.
READ_BYTES = {"cpu": 512 << 20, "mps": 512 << 20, "cuda": 4 << 30}


def read_bandwidth_gb_s(device: torch.device) -> float:
    """The best GB/s at which this device reads memory, in a matrix-vector product or a sum of fp32."""
    matrix = torch.ones(READ_BYTES[device.type] // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    readings: list[Callable[[], Tensor]] = [lambda: torch.mv(matrix, vector).sum(), matrix.sum]
    best = 0.0
    for _ in range(7):
        for reading in readings:
            start = time.perf_counter()
            reading().item()  # item() waits for the device
            best = max(best, matrix.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def machine_name(device: torch.device) -> str:
    """The processor that computes, and how many threads are used of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
