"""Test that the GPU's kernels are right, and measure how fast they are: one command, one GPU, no network, 8 minutes.

Models are random, of the shape of Llama 3.1 8B (checks of whole models: of Llama 3.2 1B), so nothing is downloaded.
With several GPUs, `torchrun --nproc-per-node N scripts/gpu_check.py` checks what they do together, and nothing else.
"""

from __future__ import annotations

import datetime
import json as json_format
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from gpu_checking import (
    check_families,
    check_ranks,
    clock,
    measure,
    measure_kernels,
    table,
)
from gpu_checking.bench import Bench, open_bench
from gpu_checking.cold_start import measure_cold_start
from gpu_checking.peers import PEERS, measure_peers
from gpu_checking.report import Section
from gpu_checking.sizes import FLOATS
from gpu_checking.tests import run_tests
from gpu_checking.warming import warm
from llama.benchmark.machine import machine_name
from llama.cli import runner as cli
from llama.distributed.torchrun_env import read_torchrun_env

ONLY = ("tests", "speed", "peers")


def main(
    *,
    json: str | None = None,
    quick: bool = False,
    peers: str | None = None,
    gpt_fast: str | None = None,
    only: str | None = None,
    device: str | None = None,
    size: str = "8b",
    seconds: float = 450,
) -> None:
    """Test the GPU's kernels, measure them, and end with one JSON object on the last line; exit 1 where one is wrong.

    Args:
        json: also write the JSON object to this file.
        quick: tests, and the speed of 16-bit weights alone.
        peers: transformers: decode with it, too, in turn with ours.
        gpt_fast: a checkout of gpt-fast to decode with, too, in turn with ours.
        only: tests, speed or peers; default: all. Peers, of which one may compile for minutes, have all the time then.
        device: cuda, or cpu, where Triton's interpreter runs the kernels; default: the first of these that is there.
        size: 8b, 1b or tiny: the shape of what is measured.
        seconds: the time for all; what does not fit is left out, the least important first, and said.
    """
    begin = time.monotonic()
    if only not in (None, *ONLY):
        raise ValueError(f"--only must be one of {', '.join(ONLY)}, got {only!r}")
    if peers not in (None, PEERS[0]):
        raise ValueError(f"--peers must be {PEERS[0]}, got {peers!r}")
    if gpt_fast is not None and not Path(gpt_fast, "model.py").is_file():
        raise ValueError(f"--gpt_fast must be a checkout of gpt-fast, and {gpt_fast} has no model.py")
    asked: dict[str, str | None] = {PEERS[0]: None} if peers else {}
    if gpt_fast is not None:
        asked["gpt_fast"] = gpt_fast
    bench = open_bench(device, size, seconds, quick)
    torch.manual_seed(0)
    if only == "peers" and not asked:
        raise ValueError("--only peers takes --peers, --gpt_fast or both")
    sections = tests(bench) if only in (None, "tests") else []
    if only in (None, "speed") and not is_many():
        sections += measurements(bench)
    if asked and only != "tests" and not is_many():
        sections.append(("peers", 12, partial(measure_peers, bench, asked)))
    bench.report.run(sections)
    if cli.is_first_rank():
        report(bench, json, {"size": size, "seconds": round(time.monotonic() - begin, 1)})
    if bench.report.failed:
        sys.exit(1)


def is_many() -> bool:
    return read_torchrun_env().world_size > 1


def tests(bench: Bench) -> list[Section]:
    """Under torchrun, what several GPUs do together; else the tests that are marked `gpu`, where there is one."""
    if is_many():
        return [("ranks", 1, partial(check_ranks.check_ranks, bench))]
    bench.report.left_out.append("several GPUs: start them with torchrun")
    if bench.device.type != "cuda":
        bench.report.left_out.append("tests: pytest runs them by Triton's interpreter")
        return [("families", 1, partial(check_families.check_families, bench))]
    return [("families", 3, partial(check_families.check_families, bench)), ("tests", 16, partial(run_tests, bench))]


def measurements(bench: Bench) -> list[Section]:
    """A copy comes first, as all is held against it."""
    first, *others = bench.size.forms
    compiled: list[Section] = [("compiling", 8, partial(warm, bench))] if bench.device.type == "cuda" else []
    sections: list[Section] = [
        *compiled,
        ("copies", 1, partial(clock.measure_copies, bench)),
        (f"decoding {bench.shown(FLOATS)}", 5, partial(measure.measure_form, bench, first)),
    ]
    if not bench.quick:
        sections += [(f"decoding {form}", 4, partial(measure.measure_form, bench, form)) for form in others]
    return [
        *sections,
        ("cold start", 8, partial(measure_cold_start, bench)),
        ("linears alone", 5, partial(measure_kernels.measure_linears, bench)),
        ("kernels alone", 2, partial(measure_kernels.measure_kernels, bench)),
    ]


def report(bench: Bench, json: str | None, about: dict[str, Any]) -> None:
    """Print what was found, and the JSON object last."""
    found = bench.report
    for goal in table.goals(found.figures):
        found.add("goals", **goal)
    print("\n".join(table.lines(found.figures)))
    for what in found.left_out:
        print(f"left out: {what}")
    for what in found.failed:
        print(f"FAILED: {what}")
    result = {
        "machine": machine_name(bench.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "dtype": bench.shown(FLOATS),
        **about,
        "checks": found.checks,
        **found.figures,
        "left_out": found.left_out,
        "failed": found.failed,
    }
    line = json_format.dumps(result)
    if json is not None:
        Path(json).write_text(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
