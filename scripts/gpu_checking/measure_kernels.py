"""Kernels alone: products against cuBLAS, attention, what lies between, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checking.bench import Bench
from gpu_checking.clock import UNCACHED, copy_gb_s, seconds_each
from gpu_checking.random_models import Maker
from gpu_checking.sizes import FLOATS
from llama.backends.cuda import attention, elementwise, gemm, gemv, heads
from llama.backends.cuda import sampling as gpu_sampling
from llama.backends.cuda.elementwise import NormWeights
from llama.backends.cuda.matmul import GpuWeight, matmul
from llama.cache import PAGE_SIZE, pages_for
from llama.config import ModelArgs, Sight
from llama.quantization.planar import MAX_GEMV_TOKENS
from llama.rope import Rotary

N_TOKENS = (1, MAX_GEMV_TOKENS)


# --- products ------------------------------------------------------------------------------------------------------


def linears(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the weights of a layer as they are multiplied, and of the output."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return {
        "wq wk wv": (q + 2 * kv, args.dim),
        "wo": (args.dim, q),
        "w1 w3": (2 * args.hidden_dim, args.dim),
        "w2": (args.dim, args.hidden_dim),
        "output": (args.vocab_size, args.dim),
    }


def measure_linears(bench: Bench) -> None:
    for form in bench.size.forms[:1] if bench.quick else bench.size.forms:
        for name, shape in linears(bench.size.args).items():
            what = f"{name} in {bench.shown(form)} alone"
            if bench.report.has_time(what):
                bench.report.measure(what, measure_linear, bench, form, name, *shape)


def gated_product(x: Tensor, weight: GpuWeight) -> Tensor:
    if isinstance(weight, Tensor):
        return elementwise.silu_and_mul(matmul(x, weight), x.dtype)
    return gemv.gated_gemv(x, weight) if len(x) == 1 else gemm.gated_gemm(x, weight)


@torch.inference_mode()
def measure_linear(bench: Bench, form: str, name: str, rows: int, columns: int) -> None:
    """GB/s of weights in turn that no cache holds together; the gates' are ours with the gate."""
    make = Maker(form, bench.device, bench.dtype)
    weights = [make(name, (rows, columns))]
    many = UNCACHED // weights[0].nbytes if bench.device.type == "cuda" else 0
    weights += [make(name, (rows, columns)) for _ in range(many)]
    for n in N_TOKENS:
        # Layers hand floats the rows that they are multiplied as.
        n_rows = MAX_GEMV_TOKENS if form == FLOATS else n
        x = torch.randn(n_rows, columns, device=bench.device, dtype=bench.dtype)
        multiply = gated_product if name == "w1 w3" else matmul
        ours = seconds_each([partial(multiply, x, weight) for weight in weights], bench)
        cublas: float | None = None
        if form == FLOATS:
            floats = [weight for weight in weights if isinstance(weight, Tensor)]
            cublas = (
                weights[0].nbytes / seconds_each([partial(F.linear, x[:n], weight) for weight in floats], bench) / 1e9
            )
        bench.report.add(
            "linears",
            form=bench.shown(form),
            name=name,
            rows=rows,
            columns=columns,
            n_tokens=n,
            us=1e6 * ours,
            gb_s=weights[0].nbytes / ours / 1e9,
            cublas_gb_s=cublas,
        )


# --- the rest ------------------------------------------------------------------------------------------------------


def measure_kernels(bench: Bench) -> None:
    for context in bench.size.contexts[-2:]:
        bench.report.measure(f"attention alone at {context}", measure_attention, bench, context)
    bench.report.measure("kernels between products", measure_between, bench)
    for vocab_size in bench.size.vocab_sizes:
        bench.report.measure("sampling alone", measure_sampling, bench, vocab_size)


@torch.inference_mode()
def measure_attention(bench: Bench, context: int) -> None:
    """One token against the keys of layers in turn, whose pages lie in a random order."""
    args = bench.size.args
    n_pages = pages_for(context)
    shape = args.n_layers, n_pages, PAGE_SIZE, args.n_kv_heads, args.head_dim
    keys, values = torch.randn(2, *shape, device=bench.device, dtype=bench.dtype)
    start_pos = torch.tensor([context - 1], device=bench.device)
    q = torch.randn(1, 1, args.n_heads, args.head_dim, device=bench.device, dtype=bench.dtype)
    table = torch.randperm(n_pages, device=bench.device).to(torch.int32)[None]
    each_layer = zip(keys, values, strict=True)
    runs = [partial(attention.flash_attention, q, k, v, table, start_pos, Sight()) for k, v in each_layer]
    took = seconds_each(runs, bench)
    gb_s = 2 * keys[0].nbytes / took / 1e9
    percent = 100 * gb_s / copy_gb_s(bench)
    bench.report.add("kernels", name=f"attention at {context}", us=1e6 * took, gb_s=gb_s, percent_of_copy=percent)


def time_kernel(bench: Bench, name: str, run: Callable[[], object]) -> None:
    bench.report.add("kernels", name=name, us=1e6 * seconds_each([run], bench), gb_s=None, percent_of_copy=None)


@torch.inference_mode()
def measure_between(bench: Bench) -> None:
    args = bench.size.args
    for n in N_TOKENS:
        x, delta = (torch.randn(n, args.dim, device=bench.device) for _ in range(2))
        weight = torch.ones(args.dim, device=bench.device, dtype=bench.dtype)
        run: Callable[[], object] = partial(
            elementwise.fused_add_norm, x, delta, NormWeights(weight), args.norm_eps, bench.dtype
        )
        time_kernel(bench, f"sum and norm, tokens: {n}", run)
        both = torch.randn(n, 2 * args.hidden_dim, device=bench.device, dtype=bench.dtype)
        time_kernel(bench, f"gate, tokens: {n}", partial(elementwise.silu_and_mul, both))
        slots = torch.arange(n, device=bench.device) * PAGE_SIZE
        rotation = Rotary(args.head_dim, args.rope_theta, None).to(bench.device)(torch.zeros_like(slots), None)
        columns = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
        qkv = torch.randn(n, columns, device=bench.device, dtype=bench.dtype)
        cache = torch.zeros(2, n, PAGE_SIZE, args.n_kv_heads, args.head_dim, device=bench.device, dtype=bench.dtype)
        counts = args.n_heads, args.n_kv_heads
        run = partial(heads.rope_and_append_kv, qkv, (rotation, rotation), slots, cache[0], cache[1], *counts)
        time_kernel(bench, f"rotation, tokens: {n}", run)


@torch.inference_mode()
def measure_sampling(bench: Bench, vocab_size: int) -> None:
    for n in N_TOKENS:
        logits = 4 * torch.randn(n, vocab_size, device=bench.device)
        uniform = torch.rand(n, device=bench.device)
        temperature, top_p = (torch.full((n,), value, device=bench.device) for value in (0.7, 0.9))
        runs: dict[str, Callable[[], object]] = {
            "greedy": partial(gpu_sampling.greedy, logits),
            "sampled": partial(gpu_sampling.sample_nucleus, logits, temperature, top_p, uniform),
            "sampled of all": partial(gpu_sampling.sample_all, logits, temperature, uniform),
        }
        for name, run in runs.items():
            time_kernel(bench, f"{name} of {vocab_size}, tokens: {n}", run)
