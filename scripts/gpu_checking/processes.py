"""Parts of the check that take a process of their own: modules of this folder, told what to do by JSON in argv."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
PLACES = (SCRIPTS, SCRIPTS.parent)  # this package, and llama where it is not installed


@contextlib.contextmanager
def started(module: str, options: Mapping[str, Any], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs gpu_checking.MODULE; it ends with the block."""
    path = os.pathsep.join([*map(str, PLACES), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", f"gpu_checking.{module}", json.dumps(options)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **env}, text=True, **pipes)  # type: ignore[call-overload]
    with process:
        try:
            yield process
        finally:
            process.kill()


def reply(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """The next line of JSON that it writes; ValueError where it says what failed, ends, or takes longer."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], max(seconds, 0))[0]:
        raise ValueError(f"no answer in {seconds:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise ValueError(f"ended with code {process.wait()}")
    said: dict[str, Any] = json.loads(line)
    if "error" in said:
        raise ValueError(said["error"])
    return said
