"""Other systems that decode the same shape in the same run, in turn with ours."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
from collections.abc import Iterator

import torch

from gpu_checking.bench import Bench
from gpu_checking.measure import decode, rows_at
from gpu_checking.processes import reply, started
from gpu_checking.random_models import random_model
from gpu_checking.rows import Rows
from gpu_checking.sizes import FLOATS

PEERS = ("transformers", "gpt_fast")
SECONDS = 150  # to run a peer; to build and compile them, all at once, they have the section's time


def measure_peers(bench: Bench, peers: dict[str, str | None]) -> None:
    """One row, by peers of these names; their values say where those are that are not installed."""
    context, n_steps = bench.size.contexts[0], bench.size.peer_steps
    model = random_model(bench.size.args, FLOATS, bench.device, bench.dtype)
    rows = rows_at(model, 1, context, n_steps)
    options = {
        "device": str(bench.device),
        "dtype": bench.shown(FLOATS),
        "args": dataclasses.asdict(dataclasses.replace(bench.size.args, rope_scaling=None, use_scaled_rope=False)),
        "context": context,
        "n_steps": n_steps,
    }
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(started("peer_worker", {"peer": name, "path": path, **options}))
            for name, path in peers.items()
        }
        ready = []
        for name, process in workers.items():  # none is measured while another compiles
            with told(bench, name):
                reply(process, bench.report.seconds_left())
                ready.append(name)
        for name in workers.keys() - ready:
            workers[name].kill()
        for name in ready:
            with told(bench, name):
                alternate(bench, name, workers[name], rows, context, n_steps)


@contextlib.contextmanager
def told(bench: Bench, name: str) -> Iterator[None]:
    """What a peer's process fails at is reported, and ends nothing else."""
    try:
        yield
    except (OSError, ValueError) as error:
        bench.report.add("peers", name=name, error=str(error))


@torch.inference_mode()
def alternate(bench: Bench, name: str, process: subprocess.Popen[str], rows: Rows, context: int, n_steps: int) -> None:
    """Runs of both in turn, so that a machine that slows down slows both; a first run does not count."""
    ours, theirs = [], []
    for _ in range(1 + bench.size.repeats):
        times, _ = decode(rows, n_steps)
        ours.append(1e3 * statistics.mean(times))
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        theirs.append(reply(process, SECONDS)["ms"])
    ratios = [their / our for our, their in zip(ours[1:], theirs[1:], strict=True)]
    bench.report.add(
        "peers",
        name=name,
        context=context,
        ms=statistics.median(theirs[1:]),
        ours_ms=statistics.median(ours[1:]),
        ours_is_faster_by=statistics.median(ratios),
        error=None,
    )
