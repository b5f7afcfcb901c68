"""`llama bench`: how fast checkpoints read a prompt and write tokens on this machine, by the clock.

One checkpoint alone is measured in this process, and on all ranks of torchrun. Several, or other systems beside, work
in processes of their own, in turn.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch

from llama.benchmark import roofline
from llama.benchmark.compare import Workload, choose_peers, measure, started_systems, summarise
from llama.benchmark.machine import machine_name, read_bandwidth_gb_s
from llama.benchmark.ours import Ours
from llama.benchmark.workers import find_peers
from llama.checkpoint import open_checkpoint
from llama.cli.options import SIZES, build_flags
from llama.cli.perplexity import TEXT
from llama.cli.printing import json_line, say
from llama.distributed.device import choose_device
from llama.distributed.torchrun_env import read_torchrun_env
from llama.engine.options import BuildOptions

ROW = "{:<16}{:<12}{:>9}{:>22}{:>9}{:>7}  {:<20}{:<20}"
COLUMNS = ("", "weights", "decode", "of memory's GB/s", "prefill", "MiB", "decode, ours", "prefill, ours")


def main(
    options: Annotated[BuildOptions, build_flags(*SIZES, "seed", "chat_format")],
    *,
    prompt_len: int = 512,
    gen_len: int = 128,
    batch_size: int = 1,
    runs: int = 5,
    copy: bool = False,
    compare: str | None = None,
    peer_python: list[str] | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Measure the speed of prefill and decode, alone or under torchrun, or in turn with other systems.

    Figures are medians over the runs, after one that does not count. Prefill is the time to the first token, decode
    the time from there to the last; end tokens do not end a run. --ckpt_dir may be several, separated by commas.

    Args:
        prompt_len: tokens of the longest prompt; in a batch, row i has (i + 1) / batch_size of them.
        gen_len: tokens to generate for each prompt.
        batch_size: prompts that run together.
        runs: runs that count.
        copy: prompts are a text and the beginning of its repetition, not random: what lookup is good at.
        compare: all, which is what is installed of llama_cpp, transformers and vllm; or some of these, separated by
            commas; or plain, this package by default.
        peer_python: an interpreter that has peers which this one lacks; may be repeated.
        plot: draw bytes of weights a token against tokens/s, of all checkpoints and systems, into this PNG.
        json: print a JSON object for each checkpoint.

    Examples:
        llama bench --ckpt_dir Llama-3.2-1B --quantize int8
        llama bench --ckpt_dir 1B-Q4_0.gguf,1B-Q8_0.gguf --compare all --plot speed.png
        torchrun --nproc_per_node 2 -m llama bench --ckpt_dir Llama-2-13b --json
    """
    text = TEXT.read_text(encoding="utf-8") if copy else None
    workload = Workload(prompt_len, gen_len, batch_size, runs, text)
    options = dataclasses.replace(options, max_seq_len=prompt_len + gen_len, max_batch_size=batch_size)
    paths = checkpoints(os.fspath(options.ckpt_dir))
    device = choose_device(options.device)
    if plot is not None:
        roofline.check_can_draw(plot)
    if compare is None and plot is None and len(paths) == 1:
        alone(options, workload, json)
        return
    if read_torchrun_env().world_size > 1:
        raise ValueError("--compare, --plot and several checkpoints start processes of their own: leave torchrun out")
    if options.lora:
        raise ValueError("others do not read adapters: llama convert --lora makes a whole model to compare")
    pythons = [sys.executable, *(peer_python or [])]
    found = find_peers(pythons) if compare is not None else {}
    peers = [] if compare is None else choose_peers(compare, found, pythons)
    for path in paths:
        open_checkpoint(path)  # what is wrong with any is told before minutes of measuring
    results = []
    for path in paths:
        checkpoint = open_checkpoint(path)
        chosen = dataclasses.replace(options, ckpt_dir=path)
        with started_systems(chosen, peers, found, all_must_run=compare != "all") as systems:
            figures = measure(systems, workload, checkpoint)
            bandwidth = read_bandwidth_gb_s(device)  # while all systems idle
            ours, *others = summarise(systems, figures)
        results.append({**about(workload, path, device), "read_gb_s": bandwidth, **ours, "peers": others})
        say(json_line(results[-1]) + "\n" if json else system_table(results[-1], with_heading=len(results) == 1))
    if plot is not None:
        roofline.draw_roofline(results, plot)


def checkpoints(text: str) -> list[str]:
    """Return the paths that --ckpt_dir names: one, or several that commas separate."""
    return [text] if os.path.exists(text) else [os.path.expanduser(path) for path in text.split(",")]


def alone(options: BuildOptions, workload: Workload, json: bool) -> None:
    """Measure one checkpoint in this process, which may be a rank of several."""
    ours = Ours(options)
    (summary,) = summarise([ours], measure([ours], workload, open_checkpoint(options.ckpt_dir)))
    model = ours.llm.model
    result = {**about(workload, str(options.ckpt_dir), model.device), **summary, "ranks": model.parallel.size}
    said = (
        "prefill {prompt_len} tokens at {prefill_tok_s:.1f} tok/s; decode {gen_len} tokens at {decode_tok_s:.1f} "
        "tok/s, {bandwidth_gb_s:.2f} GB/s of weights; median of {runs}"
    )
    say((json_line(result) if json else said.format(**result)) + "\n")


def about(workload: Workload, path: str, device: torch.device) -> dict[str, Any]:
    """Return what a result says beside its figures."""
    sizes = {name: value for name, value in dataclasses.asdict(workload).items() if name != "text"}
    return {
        "ckpt_dir": path,
        "machine": machine_name(device),
        "date": datetime.date.today().isoformat(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "prompts": "random" if workload.text is None else "copy",
        **sizes,
    }


def system_table(result: dict[str, Any], with_heading: bool) -> str:
    """Return the lines of a checkpoint's systems, below what they have in common."""
    heading = (
        "{machine}, {date}; tokens/s in turn, medians of {runs}, ratios with least and most\n"
        "prompts of {prompt_len} {prompts} tokens, {gen_len} generated, {batch_size} at a time\n"
    ).format(**result)
    lines = [heading + ROW.format(*COLUMNS).rstrip()] if with_heading else []
    lines.append(Path(result["ckpt_dir"]).name)
    lines += [system_row(each, result["read_gb_s"]) for each in (result, *result["peers"])]
    return "\n".join(lines) + "\n"


def system_row(summary: dict[str, Any], read_gb_s: float) -> str:
    """Return the line of one system; ratios are ours to it."""
    ratios = [summary.get(name) for name in ("decode_ratio", "prefill_ratio")]
    of_memory = f"{summary['bandwidth_gb_s']:.1f} ({summary['bandwidth_gb_s'] / read_gb_s:.0%} of {read_gb_s:.1f})"
    copied = f"copied {summary['copied_percent']:.0f} %" if "copied_percent" in summary else ""
    return ROW.format(
        f"  {summary['system']}",
        summary["weights"],
        f"{summary['decode_tok_s']:.1f}",
        of_memory,
        f"{summary['prefill_tok_s']:.1f}",
        f"{summary['peak_mib']:.0f}",
        *("" if each is None else "{:.2f} ({:.2f}-{:.2f})".format(*each) for each in ratios),
    ).rstrip() + f"  {copied}" * bool(copied)
