"""One prompt on its way to a text: what it holds, what it may still get, and how it draws."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from torch import Tensor

from llama.sampling import SamplingParams, uniforms
from llama.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Sequence:
    """A prompt and the tokens generated for it so far. `index` is the prompt's place in the caller's input."""

    index: int
    prompt: abc.Sequence[int]
    max_new_tokens: int
    uniforms: Tensor  # (max_new_tokens,), fp32: the random number of each new token
    decoder: StreamDecoder
    tokens: list[int] = field(init=False)  # all; the newest is not in the cache: the model reads it next

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.max_len = len(self.tokens) + self.max_new_tokens


def make_sequences(
    prompts: abc.Sequence[abc.Sequence[int]],
    params: SamplingParams,
    max_seq_len: int,
    seed: int,
    first: int,
    tokenizer: Tokenizer,
    add_prefix_space: bool,
) -> list[Sequence]:
    """Make a sequence of each prompt; its random numbers follow from the seed and its index counted from `first` on.

    add_prefix_space: the new tokens begin a text; see `StreamDecoder`.
    """
    sequences = []
    for index, prompt in enumerate(prompts):
        limit = max_seq_len - len(prompt)
        if params.max_gen_len is not None:
            limit = min(limit, params.max_gen_len)
        decoder = tokenizer.stream_decoder(add_prefix_space)
        sequences.append(Sequence(index, prompt, limit, uniforms(seed, first + index, limit), decoder))
    return sequences
