"""Fill gaps in a few texts, as Code Llama's example of this name: `python example_infilling.py --ckpt_dir ...`."""

from __future__ import annotations

from typing import Annotated

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama import Llama
from llama.chat.infilling import FILL_MARK, split_at_gap
from llama.cli.options import build_flags, sampling_flags
from llama.cli.report import report
from llama.cli.runner import is_first_rank, run
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams

PROMPTS = [
    f'def median(values: list[float]) -> float:\n    """{FILL_MARK}"""\n    ordered = sorted(values)\n'
    "    middle = len(ordered) // 2\n    return (ordered[middle] + ordered[~middle]) / 2\n",
    f"# Count how often each word is in a text.\nfrom collections import Counter\n\n{FILL_MARK}\n\n"
    'print(count_words("a rose is a rose")["rose"])\n',
    f"int clamp(int value, int low, int high) {{\n    {FILL_MARK}\n}}\n",
]
WORDS = ("ckpt_dir", "tokenizer_path")


def main(
    options: Annotated[BuildOptions, build_flags("chat_format", words=WORDS, max_seq_len=192, max_batch_size=4)],
    params: Annotated[SamplingParams, sampling_flags("logprobs", "echo", temperature=0.0, max_gen_len=128)],
) -> None:
    """Fill the gaps of a few texts with a Code Llama that was trained to do it: 7B or 13B, not Python."""
    llm = Llama.from_options(options)
    prefixes, suffixes = zip(*(split_at_gap(prompt) for prompt in PROMPTS), strict=True)
    results = llm.text_infilling(prefixes, suffixes, params.temperature, params.top_p, params.max_gen_len)
    if not is_first_rank():
        return
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(f"\n================= Prompt text =================\n\n{prompt}")
        print(f"\n================= Filled text =================\n\n{result['full_text']}", flush=True)
    report(llm)


if __name__ == "__main__":
    run(main)
