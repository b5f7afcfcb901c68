"""Decoding and prefills of a whole model, as a batch runs them: steps by graph, one launched ahead."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterator

import torch

from gpu_checking.bench import Bench
from gpu_checking.clock import Recorder, copy_gb_s, now, seconds
from gpu_checking.random_models import random_model
from gpu_checking.sizes import FLOATS
from llama.engine.context import Context
from llama.engine.cuda_graph_runner import CudaGraphRunner
from llama.engine.metrics import peak_memory_mib
from llama.engine.runner_pool import CACHE_LEN_MULTIPLE
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
    length = -(-(context + n_steps + 2) // CACHE_LEN_MULTIPLE) * CACHE_LEN_MULTIPLE
    needed = cache_bytes(model.args, model.parallel, model.dtype, BatchShape(bsz, context, length))
    if bench.device.type == "cuda" and needed + SPARE > free_bytes(bench.device, 1):
        what = f"decoding {shown}, batch {bsz} at {context}"
        bench.report.left_out.append(f"{what}: {needed / 1e9:.0f} GB of cache do not fit")
        return
    steps, recorder = steps_at(bench, model, bsz, length)
    start = now(bench.device)
    steps.launch([[1]] * bsz, [context] * bsz)
    steps.wait()
    first = now(bench.device) - start
    times, host = decode(steps, bsz, context, n_steps)
    step = statistics.median(times)
    kept = cache_bytes(model.args, model.parallel, model.dtype, BatchShape(bsz, 1, 1))
    n_bytes = model.weight_bytes + kept * (context + 1 + n_steps // 2)
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
        recording_s=recorder.seconds,
    )


def steps_at(bench: Bench, model: Transformer, bsz: int, length: int) -> tuple[CudaGraphRunner, Recorder]:
    """Greedy steps over a cache of random keys and values."""
    gc.collect()  # another cache may be as large
    context = Context(model, bsz, length)
    context.cache.keys.normal_()
    context.cache.values.normal_()
    recorder = Recorder(bench.device)
    steps = CudaGraphRunner(context, recorder)
    steps.begin(SamplingParams(temperature=0), torch.zeros(bsz, length))
    return steps, recorder


def decode(steps: CudaGraphRunner, bsz: int, context: int, n_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step, one launched ahead, and those of them that the host took to launch it."""
    steps.launch([[1]] * bsz, [context] * bsz)
    times, host = [], []
    for _ in range(n_steps):
        start = time.perf_counter()
        steps.launch_next()
        host.append(time.perf_counter() - start)
        steps.wait()
        times.append(time.perf_counter() - start)
    steps.wait()
    return times, host


@torch.inference_mode()
def generate(
    runner: CudaGraphRunner, prompts: list[list[int]], n_tokens: int, params: SamplingParams
) -> Iterator[list[int]]:
    """The next token of each prompt, n_tokens times: the first from the prefill, the others by steps."""
    context = runner.context
    runner.begin(params, torch.full((len(prompts), context.cache.max_seq_len), 0.5))
    hidden, _ = context.prefill(prompts)
    output = runner.sample(hidden[:, None], [len(prompt) - 1 for prompt in prompts])
    yield [row[0] for row in output.tokens]
    for i in range(n_tokens - 1):
        runner.launch([row[-1:] for row in output.tokens], [len(prompt) + i for prompt in prompts])
        output = runner.wait()
        yield [row[0] for row in output.tokens]


@torch.inference_mode()
def measure_prefill(bench: Bench, model: Transformer, shown: str, n_tokens: int) -> None:
    context = Context(model, 1, n_tokens)
    prompt = torch.randint(model.args.vocab_size, (n_tokens,)).tolist()

    def prefill() -> None:
        context.truncate([0])
        hidden, _ = context.prefill([prompt])
        model.logits(hidden).argmax()

    took = seconds(prefill, bench.device, bench.size.repeats)
    bench.report.add("prefill", form=shown, n_tokens=n_tokens, ms=1e3 * took, tok_s=n_tokens / took)
