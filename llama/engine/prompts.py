"""Checks the prompts that callers give, and encodes texts, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from llama.config import ModelArgs
from llama.tokenizer import Tokenizer


def check_prompts(prompts: Sequence[Sequence[int]], args: ModelArgs, max_gen_len: int | None) -> None:
    """Raise ValueError unless prompts are lists of token ids, at least one, and each leaves room for its completion."""
    if not prompts:
        raise ValueError("the list of prompts is empty: give at least one")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str | int):
            raise ValueError(f"prompt {index} must be a list of token ids, got {prompt!r}")
        if not prompt:
            raise ValueError(f"prompt {index} has no tokens: begin it with the tokenizer's bos_id")
        for token in prompt:
            if type(token) is not int or not 0 <= token < args.vocab_size:
                raise ValueError(f"prompt {index} has token {token!r}: ids are 0 to {args.vocab_size - 1}")
        room = args.max_seq_len - (max_gen_len != 0)
        if len(prompt) > room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, max_seq_len is {args.max_seq_len}: raise it or shorten "
                "the prompt"
            )


def encode_texts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Encode texts to continue, an empty one as the begin token; raise ValueError unless they are texts."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of texts, got a single text: put it in a list")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {index} must be a text, got {prompt!r}")
    return [
        tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) or tokenizer.encode("", bos=True, eos=False)
        for prompt in prompts
    ]
