"""Completes random prompts on each rank, and prints the rank's peak memory beside what was planned, as JSON.

usage: memory_worker.py CKPT_DIR DTYPE BSZ PROMPT_LEN MAX_GEN_LEN
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

import torch

from llama import Llama
from llama.distributed.job import from_all_ranks, join_job
from llama.engine.build import open_source
from llama.engine.options import BuildOptions
from llama.memory.estimate import BatchShape


def status() -> dict[str, int]:
    """This process's memory in bytes: RssAnon is private, VmHWM the peak of that and of pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def pages_of(folder: str) -> int:
    """Bytes of the folder's files that are mapped and in memory.

    How many pages of libraries are, too, hangs on how the system read those files: more of what was just installed.
    """
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = f" {folder}/" in line
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


class Peak(threading.Thread):
    """The highest RssAnon, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at, self.highest, self.done = status(), status(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.highest = {name: max(value, self.highest[name]) for name, value in status().items()}

    def above_start(self) -> dict[str, int]:
        return {name: self.highest[name] - self.start_at[name] for name in ("RssAnon", "VmHWM")}


def main(ckpt_dir: str, dtype: str, bsz: int, prompt_len: int, max_gen_len: int) -> None:
    join_job()
    job = BatchShape(bsz, prompt_len, prompt_len + max_gen_len)
    loading = Peak()
    llm = Llama.build(ckpt_dir, max_seq_len=job.length, max_batch_size=bsz, device="cpu", dtype=dtype)
    loading.done.set()
    running = Peak()
    if max_gen_len:
        prompts = torch.randint(0, llm.tokenizer.n_words, (bsz, prompt_len)).tolist()
        llm.generate(prompts, max_gen_len, temperature=0.7)
    running.done.set()
    source = open_source(BuildOptions(ckpt_dir, None, job.length, bsz, device="cpu", dtype=dtype))
    plan = source.planner(llm.model.parallel, 0).plan(job)
    weights = sum(weight.nbytes for weight in llm.model.parameters())
    running.start_at = loading.start_at
    result = {
        "planned": {
            "needed": plan.needed, "loading": plan.weights.loading, "mapped": plan.weights.mapped,
            "weights": plan.weights.total, "tensor": plan.weights.tensor, "activations": plan.activations,
            "cache": plan.cache,
        },
        "weights": weights,
        "loading": loading.above_start(),
        "running": running.above_start(),
        "pages": pages_of(ckpt_dir),
    }  # fmt: skip
    results = from_all_ranks(result)
    if llm.model.parallel.rank == 0:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    if "RANK" in os.environ:
        os._exit(0)  # as the examples leave: see llama.cli.runner
