"""`llama complete`: texts continued or, by a Code Llama, filled where they have a gap."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from typing import Annotated

from llama import Llama
from llama.chat.infilling import FILL_MARK, can_infill
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.engine.options import BuildOptions
from llama.outputs import CompletionPrediction, InfillingPrediction
from llama.sampling import SamplingParams

PROMPTS = [
    "The capital of France is",
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "def fibonacci(n):\n",
]


def main(
    options: Annotated[BuildOptions, build_flags("chat_format")],
    params: Annotated[SamplingParams, sampling_flags(max_gen_len=64)],
    *,
    prompt: list[str] | None = None,
    json: bool = False,
    dry_run: bool = False,
) -> None:
    """Complete prompts with a LLaMA model. stdout holds the completions alone.

    Args:
        prompt: text to complete, verbatim; repeat the flag or give a JSON list for several; Code Llama fills <FILL>;
            default: a few built in.
        json: print one JSON object a line.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if it does not fit.

    Examples:
        llama complete --prompt "The capital of France is" --temperature 0
        llama complete --ckpt_dir Llama-3.2-1B --quantize int8 --prompt "One" --prompt "Two" --json
        torchrun --nproc_per_node 2 -m llama complete --ckpt_dir Llama-2-13b
    """
    prompts = PROMPTS if prompt is None else prompt
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    if dry_run:
        end_with_plan(options, prompts, params)
    llm = Llama.from_options(options)
    if can_infill(llm.tokenizer) and any(FILL_MARK in text for text in prompts):
        results: Sequence[CompletionPrediction | InfillingPrediction] = infill(llm, prompts, params)
    else:
        results = llm.text_completion(
            prompts, params.temperature, params.top_p, params.max_gen_len, params.logprobs, params.echo
        )
    if not is_first_rank():
        return
    for text, result in zip(prompts, results, strict=True):
        if json:
            print(json_format.dumps({"prompt": text, **result}, ensure_ascii=False))
            continue
        print(f"{text}\n> {result['generation']}")
        if params.logprobs:
            for token, logprob in zip(result["tokens"], result["logprobs"], strict=True):
                print(f"{logprob:10.4f}  {token!r}")
        print("\n==================================\n", flush=True)
    report(llm)


def infill(llm: Llama, prompts: Sequence[str], params: SamplingParams) -> list[InfillingPrediction]:
    """Fill the <FILL> mark of each prompt. ValueError unless every prompt has exactly one."""
    for text in prompts:
        if text.count(FILL_MARK) != 1:
            raise ValueError(f"prompt {text!r} has {text.count(FILL_MARK)} marks {FILL_MARK}: each needs exactly one")
    prefixes, suffixes = zip(*(text.split(FILL_MARK) for text in prompts), strict=True)
    return llm.text_infilling(prefixes, suffixes, params.temperature, params.top_p, params.max_gen_len, params.logprobs)
