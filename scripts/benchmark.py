"""Measure prefill, decode, time to first token and memory; with --peer, in turn with another system in the same run.

Each system works in a process of its own and idles while another is measured, so that a machine that slows down slows
both, and peaks of memory are each system's own. Prompts are random tokens, or with --copy a text and the beginning of
its repetition, the same for all systems; end tokens do not end a run.
"""

from __future__ import annotations

import contextlib
import datetime
import json as json_format
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from benchmarking import roofline
from benchmarking.machine import machine_name, read_bandwidth_gb_s
from benchmarking.prompts import copy_prompts, random_prompts
from benchmarking.workers import BatchShape, Worker, llama_cpp_worker, torch_worker
from llama.checkpoint import open_checkpoint
from llama.cli import runner as cli
from llama.cli.get import demo_model
from llama.distributed.device import choose_device

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("transformers", "llama_cpp", "plain")
BOUND = "max_seq_len="


def main(
    *,
    ckpt_dir: str | None = None,
    peer: str | None = None,
    peer_ckpt_dir: str | None = None,
    peer_python: str | None = None,
    prompt_len: int = 512,
    gen_len: int = 64,
    batch_size: int = 1,
    max_seq_len: int = 2048,
    runs: int = 5,
    copy: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    speculate: str | None = None,
    draft_ckpt_dir: str | None = None,
    cold: bool = False,
    plot: str | None = None,
    json: bool = False,
) -> None:
    """Benchmark this package, alone or in turn with a peer; medians over the runs, ratios run by run.

    Args:
        ckpt_dir: as for the examples; default: the demo model.
        peer: transformers, llama_cpp, plain (this package without quantize to draft_ckpt_dir), or max_seq_len=N.
        peer_ckpt_dir: the peer's weights; default: the same.
        peer_python: interpreter that has llama-cpp-python; default: the one that runs this.
        prompt_len: tokens of the longest prompt; in a batch, row i has (i + 1) / batch_size of them.
        gen_len: tokens to generate for each prompt.
        batch_size: prompts that run together.
        max_seq_len: most tokens of a prompt and its completion.
        runs: runs that count, after one that does not.
        copy: prompts are real text and the beginning of its repetition: what prompt lookup is good at.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        quantize: form of the weights in memory, as for Llama.build; default: dtype.
        compile: compile the steps of decoding.
        speculate: how tokens are guessed ahead, as for Llama.build.
        draft_ckpt_dir: the model that guesses.
        cold: also time whole processes: `import torch`, and 8 tokens of the completion example.
        plot: draw bytes of weights a token against tokens/s into this PNG; scripts/roofline.py draws several runs.
        json: end with one JSON object on the last line of stdout.
    """
    check_sizes(prompt_len, gen_len, batch_size, max_seq_len, runs)
    path = ckpt_dir if ckpt_dir is not None else str(demo_model())
    computes_on = choose_device(device)
    if plot is not None:
        roofline.check_can_draw(Path(plot))
    # What was not given is not passed on: its default is the library's to choose.
    build = {
        name: value
        for name, value in (
            ("quantize", quantize),
            ("compile", compile or None),
            ("speculate", speculate),
            ("draft_ckpt_dir", draft_ckpt_dir),
        )
        if value is not None
    }
    common = {"device": device, "dtype": dtype, "max_seq_len": max_seq_len}
    lengths = [prompt_len * (i + 1) // batch_size for i in range(batch_size)]
    with contextlib.ExitStack() as stack:
        systems: list[Worker] = []
        if peer is not None:  # first, so that a peer that is not installed is told before gigabytes are read
            if peer == "llama_cpp" and (batch_size > 1 or computes_on.type != "cpu"):
                raise ValueError(
                    "--peer llama_cpp is compared on a CPU with one prompt: give --device cpu --batch_size 1"
                )
            weights = peer_ckpt_dir if peer_ckpt_dir is not None else path
            systems.append(stack.enter_context(peer_worker(peer, weights, peer_python, build, common)))
        systems.insert(0, stack.enter_context(torch_worker("ours", "ours", path=path, build=build, **common)))
        generator = torch.Generator().manual_seed(0)
        copies: list[list[int]] | None = None
        results: list[list[dict[str, float]]] = []
        tokenizer = open_checkpoint(path).tokenizer() if copy else None
        for run in range(1 + runs):
            if tokenizer is not None:
                prompts, copies = copy_prompts(lengths, gen_len, tokenizer, generator)
            else:
                prompts = random_prompts(lengths, min(system.vocab_size for system in systems), generator)
            figures = [measure(system, BatchShape(prompts, gen_len), copies) for system in systems]
            if run:  # the first run of a process pays for allocations and code paths
                results.append(figures)
        bandwidth = read_bandwidth_gb_s(computes_on)  # while all systems idle
    summaries = [summarise(system, [each[i] for each in results], bandwidth) for i, system in enumerate(systems)]
    for each in summaries:
        print_row(each)
    summary = summaries[0] | {
        "machine": machine_name(computes_on),
        "date": datetime.date.today().isoformat(),
        "ckpt_dir": path,
        "prompts": "copy" if copy else "random",
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "batch_size": batch_size,
    }
    if peer is not None:
        summary["peer"] = summaries[1]
        for figure in ("decode", "prefill"):
            ratios = [ours[f"{figure}_tok_s"] / theirs[f"{figure}_tok_s"] for ours, theirs in results]
            summary[f"{figure}_ratio"] = statistics.median(ratios)
            print(f"{figure}: {statistics.median(ratios):.2f} x {peer} (runs: {min(ratios):.2f} to {max(ratios):.2f})")
    if cold:
        summary |= cold_seconds(path, runs)
        print(f"import torch {summary['import_torch_s']:.2f} s, whole process, 8 tokens: {summary['cold_s']:.2f} s")
    if plot is not None:
        roofline.draw([summary], Path(plot))
    if json:
        print(json_format.dumps(summary))


def check_sizes(prompt_len: int, gen_len: int, batch_size: int, max_seq_len: int, runs: int) -> None:
    least = {"prompt_len": batch_size, "gen_len": 2, "batch_size": 1, "runs": 1}  # 2: the prefill gives the first
    for name, value in {"batch_size": batch_size, "prompt_len": prompt_len, "gen_len": gen_len, "runs": runs}.items():
        if value < least[name]:
            raise ValueError(f"--{name} must be at least {least[name]}, got {value}")
    if prompt_len + gen_len > max_seq_len:
        raise ValueError(f"{prompt_len} + {gen_len} tokens do not fit: --max_seq_len is {max_seq_len}")


def peer_worker(
    peer: str, path: str, python: str | None, build: dict[str, Any], common: dict[str, Any]
) -> AbstractContextManager[Worker]:
    """The system that ours is compared with; ValueError for a name that is none."""
    if peer == "llama_cpp":
        return llama_cpp_worker(peer, python or sys.executable, path, torch.get_num_threads(), common["max_seq_len"])
    if peer == "plain":
        return torch_worker(peer, "ours", path=path, build={}, **common)
    if peer == "transformers":
        return torch_worker(peer, "transformers", path=path, build={}, **common)
    bound = peer.removeprefix(BOUND)
    if bound == peer or not bound.isdecimal():
        raise ValueError(f"--peer must be one of {', '.join(PEERS)} or {BOUND}N, got {peer!r}")
    return torch_worker(peer, "ours", path=path, build=build, **{**common, "max_seq_len": int(bound)})


def measure(system: Worker, job: BatchShape, copies: list[list[int]] | None) -> dict[str, float]:
    """The figures of one run, and how much of what it wrote is the copy that it was to make."""
    figures, tokens = system.run(job)
    if copies is not None:
        pairs = [pair for row, copy in zip(tokens, copies, strict=True) for pair in zip(row, copy, strict=True)]
        figures["copied_percent"] = 100 * statistics.mean(token == expected for token, expected in pairs)
    return figures


def summarise(system: Worker, figures: list[dict[str, float]], bandwidth: float) -> dict[str, Any]:
    medians = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
    return {
        "system": system.name,
        "weights": system.weights,
        "weight_bytes": system.weight_bytes,
        **medians,
        "read_gb_s": bandwidth,
        "bandwidth_percent": 100 * medians["bandwidth_gb_s"] / bandwidth,
    }


def print_row(summary: dict[str, Any]) -> None:
    copied = f", copied {summary['copied_percent']:.0f} %" if "copied_percent" in summary else ""
    print(
        f"{summary['system'] + ' ' + summary['weights']:>20}: prefill {summary['prefill_tok_s']:8.1f} tok/s, first "
        f"token {summary['ttft_s']:6.3f} s, decode {summary['decode_tok_s']:7.1f} tok/s = "
        f"{summary['bandwidth_gb_s']:6.1f} GB/s ({summary['bandwidth_percent']:.0f} % of {summary['read_gb_s']:.1f}), "
        f"peak {summary['peak_mib']:.0f} MiB{copied}"
    )


def cold_seconds(path: str, runs: int) -> dict[str, float]:
    """Median seconds of whole processes, in turn."""
    example = [str(ROOT / "example_text_completion.py"), "--ckpt_dir", path, "--prompt", "Hello", "--max_gen_len", "8"]
    commands = {"import_torch_s": ["-c", "import torch"], "cold_s": example}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    cli.run(main)
