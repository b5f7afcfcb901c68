"""How long work takes on a device, and how fast its memory is copied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from gpu_checking.bench import Bench
from llama.backends.base import Capture
from llama.backends.cuda.graphs import CudaGraphs

# Of small kernels together in a graph, so that launching it takes no part of the time.
LEAST_RUNS = 32
# Operands that are larger together than any cache: an H100's holds 50 MB.
UNCACHED = 256 << 20


class Recorder:
    """Records work, as CUDA graphs where there is CUDA, and counts; elsewhere it is run again as it is."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.seconds = 0, 0.0
        self._device = device
        self._graphs: Capture | None = CudaGraphs(device) if device.type == "cuda" else None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        start = now(self._device)
        if self._graphs is None:
            run()
        else:
            replay = self._graphs(run)
        self.count += 1
        self.seconds += now(self._device) - start
        return run if self._graphs is None else replay


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a run that is warm, by the device's own clock where it has one."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def seconds_each(runs: Sequence[Callable[[], object]], bench: Bench) -> float:
    """Median seconds of one of the runs, recorded together."""
    repeated = list(runs)
    if bench.device.type == "cuda":
        repeated *= -(-LEAST_RUNS // len(repeated))

    def all_runs() -> None:
        for run in repeated:
            run()

    return seconds(Recorder(bench.device)(all_runs), bench.device, bench.size.repeats) / len(repeated)


def measure_copies(bench: Bench) -> None:
    """GB/s of a copy, read and written bytes counted: what the device's memory gives."""
    source = torch.randint(0, 256, (bench.size.copied,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), bench.device, bench.size.repeats) for _ in range(3))
    bench.report.add("copy", gb_s=2 * source.nbytes / best / 1e9, bytes=source.nbytes)


def copy_gb_s(bench: Bench) -> float:
    return float(bench.report.figures["copy"][0]["gb_s"])
