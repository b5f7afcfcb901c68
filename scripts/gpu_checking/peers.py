"""Other systems that decode the same shape in the same run, in turn with ours."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess

import torch

from gpu_checking.bench import Bench
from gpu_checking.measure import decode, steps_at
from gpu_checking.processes import reply, started
from gpu_checking.random_models import random_model
from gpu_checking.sizes import FLOATS
from llama.engine.cuda_graph_runner import GraphSteps

PEERS = ("transformers", "gpt_fast")
SECONDS = 150  # to build and compile a peer, or to run it


def measure_peers(bench: Bench, peers: dict[str, str | None]) -> None:
    """One row, by peers of these names; their values say where those are that are not installed."""
    context, n_steps = bench.size.contexts[0], bench.size.peer_steps
    model = random_model(bench.size.args, FLOATS, bench.device, bench.dtype)
    steps, _ = steps_at(bench, model, 1, context + n_steps + 2)
    options = {
        "device": str(bench.device),
        "dtype": bench.shown(FLOATS),
        "args": dataclasses.asdict(dataclasses.replace(bench.size.args, rope_scaling=None, use_scaled_rope=False)),
        "context": context,
        "n_steps": n_steps,
    }
    for name, path in peers.items():
        if not bench.report.has_time(f"peer {name}"):
            continue
        try:
            with started("peer_worker", {"peer": name, "path": path, **options}) as process:
                reply(process, min(SECONDS, bench.report.seconds_left()))
                alternate(bench, name, process, steps, context, n_steps)
        except (OSError, ValueError) as error:
            bench.report.add("peers", name=name, error=str(error))


@torch.inference_mode()
def alternate(
    bench: Bench, name: str, process: subprocess.Popen[str], steps: GraphSteps, context: int, n_steps: int
) -> None:
    """Runs of both in turn, so that a machine that slows down slows both; a first run does not count."""
    ours, theirs = [], []
    for _ in range(1 + bench.size.repeats):
        times, _ = decode(steps, 1, context, n_steps)
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
