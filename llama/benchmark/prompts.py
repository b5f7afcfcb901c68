"""Prompts of exact lengths: random tokens, or a text and the beginning of its repetition."""

from __future__ import annotations

import torch

from llama.tokenizer import Tokenizer

# Tags, and the passage twice: small models copy what they have already seen copied.
BEFORE, BETWEEN = "<text>\n", "\n</text>\n\n<text>\n"
COPIES = 2
BEGUN = 16  # tokens of the repetition that the prompt holds: what is left to do is to go on


def random_prompts(lengths: list[int], vocab_size: int, generator: torch.Generator) -> list[list[int]]:
    """Return a prompt of each length, of any tokens."""
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def copy_prompts(
    content: str, lengths: list[int], gen_len: int, tokenizer: Tokenizer, generator: torch.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts that a model continues by copying, and the gen_len tokens of each copy.

    Each is from another place in the content. Raise ValueError where a prompt is too short to hold what is to be
    copied, or longer than the text.
    """
    text = tokenizer.encode(content, bos=False, eos=False)
    before = tokenizer.encode(BEFORE, bos=tokenizer.add_bos, eos=False)
    between = tokenizer.encode(BETWEEN, bos=False, eos=False)
    around = len(before) + COPIES * len(between) + BEGUN
    prompts, copies = [], []
    for length in lengths:
        n = (length - around) // COPIES
        if not BEGUN + gen_len <= n <= len(text):
            least, most = around + COPIES * (BEGUN + gen_len), around + COPIES * len(text)
            raise ValueError(f"--copy of {gen_len} tokens takes prompts of {least} to {most} tokens, got {length}")
        start = int(torch.randint(len(text) - n + 1, (), generator=generator))
        passage = text[start : start + n]
        begun = passage[: BEGUN + (length - around) % COPIES]
        prompts.append(before + COPIES * (passage + between) + begun)
        copies.append(passage[len(begun) : len(begun) + gen_len])
    return prompts, copies
