#!/usr/bin/env python
"""What sampling costs with each parameter, in microseconds a token, on random logits: nothing is computed of a model.

    python scripts/sampling_benchmark.py --runs 20

Each figure is the time of a step over its rows, from logits to tokens: the median of the runs, which take turns. All
but "greedy", "top_p" and those that name it are at top_p 1. A text has 1,000 tokens where a parameter looks at it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import fire
import torch

from llama.sampling import FilterTensors, SamplingParams, SamplingTensors, SparseAdjustments, TokenHistory, TorchSampler

TEXT = 1000
GIVEN: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top_p": {},
    "top_p 1": {"top_p": 1.0},
    "top_k 40": {"top_k": 40, "top_p": 1.0},
    "top_k 40, top_p, min_p": {"top_k": 40, "min_p": 0.05},
    "min_p": {"min_p": 0.05, "top_p": 1.0},
    "min_p, top_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.9, "top_p": 1.0},
    "XTC": {"xtc_probability": 0.5, "top_p": 1.0},
    "repetition, presence, frequency": {
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "top_p": 1.0,
    },
    "DRY": {"dry_multiplier": 0.8, "top_p": 1.0},
    "logit_bias of 100": {"logit_bias": dict.fromkeys(range(100), -1.0), "top_p": 1.0},
    "min_tokens": {"min_tokens": 2 * TEXT, "top_p": 1.0},
}  # fmt: skip


class Step:
    """What is done of a token of each row, from logits on."""

    def __init__(self, n: int, vocab_size: int, options: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        # As peaked as a model's: the likeliest token has some tenths.
        self.logits = 4 * torch.randn(n, vocab_size, generator=generator)
        self.uniform = torch.rand(n, generator=generator)
        params = SamplingParams(**options)
        self.rows = SamplingTensors.of([params] * n, "cpu")
        self.filters = FilterTensors.of([params] * n, "cpu")
        self.histories: list[TokenHistory] = []
        if TokenHistory.is_needed(params):
            text = (torch.rand(TEXT, generator=generator) ** 3 * 2000).long().tolist()  # some tokens come often
            token_bytes = {token: b"%d" % token for token in range(vocab_size)}.__getitem__
            self.histories = [TokenHistory(text, params, [0, 1], token_bytes) for _ in range(n)]
        self.sampler = TorchSampler()

    def __call__(self) -> None:
        logits, found = self.logits, []
        for row, history in enumerate(self.histories):
            history.push(7)
            if (each := history.adjustments()) is not None:
                found.append((row, each))
        if found:
            logits = SparseAdjustments.of(found, "cpu").apply(logits)
        if self.filters is not None:
            logits = self.sampler.filter(logits, self.filters, self.rows.temperature, self.uniform)
        self.sampler(logits, self.uniform, self.rows)
        for history in self.histories:
            history.pop()


def seconds_of(function: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(runs: int = 20, threads: int = 1) -> None:
    """Print a table in Markdown."""
    torch.set_num_threads(threads)
    columns: dict[str, list[str]] = {name: [] for name in GIVEN}
    heads = []
    for vocab_size in (49_152, 128_256):
        for n in (1, 32):
            heads.append(f"{vocab_size:,}, {n} row" + "s" * (n > 1))
            steps = {name: Step(n, vocab_size, options) for name, options in GIVEN.items()}
            times: dict[str, list[float]] = {name: [] for name in GIVEN}
            for _ in range((runs if n == 1 else max(3, runs // 5)) + 1):
                for name, step in steps.items():
                    times[name].append(seconds_of(step))
            medians = {name: statistics.median(each[1:]) for name, each in times.items()}
            for name, cells in columns.items():
                cells.append(f"{medians[name] / n * 1e6:,.0f}")
    print(f"| | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for name, cells in columns.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    fire.Fire(main)
