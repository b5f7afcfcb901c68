"""`llama plan`: the memory that a run would need on each rank, told before any weight is read."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from llama.cli.options import GENERATION, build_flags, sampling_flags
from llama.cli.prompts import read_prompts
from llama.cli.runner import is_first_rank
from llama.distributed.job import agree
from llama.engine.build import plan_run
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams

COUNTED = ("max_gen_len", "logprobs", "echo", "n", "best_of")
# What needs no memory to speak of.
UNCOUNTED = [each.name for each in dataclasses.fields(SamplingParams) if each.name not in COUNTED]


def main(
    options: Annotated[BuildOptions, build_flags(*GENERATION, "compile")],
    params: Annotated[SamplingParams, sampling_flags(*UNCOUNTED, max_gen_len=64)],
    *,
    prompt: list[str] | None = None,
    prompt_file: Path | None = None,
) -> None:
    """Print a table of the memory that each rank needs and has; exit code 1 when not even one request fits.

    The plan is for the most that --max_seq_len and --max_batch_size allow and, where prompts are given, for these. It
    says how many requests fit at once; others wait for them. Without --max_seq_len it says which context it assumes.
    One process plans for any number of ranks, which --model_parallel_size says. A model that is given by name is
    downloaded for it.

    Args:
        prompt: text to complete, or - for stdin; repeat the flag or give a JSON list for several.
        prompt_file: a file with a prompt a line, or a JSON list of them; - is stdin.

    Examples:
        llama plan --ckpt_dir Llama-3.1-70B --model_parallel_size 8
        llama plan --ckpt_dir Llama-3.2-1B --quantize int8 --max_seq_len 131072 --max_batch_size 1
    """
    end_with_plan(options, read_prompts(prompt, prompt_file, options.timeout, needed=False) or (), params)


def end_with_plan(
    options: BuildOptions, prompts: Sequence[str] = (), params: SamplingParams | None = None
) -> typing.NoReturn:
    """Print the plan of a run and exit, with code 1 when not even one request fits."""
    params = params or SamplingParams()
    prompts = [prompt for prompt in prompts for _ in range(params.samples)]
    table, fits = plan_run(options, prompts, params.max_gen_len, params.echo and params.logprobs)
    with agree():  # all ranks wait: torchrun ends them when the first exits with 1
        if is_first_rank():
            print(table, flush=True)
    sys.exit(0 if fits else 1)
