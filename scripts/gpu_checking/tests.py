"""Whether the GPU's kernels are right: the tests that are marked `gpu`, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from gpu_checking.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/parity/test_cuda.py",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/unit/test_gpu_*")),
)


def run_tests(bench: Bench) -> None:
    """Run `pytest -m gpu`; each test that fails is a failure of this run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *FILES]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, bench.report.seconds_left())
        )
    except subprocess.TimeoutExpired:
        bench.report.left_out.append("tests: no time")
        return
    lines = done.stdout.splitlines()
    print("\n".join(lines[-40:]), flush=True)
    closing = lines[-1] if lines else ""
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing)}
    bench.report.add("tests", **counts)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        bench.report.failed += failed or [f"pytest ended with {done.returncode}: {closing or done.stderr[-300:]}"]
