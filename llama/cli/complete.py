"""`llama complete`: texts continued or, by a Code Llama, filled where they have a gap."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from llama import Llama
from llama.chat.infilling import FILL_MARK, can_infill, infilling_prompt_tokens, split_at_gap
from llama.cli.colours import Colours, colour_depth
from llama.cli.constraints import read_constraints
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.printing import Paint, ResultPrinter, Table, no_table, score_table
from llama.cli.prompts import on_first_rank, read_prompts
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.shown_tokens import TokenNames, shown_tokens
from llama.cli.signals import before_end
from llama.cli.token_page import check_writable, token_page, write_whole
from llama.config import ModelArgs
from llama.engine.options import BuildOptions
from llama.engine.prompts import check_token_ids, encode_texts, prompt_ids
from llama.outputs import CompletionPrediction, InfillingPrediction, TokenEvent, fold_prompt
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

PROMPTS = [
    "The capital of France is",
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "def fibonacci(n):\n",
]
# What a page shows in the place of each token, unless --top_logprobs says another number.
PAGE_ALTERNATIVES = 5


def main(
    options: Annotated[BuildOptions, build_flags("chat_format")],
    params: Annotated[SamplingParams, sampling_flags(max_gen_len=64)],
    *,
    prompt: list[str] | None = None,
    prompt_file: Path | None = None,
    json: bool = False,
    show_probs: bool = False,
    html: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Complete prompts with a LLaMA model. stdout holds the completions alone.

    Results come in the order of the prompts, each as soon as it is complete; a single one appears as it comes.

    Args:
        prompt: text to complete, verbatim, or - for all of stdin; repeat the flag or give a JSON list for several; Code
            Llama fills <FILL>; default: a few built in.
        prompt_file: a file with a prompt a line, or a JSON list of them; - is stdin.
        json: print one JSON object a line.
        show_probs: colour tokens by their probability; where there are no colours, print a table.
        html: also write a page with each token's probability and what was likely in its place.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if none fits.

    Examples:
        llama complete --prompt "The capital of France is" --temperature 0
        llama complete --prompt "One" --prompt "Two" --n 3 --json > results.jsonl
        llama complete --prompt - --html story.html < story.txt
        torchrun --nproc_per_node 2 -m llama complete --ckpt_dir Llama-2-13b
    """
    if json and show_probs:
        raise ValueError("--show_probs is for people and --json for programs: give --logprobs with --json")
    prompts = read_prompts(prompt, prompt_file, options.timeout, needed=not dry_run) or PROMPTS
    if dry_run:
        end_with_plan(options, prompts, params)
    params = read_constraints(params, options.timeout)
    if html is not None:
        on_first_rank(lambda: check_writable(html), options.timeout)
    tokens: list[list[int]] = []

    def check(tokenizer: Tokenizer, args: ModelArgs) -> None:
        check_token_ids(params, args)
        tokens.extend(encode(prompts, tokenizer, args))

    llm = Llama.from_options(options, check=check)
    fills = has_gaps(prompts, llm.tokenizer)
    is_page = html is not None
    run_params = dataclasses.replace(
        params,
        echo=params.echo and not fills,
        logprobs=params.logprobs or show_probs or is_page,
        top_logprobs=params.top_logprobs or PAGE_ALTERNATIVES * is_page,
    )
    events = llm.run(tokens, run_params, add_prefix_space=not fills)
    if not is_first_rank():
        for _ in events:
            pass
        return

    def predict(index: int, events: list[TokenEvent]) -> CompletionPrediction | InfillingPrediction:
        result = fold_prompt(events, llm.tokenizer, params.logprobs or not json)
        if not params.top_logprobs:
            result.pop("top_logprobs", None)
        if not fills:
            return result
        full_text = result["generation"].join(split_at_gap(prompts[index // params.n]))
        return InfillingPrediction(**result, full_text=full_text)

    printer = ResultPrinter(prompts, predict, json, params.n, *shown(params, show_probs))
    by_result: defaultdict[int, list[TokenEvent]] = defaultdict(list)  # all of them, for a page
    lengths: Counter[int] = Counter()
    with before_end(printer.finish):
        try:
            for event in events:
                printer.add(event)
                lengths[event.index] += event.token is not None
                if is_page:
                    by_result[event.index].append(event)
        finally:
            printer.finish()
    if html is not None:
        names = TokenNames(llm.tokenizer)
        results = [
            (shown_tokens(of_one, llm.tokenizer, names, not fills), of_one[-1].finish_reason)
            for _, of_one in sorted(by_result.items())
        ]
        write_whole(html, token_page(Path(options.ckpt_dir).name, settings(params, options.seed), prompts, results))
        log.info("wrote %s", html)
    report(llm, longest(tokens, lengths, run_params))


def encode(prompts: Sequence[str], tokenizer: Tokenizer, args: ModelArgs) -> list[list[int]]:
    """Return the tokens of each prompt; ValueError names the first that does not fit."""
    if has_gaps(prompts, tokenizer):
        encoded = [infilling_prompt_tokens(tokenizer, *split_at_gap(text)) for text in prompts]
    else:
        encoded = encode_texts(tokenizer, prompts)
    return [prompt_ids(ids, f"prompt {i} of {len(encoded)}", args) for i, ids in enumerate(encoded, start=1)]


def has_gaps(prompts: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether gaps are to be filled, not texts to be continued."""
    return can_infill(tokenizer) and any(FILL_MARK in text for text in prompts)


def shown(params: SamplingParams, show_probs: bool) -> tuple[Paint, Table]:
    """Return what shows tokens and their scores to people, and say what colours mean, or why there are none."""
    depth, why_none = colour_depth(sys.stdout) if show_probs else (None, "")
    if depth is not None:
        log.info("%s", Colours(colour_depth(sys.stderr)[0]).legend())
    elif show_probs:
        log.info("--show_probs prints tables, as stdout has no colours: %s", why_none)
    logprobs, probabilities = params.logprobs or params.top_logprobs > 0, show_probs and depth is None
    table = partial(score_table, logprobs=logprobs, probabilities=probabilities)
    return Colours(depth).of, table if logprobs or probabilities else no_table


def settings(params: SamplingParams, seed: int) -> dict[str, object]:
    """Return what texts were sampled with: the main settings, and those that are not the default."""
    default = SamplingParams()
    main = {"temperature": params.temperature, "top_p": params.top_p, "max_gen_len": params.max_gen_len, "seed": seed}
    other = {each.name: getattr(params, each.name) for each in dataclasses.fields(params) if each.name not in main}
    return main | {name: value for name, value in other.items() if value != getattr(default, name)}


def longest(prompts: Sequence[Sequence[int]], lengths: Mapping[int, int], params: SamplingParams) -> tuple[int, int]:
    """Return how many tokens prompt and completion of the longest text have; lengths: of each result's events."""
    sizes = ((len(prompts[i // params.n]), n) for i, n in lengths.items())
    return max(((prompt, n - prompt * params.echo) for prompt, n in sizes), key=sum, default=(0, 0))
