"""Complete prompts: `python example_text_completion.py`, or on N ranks `torchrun --nproc_per_node N ...`."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path

from llama import Llama
from llama.chat.infilling import FILL_MARK, can_infill
from llama.cli import flags as cli
from llama.engine.build import plan_run
from llama.outputs import CompletionPrediction, InfillingPrediction
from llama.sampling import SamplingParams

PROMPTS = [
    "The capital of France is",
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "def fibonacci(n):\n",
]


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prompt: list[str] | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 32,
    max_gen_len: int | None = 64,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    speculate: str | None = None,
    draft_ckpt_dir: str | None = None,
    draft_quantize: str | None = None,
    logprobs: bool = False,
    echo: bool = False,
    json: bool = False,
    model_parallel_size: int | None = None,
    dry_run: bool = False,
) -> None:
    """Complete prompts with a LLaMA model.

    Args:
        ckpt_dir: Meta or Hugging Face folder, or .gguf file; default: the demo model.
        tokenizer_path: tokenizer.model or tokenizer.json; default: the one beside or inside the weights.
        prompt: text to complete, verbatim; repeat the flag or give a JSON list for several; Code Llama fills <FILL>.
        max_seq_len: most tokens of a prompt and its completion together.
        max_batch_size: most prompts to run at once; more are run in turn.
        max_gen_len: most tokens to generate for a prompt; None is as many as max_seq_len leaves room for.
        temperature: 0 is greedy; higher is more varied.
        top_p: probability mass of the nucleus that tokens are drawn from, in (0, 1].
        seed: the same seed gives the same completions.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        quantize: int8, int4 or, on GPUs, fp8: 8.5, 5 or 8 bits a value; blocks that are no larger stay as they are.
        compile: let torch compile the decode step, which takes a minute once; CPU kernels need no compiling.
        speculate: lookup guesses tokens from what the text said before; texts stay the same, some come faster.
        draft_ckpt_dir: a smaller model of the same vocabulary, which guesses tokens instead.
        draft_quantize: int8, int4 or fp8: hold the draft model so; then it may be the model itself.
        logprobs: also give the log-probability of every token.
        echo: repeat the prompt in the completion.
        json: print one JSON object a line.
        model_parallel_size: ranks that share one copy of the model; default: all.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if it does not fit.
    """
    SamplingParams(temperature, top_p, max_gen_len)  # what is wrong ends here, before gigabytes are read
    prompts = PROMPTS if prompt is None else prompt
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    weights = ckpt_dir if ckpt_dir is not None else cli.demo_model(Path(__file__).parent)
    build = (weights, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size)
    if dry_run:
        plan = plan_run(
            *build,
            device=device,
            dtype=dtype,
            quantize=quantize,
            prompts=prompts,
            max_gen_len=max_gen_len,
            scored=echo and logprobs,
        )
        cli.end_with(plan)
    llm = Llama.build(
        *build,
        seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        speculate=speculate,
        draft_ckpt_dir=draft_ckpt_dir,
        draft_quantize=draft_quantize,
    )
    if can_infill(llm.tokenizer) and any(FILL_MARK in text for text in prompts):
        results = infill(llm, prompts, temperature, top_p, max_gen_len, logprobs)
    else:
        results = llm.text_completion(prompts, temperature, top_p, max_gen_len, logprobs, echo)
    if not cli.is_first_rank():
        return
    for text, result in zip(prompts, results, strict=True):
        if json:
            print(json_format.dumps({"prompt": text, **result}, ensure_ascii=False))
            continue
        print(f"{text}\n> {result['generation']}")
        if logprobs:
            for token, logprob in zip(result["tokens"], result["logprobs"], strict=True):
                print(f"{logprob:10.4f}  {token!r}")
        print("\n==================================\n", flush=True)
    cli.report(llm)


def infill(
    llm: Llama, prompts: list[str], temperature: float, top_p: float, max_gen_len: int | None, logprobs: bool
) -> Sequence[CompletionPrediction | InfillingPrediction]:
    """Fill the <FILL> mark of each prompt. ValueError unless every prompt has exactly one."""
    for text in prompts:
        if text.count(FILL_MARK) != 1:
            raise ValueError(f"prompt {text!r} has {text.count(FILL_MARK)} marks {FILL_MARK}: each needs exactly one")
    prefixes, suffixes = zip(*(text.split(FILL_MARK) for text in prompts), strict=True)
    return llm.text_infilling(prefixes, suffixes, temperature, top_p, max_gen_len, logprobs)


if __name__ == "__main__":
    cli.run(main)
