"""This package or transformers as a worker of scripts/benchmark.py: options as JSON in argv, then jobs from stdin.

Each line of stdin is a job {"prompts", "gen_len"}; each line of stdout is a reply. The first says what was loaded.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import dtype_name
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.distributed.device import choose_device, choose_dtype
from llama.engine.metrics import peak_memory_mib

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Run(NamedTuple):
    """Seconds until the first tokens, and for the rest in decode_steps passes; the new tokens of each prompt."""

    prefill_s: float
    decode_s: float
    decode_steps: int
    tokens: list[list[int]]


class System(Protocol):
    """What is measured; weight_bytes are those read in one step of decoding."""

    device: torch.device
    held: str  # what most of the weights are held in
    vocab_size: int
    weight_bytes: int

    def run(self, prompts: list[list[int]], gen_len: int) -> Run:
        """Greedy completions of exactly gen_len tokens, which no end token ends."""
        ...


class Ours:
    """`Llama.build` with `build`'s options beside the common ones."""

    def __init__(
        self, path: str, device: str | None, dtype: str | None, max_seq_len: int, build: dict[str, Any]
    ) -> None:
        self.llm = Llama.build(path, max_seq_len=max_seq_len, device=device, dtype=dtype, **build)
        self.llm.tokenizer.stop_tokens = frozenset()
        model = self.llm.model
        self.device, self.vocab_size = model.device, model.args.vocab_size
        self.held = SHORT.get(model.weight_types[0], model.weight_types[0])
        self.weight_bytes = model.weight_bytes

    def run(self, prompts: list[list[int]], gen_len: int) -> Run:
        before = dataclasses.replace(self.llm.metrics)
        tokens, _ = self.llm.generate(prompts, gen_len, temperature=0)
        after = self.llm.metrics
        return Run(
            after.prefill_seconds - before.prefill_seconds,
            after.decode_seconds - before.decode_seconds,
            after.decode_steps - before.decode_steps,
            tokens,
        )


class Transformers:
    """transformers' `generate` with the same weights, dtype and device."""

    def __init__(
        self, path: str, device: str | None, dtype: str | None, max_seq_len: int, build: dict[str, Any]
    ) -> None:
        assert not build, build
        try:
            import transformers
        except ImportError:
            raise ValueError("--peer transformers needs the library: pip install '.[bench]'") from None
        checkpoint = open_checkpoint(path)
        self.device = choose_device(device)
        chosen = choose_dtype(dtype, self.device, checkpoint.dtype)
        self.held = SHORT[dtype_name(chosen)]
        with tempfile.TemporaryDirectory() as folder:
            name = dtype_name(chosen)
            made = writer(checkpoint, tokenizer_source(checkpoint), "hf", dtype=name, context_len=max_seq_len)
            write_checkpoint(made, Path(folder, "model"), lambda n_bytes: None)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=chosen)
        self.model = model.to(device=self.device).eval()
        self.vocab_size = model.config.vocab_size
        table = model.get_input_embeddings().weight
        tied = table is model.get_output_embeddings().weight
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters()) - (0 if tied else table.nbytes)

    def run(self, prompts: list[list[int]], gen_len: int) -> Run:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        seconds = []
        for new_tokens in (1, gen_len):
            start = time.perf_counter()
            made = self.model.generate(
                tokens,
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            ).cpu()
            seconds.append(time.perf_counter() - start)
        return Run(seconds[0], seconds[1] - seconds[0], gen_len - 1, made[:, longest:].tolist())


SYSTEMS: dict[str, Callable[..., System]] = {"ours": Ours, "transformers": Transformers}


def in_words(held: str, build: dict[str, Any]) -> str:
    """How most of the weights are held, and what else of `Llama.build` makes the difference: "Q8_0, lookup"."""
    words = [held, "compiled" if build.get("compile") else None, build.get("speculate")]
    return ", ".join(str(word) for word in words if word is not None)


def main() -> None:
    options = json.loads(sys.argv[1])
    try:
        system = SYSTEMS[options.pop("system")](**options)
        loaded = {"vocab_size": system.vocab_size, "weight_bytes": system.weight_bytes}
        print(json.dumps({**loaded, "weights": in_words(system.held, options["build"])}), flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            run = system.run(job["prompts"], job["gen_len"])
            print(json.dumps({**run._asdict(), "peak_mib": peak_memory_mib(system.device)}), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
