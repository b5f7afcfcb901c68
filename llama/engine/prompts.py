"""Checks the prompts that callers give, and encodes texts, before anything runs."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

from llama.chat.dialog import Dialog
from llama.chat.formats import DialogFormat
from llama.chat.tools import Tools
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer


def as_token_ids(prompts: Iterable[Iterable[SupportsIndex]], args: ModelArgs) -> list[list[int]]:
    """Return prompts as lists of ids, from lists or from arrays or tensors of integers.

    Raise ValueError unless there is at least one prompt, and each has tokens and fits into max_seq_len.
    """
    _check_list("prompts", prompts, "lists of token ids")
    found = [prompt_ids(prompt, f"prompt {index}", args) for index, prompt in enumerate(prompts)]
    if not found:
        raise ValueError("the list of prompts is empty: give at least one")
    return found


def prompt_ids(prompt: Iterable[SupportsIndex], name: str, args: ModelArgs) -> list[int]:
    """Return one prompt as `as_token_ids` does; name: what messages call it."""
    tokens = prompt if type(prompt) is list else prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise ValueError(f"{name} must be a list of token ids, got {prompt!r:.40}: put it in a list")
    found = [_token_id(token, name, args.vocab_size) for token in tokens]
    if not found:
        raise ValueError(f"{name} has no tokens: begin it with the tokenizer's bos_id")
    if len(found) > args.max_seq_len:
        raise ValueError(
            f"{name} has {len(found)} tokens, max_seq_len is {args.max_seq_len}: raise it or shorten the prompt"
        )
    return found


def check_token_ids(params: SamplingParams, args: ModelArgs) -> None:
    """Raise ValueError where sampling parameters name a token that the vocabulary lacks."""
    for name in ("logit_bias", "banned_tokens", "stop_token_ids"):
        for token in getattr(params, name) or ():
            _token_id(token, name, args.vocab_size)


def _token_id(token: SupportsIndex, name: str, vocab_size: int) -> int:
    """Return an id of the vocabulary as an int: one of numpy or torch is an integer, too, while True is none."""
    if type(token) is int and 0 <= token < vocab_size:
        return token
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)
    except (TypeError, ValueError):  # of torch, for a float and for a tensor with several elements
        number = -1
    if not 0 <= number < vocab_size:
        raise ValueError(f"{name} has token {token!r:.40}: ids are integers, 0 to {vocab_size - 1}")
    return number


def _check_list(name: str, values: object, of: str) -> None:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of {of}, got {values!r:.40}: put it in a list")


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise ValueError unless texts are a list of texts; name: what the caller calls them."""
    _check_list(name, texts, "texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a list of texts, number {index} is {text!r:.40}")


def encode_dialogs(
    chat_format: DialogFormat,
    parallel: ModelParallel,
    dialogs: Sequence[Dialog],
    tools: Tools | None = None,
    continue_final_message: bool = False,
) -> list[list[int]]:
    """Encode dialogs as `DialogFormat.encode` does; raise ValueError where one does not fit the format.

    The first of the ranks that share the model encodes for all: a template may look at the clock.
    """
    encoded: list[list[int]] | ValueError = []
    if parallel.rank == 0:
        try:
            encoded = [chat_format.encode(dialog, tools, continue_final_message) for dialog in dialogs]
        except ValueError as error:
            encoded = error
    encoded = parallel.share(encoded)
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded


def encode_texts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Encode texts to continue, an empty one as the begin token; raise ValueError unless they are texts."""
    check_texts("prompts", prompts)
    return [
        tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) or tokenizer.encode("", bos=True, eos=False)
        for prompt in prompts
    ]
