"""`llama bench`: how fast one checkpoint reads a prompt and writes tokens on this machine, by the clock."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from typing import Annotated

import torch

from llama import Llama
from llama.checkpoint.base import dtype_name
from llama.cli.options import GENERATION, SIZES, build_flags
from llama.cli.printing import json_line
from llama.cli.runner import is_first_rank
from llama.engine.options import BuildOptions


def main(
    options: Annotated[BuildOptions, build_flags(*SIZES, *GENERATION)],
    *,
    prompt_len: int = 512,
    gen_len: int = 128,
    runs: int = 5,
    json: bool = False,
) -> None:
    """Measure the speed of prefill and of decode for a prompt of random tokens; alone or under torchrun.

    Figures are medians over the runs, after one that does not count. Prefill is the time to the first token, decode
    the time from there to the last; end tokens do not end a run.

    Args:
        prompt_len: tokens of the prompt.
        gen_len: tokens to generate.
        runs: runs that count.
        json: print one JSON object.

    Examples:
        llama bench --ckpt_dir Llama-3.2-1B --quantize int8
        torchrun --nproc_per_node 2 -m llama bench --ckpt_dir Llama-2-13b --json
    """
    for name, value, least in (("prompt_len", prompt_len, 1), ("gen_len", gen_len, 2), ("runs", runs, 1)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    llm = Llama.from_options(dataclasses.replace(options, max_seq_len=prompt_len + gen_len, max_batch_size=1))
    llm.tokenizer.stop_tokens = frozenset()
    prompts = random_prompts(1 + runs, prompt_len, min(llm.tokenizer.n_words, llm.model.args.vocab_size))
    seconds = [measure(llm, prompt, gen_len) for prompt in prompts][1:]
    to_first, to_last = (statistics.median(each) for each in zip(*seconds, strict=True))
    decode_tok_s = (gen_len - 1) / to_last
    model = llm.model
    result = {
        "ckpt_dir": str(options.ckpt_dir),
        "prompt_len": prompt_len,
        "gen_len": gen_len,
        "runs": runs,
        "prefill_tok_s": prompt_len / to_first,
        "decode_tok_s": decode_tok_s,
        "bandwidth_gb_s": model.weight_bytes * decode_tok_s / 1e9,
        "weights": model.weight_types,
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "ranks": model.parallel.size,
        "threads": torch.get_num_threads(),
    }
    if is_first_rank():
        said = (
            "prefill {prompt_len} tokens at {prefill_tok_s:.1f} tok/s; decode {gen_len} tokens at {decode_tok_s:.1f} "
            "tok/s, {bandwidth_gb_s:.2f} GB/s of weights; median of {runs}"
        )
        print(json_line(result) if json else said.format(**result))


def random_prompts(n: int, prompt_len: int, vocab_size: int) -> list[list[int]]:
    """Return n prompts, the same at each call: one for each run, so that no run finds its prompt cached already."""
    numbers = random.Random(0)
    return [[numbers.randrange(vocab_size) for _ in range(prompt_len)] for _ in range(n)]


def measure(llm: Llama, prompt: list[int], gen_len: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last of gen_len."""
    start = time.perf_counter()
    times = [time.perf_counter() for step in llm.stream([prompt], gen_len, temperature=0) if step.token is not None]
    assert len(times) == gen_len, (len(times), gen_len)
    return times[0] - start, times[-1] - times[0]
