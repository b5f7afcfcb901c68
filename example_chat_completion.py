"""Answer a few dialogs, as Meta's example of this name does: `python example_chat_completion.py --ckpt_dir ...`."""

from __future__ import annotations

from typing import Annotated

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama import Dialog, Llama
from llama.cli.options import build_flags, sampling_flags
from llama.cli.report import report
from llama.cli.runner import is_first_rank, run
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "Which planet has the most moons?"}],
    [
        {"role": "user", "content": "I have rice, two eggs and an onion. What can I cook?"},
        {"role": "assistant", "content": "Fried rice: soften the onion, add the cooked rice, then stir in the eggs."},
        {"role": "user", "content": "And if the rice is not cooked yet?"},
    ],
    [
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Why is the sky dark at night?"},
    ],
]
WORDS = ("ckpt_dir", "tokenizer_path")


def main(
    options: Annotated[BuildOptions, build_flags(words=WORDS, max_seq_len=512, max_batch_size=8)],
    params: Annotated[SamplingParams, sampling_flags("logprobs", "echo")],
) -> None:
    """Answer a few dialogs with a LLaMA model that was trained to chat."""
    llm = Llama.from_options(options)
    results = llm.chat_completion(DIALOGS, params.temperature, params.top_p, params.max_gen_len)
    if not is_first_rank():
        return
    for dialog, result in zip(DIALOGS, results, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print(f"> Assistant: {result['generation']['content']}")
        print("\n==================================\n", flush=True)
    report(llm)


if __name__ == "__main__":
    run(main)
