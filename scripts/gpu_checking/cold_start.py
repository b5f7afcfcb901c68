"""How long a new process takes from a ready model to its first tokens: a worker, and who asks it."""

from __future__ import annotations

import json
import sys
import tempfile
import time

import torch

from gpu_checking.bench import Bench, open_bench
from gpu_checking.clock import now
from gpu_checking.processes import reply, started
from gpu_checking.random_models import random_model
from gpu_checking.rows import Rows
from gpu_checking.sizes import FLOATS
from llama.sampling import SamplingParams

PROMPT_LEN, N_TOKENS = 30, 3
SECONDS = 120  # for one process


def measure_cold_start(bench: Bench) -> None:
    """In processes without a compiled kernel, and with those that the first has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("to compile", "compiled"):
            if bench.report.has_time(f"cold start, kernels {kernels}"):
                bench.report.measure(f"cold start, kernels {kernels}", ask, bench, FLOATS, kernels, folder)


def ask(bench: Bench, form: str, kernels: str, folder: str) -> None:
    start = time.perf_counter()
    with started("cold_start", {**bench.options, "form": form}, TRITON_CACHE_DIR=folder) as process:
        figures = reply(process, SECONDS)
    took = time.perf_counter() - start
    bench.report.add("cold_start", form=bench.shown(form), kernels=kernels, process_s=took, **figures)


@torch.inference_mode()
def first_tokens(bench: Bench, form: str) -> dict[str, float]:
    """Seconds to make the model, and from then on to the first and to the third token, which a graph makes."""
    start = now(bench.device)
    model = random_model(bench.size.args, form, bench.device, bench.dtype)
    ready = now(bench.device)
    prompt = torch.randint(model.args.vocab_size, (PROMPT_LEN,)).tolist()
    rows = Rows.of(model, [prompt], N_TOKENS, SamplingParams())
    times = [time.perf_counter() - ready for _ in rows.generate(N_TOKENS)]
    return {"model_s": ready - start, "first_token_s": times[0], "third_token_s": times[-1]}


def main() -> None:
    options = json.loads(sys.argv[1])
    form = options.pop("form")
    print(json.dumps(first_tokens(open_bench(**options), form)), flush=True)


if __name__ == "__main__":
    main()
