"""One prompt while it is completed: its tokens, their limit, its random numbers and its decoder."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from torch import Tensor

from llama.sampling import SamplingParams, uniforms
from llama.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Sequence:
    """A prompt and the tokens generated for it so far."""

    index: int  # of the prompt in the caller's input
    prompt: abc.Sequence[int]
    max_new_tokens: int
    uniforms: Tensor  # (max_new_tokens,), fp32: the random number of each new token
    decoder: StreamDecoder
    tokens: list[int] = field(init=False)  # prompt and completion; the newest is cached by the next step

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
) -> abc.Iterator[Sequence]:
    """Make a sequence of each prompt when it is asked for.

    Random numbers follow from the seed and the prompt's index plus `first`.

    add_prefix_space: the new tokens are a text of their own, whose prefix space is stripped; see `StreamDecoder`.
    """
    for index, prompt in enumerate(prompts):
        limit = max_seq_len - len(prompt)
        if params.max_gen_len is not None:
            limit = min(limit, params.max_gen_len)
        decoder = tokenizer.stream_decoder(add_prefix_space)
        yield Sequence(index, prompt, limit, uniforms(seed, first + index, limit), decoder)
