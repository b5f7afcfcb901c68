#!/usr/bin/env python
"""What the engine gains on a model: by places that are taken at once, and by beginnings that are computed once.

    python scripts/engine_benchmark.py --ckpt_dir models/SmolLM2-135M-Instruct.Q4_1.gguf --runs 3

Each line is a ratio of two ways to run the same requests, one after the other in the same process: the median of the
runs, and their range. Prompts are random tokens.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fire

from llama import Llama
from llama.sampling import SamplingParams

MAX_SEQ_LEN, MAX_BATCH_SIZE = 4608, 32


@dataclass(frozen=True)
class Job:
    """Prompts, and how many tokens follow each."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)


class Bench:
    """Runs jobs on a model; every run has prompts that nothing is cached of."""

    def __init__(self, llm: Llama) -> None:
        self.llm, self._random = llm, random.Random(0)
        llm.tokenizer.stop_tokens = frozenset()  # every request has the length that was asked for

    def tokens(self, n: int) -> list[int]:
        return [self._random.randrange(1000, self.llm.tokenizer.n_words) for _ in range(n)]

    def mixed(self) -> Job:
        """200 prompts of 5 to 400 tokens, and 1 to 200 tokens after each."""
        sizes = [(self._random.randint(5, 400), self._random.randint(1, 200)) for _ in range(200)]
        return Job([self.tokens(n) for n, _ in sizes], [n for _, n in sizes])

    def run(self, job: Job) -> float:
        """Run a job's requests together, and return the seconds that they take."""
        engine, start = self.llm.engine, time.perf_counter()
        for prompt, n in zip(job.prompts, job.lengths, strict=True):
            engine.add(prompt, SamplingParams(temperature=0, max_gen_len=n), interactive=False)
        while engine.unfinished:
            engine.step()
        return time.perf_counter() - start

    def static(self, job: Job) -> float:
        """Run a job in batches, each of which waits for its last request."""
        step = MAX_BATCH_SIZE
        places = range(0, len(job.prompts), step)
        return sum(self.run(Job(job.prompts[i : i + step], job.lengths[i : i + step])) for i in places)

    def continuous_against_static(self) -> float:
        job = self.mixed()
        return self.static(job) / self.run(Job([[*prompt[:-1], 7] for prompt in job.prompts], job.lengths))

    def shared_document(self) -> float:
        """32 questions of 20 tokens on a document of 1,500, against as many on documents of their own."""
        document, ends = self.tokens(1500), [self.tokens(20) for _ in range(32)]
        apart = [[*self.tokens(1), *document, *end] for end in ends]
        return self.run(Job(apart, [8] * 32)) / self.run(Job([[*document, *end] for end in ends], [8] * 32))

    def second_turn(self) -> float:
        """The first token of a second turn after one of 2,000 tokens, against the same text anew."""
        history = self.tokens(2000)
        self.run(Job([history], [16]))
        turn = self.tokens(20)
        again = self.run(Job([[*history, *turn]], [1]))
        return self.run(Job([[*self.tokens(1), *history, *turn]], [1])) / again

    def beside_a_prompt(self) -> float:
        """Time between two tokens of a row while a prompt of 4,000 tokens is read beside it, against alone."""
        engine = self.llm.engine
        reader = engine.add(self.tokens(20), SamplingParams(temperature=0))
        alone = [self._step() for _ in range(100)][20:]
        prompt = engine.add(self.tokens(4000), SamplingParams(temperature=0, max_gen_len=1))
        beside: list[float] = []
        while prompt in engine.requests and len(beside) < 300:
            beside.append(self._step())
        engine.cancel(reader)
        engine.cancel(prompt)
        return statistics.median(beside) / statistics.median(alone)

    def _step(self) -> float:
        start = time.perf_counter()
        self.llm.engine.step()
        return time.perf_counter() - start

    def throughput(self) -> float:
        """New tokens a second of 64 prompts of 16 to 256 tokens, 64 each, at most 32 at a time."""
        job = Job([self.tokens(self._random.randint(16, 256)) for _ in range(64)], [64] * 64)
        return job.n_tokens / self.run(job)


def main(ckpt_dir: str, runs: int = 3, dtype: str | None = None, only: Sequence[str] = ()) -> None:
    """Measure what the engine gains; only: names of measurements, of all by default."""
    llm = Llama.build(Path(ckpt_dir), max_seq_len=MAX_SEQ_LEN, max_batch_size=MAX_BATCH_SIZE, dtype=dtype)
    bench = Bench(llm)
    bench.run(Job([bench.tokens(40)], [4]))
    measurements: list[Callable[[], float]] = [
        bench.continuous_against_static,
        bench.shared_document,
        bench.second_turn,
        bench.beside_a_prompt,
        bench.throughput,
    ]
    for measure in measurements:
        name = measure.__name__
        if not only or name in only:
            found = [measure() for _ in range(runs)]
            print(f"{name:28s} {statistics.median(found):8.2f}   ({min(found):.2f} to {max(found):.2f})", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
