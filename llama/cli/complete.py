"""`llama complete`: texts continued or, by a Code Llama, filled where they have a gap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from llama import Llama
from llama.chat.infilling import FILL_MARK, can_infill, infilling_prompt_tokens, split_at_gap
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.printing import ResultPrinter
from llama.cli.prompts import read_prompts
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.signals import before_end
from llama.engine.options import BuildOptions
from llama.outputs import CompletionPrediction, InfillingPrediction, TokenEvent, fold_prompt
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
    prompt_file: Path | None = None,
    json: bool = False,
    dry_run: bool = False,
) -> None:
    """Complete prompts with a LLaMA model. stdout holds the completions alone.

    Results come in the order of the prompts, each as soon as it is complete.

    Args:
        prompt: text to complete, verbatim, or - for stdin; repeat the flag or give a JSON list for several; Code Llama
            fills <FILL>; default: a few built in.
        prompt_file: a file with a prompt a line, or a JSON list of them; - is stdin.
        json: print one JSON object a line.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if none fits.

    Examples:
        llama complete --prompt "The capital of France is" --temperature 0
        llama complete --ckpt_dir Llama-3.2-1B --quantize int8 --prompt "One" --prompt "Two" --json
        llama complete --prompt_file prompts.txt --json > completions.jsonl
        torchrun --nproc_per_node 2 -m llama complete --ckpt_dir Llama-2-13b
    """
    prompts = read_prompts(prompt, prompt_file, options.timeout, needed=not dry_run) or PROMPTS
    if dry_run:
        end_with_plan(options, prompts, params)
    llm = Llama.from_options(options)
    fills = can_infill(llm.tokenizer) and any(FILL_MARK in text for text in prompts)
    if fills:
        tokens = [infilling_prompt_tokens(llm.tokenizer, *split_at_gap(text)) for text in prompts]
    else:
        tokens = llm.encode_prompts(prompts)

    def predict(index: int, events: list[TokenEvent]) -> CompletionPrediction | InfillingPrediction:
        result = fold_prompt(events, llm.tokenizer, params.logprobs)
        if not fills:
            return result
        return InfillingPrediction(**result, full_text=result["generation"].join(split_at_gap(prompts[index])))

    events = llm.stream(
        tokens,
        params.max_gen_len,
        params.temperature,
        params.top_p,
        params.logprobs,
        params.echo and not fills,
        add_prefix_space=not fills,
    )
    if is_first_rank():
        printer = ResultPrinter(prompts, predict, json)
        with before_end(printer.finish):
            try:
                for event in events:
                    printer.add(event)
            finally:
                printer.finish()
        report(llm)
    else:
        for _ in events:
            pass
