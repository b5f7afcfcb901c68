"""This package as it is measured: in this process or, run as a module, as a worker that answers jobs from stdin."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llama.benchmark.peer_worker import serve
from llama.checkpoint.base import dtype_name
from llama.engine.metrics import peak_memory_mib
from llama.engine.options import BuildOptions
from llama.generation import Llama

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Ours:
    """A model that `Llama.from_options` built, whose texts no token ends.

    name: what tables call it.
    loaded: how most weights are held and what else makes a difference, their bytes, and the dtype of the rest.
    """

    def __init__(self, options: BuildOptions, name: str = "ours") -> None:
        self.name = name
        self.llm = Llama.from_options(options)
        self.llm.tokenizer.stop_tokens = frozenset()
        model = self.llm.model
        self.vocab_size = min(self.llm.tokenizer.n_words, model.args.vocab_size)
        words = [SHORT.get(model.weight_types[0], model.weight_types[0]), options.speculate or ""]
        words += ["draft"] * (options.draft_ckpt_dir is not None) + ["compiled"] * options.compile
        weights = ", ".join(filter(None, words))
        self.loaded = {"weights": weights, "weight_bytes": model.weight_bytes, "dtype": dtype_name(model.dtype)}

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        """Complete prompts greedily by exactly gen_len tokens each; seconds, steps and tokens."""
        before = dataclasses.replace(self.llm.metrics)
        tokens, _ = self.llm.generate(prompts, gen_len, temperature=0)
        after = self.llm.metrics
        return {
            "prefill_s": after.prefill_seconds - before.prefill_seconds,
            "decode_s": after.decode_seconds - before.decode_seconds,
            "decode_steps": after.decode_steps - before.decode_steps,
            "tokens": tokens,
        }

    def peak_mib(self) -> float:
        return peak_memory_mib(self.llm.model.device)


if __name__ == "__main__":
    serve(lambda options: Ours(BuildOptions(**options)), (ValueError, OSError, torch.OutOfMemoryError))
