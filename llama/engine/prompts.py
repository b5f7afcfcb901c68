"""Prompts as token ids: what callers give is checked here, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from llama.config import ModelArgs
from llama.tokenizer import Tokenizer


def check_prompts(prompts: Sequence[Sequence[int]], args: ModelArgs, max_gen_len: int | None) -> None:
    """ValueError unless there are prompts of token ids, and each leaves room for what is to follow."""
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    for place, prompt in enumerate(prompts):
        if isinstance(prompt, str | int):
            raise ValueError(f"prompt {place} must be a list of token ids, got {prompt!r}")
        if not prompt:
            raise ValueError(f"prompt {place} has no tokens: begin it with the tokenizer's bos_id")
        for token in prompt:
            if type(token) is not int or not 0 <= token < args.vocab_size:
                raise ValueError(f"prompt {place} has token {token!r}: ids are 0 to {args.vocab_size - 1}")
        room = args.max_seq_len - (max_gen_len != 0)
        if len(prompt) > room:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens, max_seq_len is {args.max_seq_len}: raise it or shorten "
                "the prompt"
            )


def encode_texts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts to continue; ValueError unless they are texts."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts, got a single text: put it in a list")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {place} must be a text, got {prompt!r}")
    return [
        tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) or tokenizer.encode("", bos=True, eos=False)
        for prompt in prompts
    ]
