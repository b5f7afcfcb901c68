"""Rows of steps without an engine: sequences that hold pages of their own, and the runner that computes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from gpu_checking.clock import Recorder
from llama.cache import PAGE_SIZE, pages_for
from llama.engine.cuda_graph_runner import CudaGraphRunner
from llama.engine.sequence import Chunk, Sequence
from llama.model import Transformer
from llama.sampling import SamplingParams

NO_TEXT = cast(Any, None)  # tokens stay tokens here


@dataclass(frozen=True)
class Rows:
    """Rows of the same number of steps; a graph is captured for each kind of step when it comes."""

    runner: CudaGraphRunner
    sequences: list[Sequence]
    recorder: Recorder

    @staticmethod
    def of(model: Transformer, prompts: list[list[int]], n_tokens: int, params: SamplingParams) -> Rows:
        """Prompts that nothing is cached of yet, each with room for n_tokens more."""
        width = pages_for(max(map(len, prompts)) + n_tokens)
        cache = model.new_cache(1, (1 + len(prompts) * width) * PAGE_SIZE)  # page 0 is nobody's
        recorder = Recorder(model.device)
        runner = CudaGraphRunner(model, cache, recorder, len(prompts), width)
        sequences = []
        for row, prompt in enumerate(prompts):
            sequence = Sequence(row, prompt, params, n_tokens, frozenset(), (0, row, 0), NO_TEXT, [], False)
            sequence.begin(width)
            for page in range(width):
                sequence.add_page(1 + row * width + page)
            sequences.append(sequence)
        return Rows(runner, sequences, recorder)

    def chunks(self, tokens: list[list[int]], n_before: int = 0) -> list[Chunk]:
        """The newest token of each row, n_before tokens after its prompt."""
        for sequence in self.sequences:
            sequence.in_prompt = False
        return [
            Chunk(sequence, len(sequence.prompt) + n_before, newest, 1)
            for sequence, newest in zip(self.sequences, tokens, strict=True)
        ]

    def generate(self, n_tokens: int) -> Iterator[list[int]]:
        """The next token of each prompt, n_tokens times: the first from the prefill, the others by steps."""
        chunks = [Chunk(sequence, 0, sequence.prompt, 1) for sequence in self.sequences]
        for i in range(n_tokens):
            self.runner.launch(chunks)
            tokens = self.runner.wait().tokens
            yield [row[0] for row in tokens]
            chunks = self.chunks(tokens, i)
