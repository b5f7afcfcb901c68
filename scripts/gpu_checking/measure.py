"""Decoding and prefills of a whole model, as a batch runs them: steps by graph, one launched ahead."""

from __future__ import annotations

import gc
import itertools
import statistics
import time

import torch

from gpu_checking.bench import Bench
from gpu_checking.clock import copy_gb_s, now, seconds
from gpu_checking.random_models import random_model
from gpu_checking.rows import Rows
from gpu_checking.sizes import FLOATS
from llama.cache import PAGE_SIZE, ForwardBatch
from llama.engine.metrics import peak_memory_mib
from llama.memory.available import free_bytes
from llama.memory.estimate import BatchShape, cache_bytes
from llama.model import Transformer
from llama.sampling import SamplingParams

PREFILLED = (FLOATS, "int4")
# Of the device's memory that stays free: graphs, and what a step makes.
SPARE = 4 << 30


def measure_form(bench: Bench, form: str) -> None:
    """Everything of a model whose weights are held so, which goes when it is measured."""
    shown = bench.shown(form)
    if not bench.report.has_time(f"a model in {shown}"):
        return
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    start = now(bench.device)
    model = random_model(bench.size.args, form, bench.device, bench.dtype)
    bench.report.add("models", form=shown, weight_bytes=model.weight_bytes, made_s=now(bench.device) - start)
    # What reads the least comes first.
    cells = sorted(itertools.product(bench.size.batches, bench.size.contexts), key=lambda cell: cell[0] * cell[1])
    for bsz, context in cells:
        what = f"decoding {shown}, batch {bsz} at {context}"
        if bench.report.has_time(what):
            bench.report.measure(what, measure_decoding, bench, model, shown, bsz, context)
    if form in PREFILLED:
        for n_tokens in bench.size.prompts:
            if bench.report.has_time(f"prefill {shown} of {n_tokens}"):
                bench.report.measure(f"prefill {shown} of {n_tokens}", measure_prefill, bench, model, shown, n_tokens)
    bench.report.add("memory", form=shown, peak_mib=peak_memory_mib(bench.device))


@torch.inference_mode()
def measure_decoding(bench: Bench, model: Transformer, shown: str, bsz: int, context: int) -> None:
    """Greedy steps of rows that hold `context` random keys; bytes are those of weights and of keys and values read."""
    n_steps = bench.size.steps
    needed = cache_bytes(model.args, model.parallel, model.dtype, BatchShape(bsz, context, context + n_steps + 2))
    if bench.device.type == "cuda" and needed + SPARE > free_bytes(bench.device, 1):
        what = f"decoding {shown}, batch {bsz} at {context}"
        bench.report.left_out.append(f"{what}: {needed / 1e9:.0f} GB of cache do not fit")
        return
    rows = rows_at(model, bsz, context, n_steps)
    start = now(bench.device)
    rows.runner.launch(rows.chunks([[1]] * bsz))
    rows.runner.wait()
    first = now(bench.device) - start
    times, host = decode(rows, n_steps)
    step = statistics.median(times)
    page = cache_bytes(model.args, model.parallel, model.dtype, BatchShape(bsz, 1, PAGE_SIZE))
    n_bytes = model.weight_bytes + page * (context + 1 + n_steps // 2) // PAGE_SIZE
    gb_s = n_bytes / step / 1e9
    bench.report.add(
        "decode",
        form=shown,
        bsz=bsz,
        context=context,
        ms=1e3 * step,
        tok_s=bsz / step,
        gb_s=gb_s,
        percent_of_copy=100 * gb_s / copy_gb_s(bench),
        cache_bytes=n_bytes - model.weight_bytes,
        host_us=1e6 * statistics.median(host),
        first_step_s=first,
        recording_s=rows.recorder.seconds,
    )


def rows_at(model: Transformer, bsz: int, context: int, n_steps: int) -> Rows:
    """Greedy rows over a cache of random keys and values."""
    gc.collect()  # another cache may be as large
    rows = Rows.of(model, [[1] * context] * bsz, n_steps + 2, SamplingParams(temperature=0))
    rows.runner.cache.keys.normal_()
    rows.runner.cache.values.normal_()
    return rows


def decode(rows: Rows, n_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, one launched ahead, and those of them that the host took to launch it."""
    tokens = [[1]] * len(rows.sequences)
    rows.runner.launch(rows.chunks(tokens))
    times, host = [], []
    for i in range(1, n_steps + 1):
        start = time.perf_counter()
        rows.runner.launch_next(rows.chunks(tokens, i))
        host.append(time.perf_counter() - start)
        rows.runner.wait()
        times.append(time.perf_counter() - start)
    rows.runner.wait()
    return times, host


@torch.inference_mode()
def measure_prefill(bench: Bench, model: Transformer, shown: str, n_tokens: int) -> None:
    cache = model.new_cache(1, n_tokens)
    prompt = torch.randint(model.args.vocab_size, (n_tokens,)).to(bench.device)
    start_pos = torch.zeros(1, dtype=torch.long, device=bench.device)

    def prefill() -> None:
        hidden = model.hidden(prompt, ForwardBatch.of_rows(cache, start_pos, n_tokens))
        model.logits(hidden[-1:]).argmax()

    took = seconds(prefill, bench.device, bench.size.repeats)
    bench.report.add("prefill", form=shown, n_tokens=n_tokens, ms=1e3 * took, tok_s=n_tokens / took)
