"""One request while it is completed: its tokens, their limit, its random numbers, its pages and its decoder."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llama.engine.controls import TokenControls
from llama.engine.page_pool import ROOT
from llama.outputs import TokenEvent
from llama.sampling import XTC_STREAM, SamplingParams, uniforms
from llama.tokenizer import CompletionText


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens generated for it so far."""

    id: int  # of the request; a later one has a greater id
    prompt: abc.Sequence[int]
    params: SamplingParams
    max_new_tokens: int
    stop_tokens: frozenset[int]
    seeds: tuple[int, int, int]  # what decides its random numbers: seed, place in the input, number among n samples
    text: CompletionText
    events: list[TokenEvent]  # where its events go
    interactive: bool  # whether somebody reads along
    controls: TokenControls | None = None

    index: int = field(init=False)  # of its events
    tokens: list[int] = field(init=False)  # prompt and completion; the newest is cached by the next step
    max_len: int = field(init=False)
    n_cached: int = 0  # tokens whose keys and values are in the pages
    pages: list[int] = field(default_factory=list)
    n_claimed: int = 0  # pages from the first on that it was given a claim on
    n_named: int = 0  # full pages that others can find
    name: int = ROOT  # of the last of them
    drafted: list[int] = field(default_factory=list)  # tokens whose keys a draft model has in its pages
    is_contiguous: bool = True  # whether the pages follow each other
    table: Tensor = field(init=False)  # int32, on the CPU: the pages, and zeros
    scores: list[float] = field(default_factory=lambda: [0.0])  # of the prompt's tokens, where they are scored
    in_prompt: bool = True  # whether the first token is still to be sampled
    finished: bool = False

    def __post_init__(self) -> None:
        self.index = self.id
        self.tokens = list(self.prompt)
        self.max_len = len(self.tokens) + self.max_new_tokens

    @property
    def least_len(self) -> int:
        """How many tokens it must have room for: all that are asked for or, if it takes what there is, one more."""
        return self.max_len if self.params.max_gen_len is not None else min(self.max_len, len(self.tokens) + 1)

    def shorten(self, max_len: int) -> None:
        """Have it end at max_len tokens, least_len or more, if it takes what room there is."""
        if self.params.max_gen_len is None:
            self.max_len = min(self.max_len, max_len)
            self.max_new_tokens = self.max_len - len(self.prompt)

    @cached_property
    def uniforms(self) -> Tensor:
        """The random number of each new token: (max_new_tokens,), fp32, on the CPU."""
        seed, place, sample = self.seeds
        return uniforms(seed, place, self.max_new_tokens, sample=sample)

    @cached_property
    def xtc_uniforms(self) -> Tensor:
        """The random number that decides whether XTC acts, of each new token: (max_new_tokens,), fp32."""
        seed, place, sample = self.seeds
        return uniforms(seed, place, self.max_new_tokens, sample, XTC_STREAM)

    @property
    def is_reading(self) -> bool:
        """Whether tokens before the newest are still to be computed: of its prompt, or again after it was set back."""
        return self.in_prompt or len(self.tokens) - self.n_cached > 1

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of the prompt are asked for, so that all of it has to be computed."""
        return self.params.echo and self.params.logprobs

    def take_back(self, length: int) -> None:
        """Go on from the first `length` tokens, as if those after them had never come, be it finished or not."""
        del self.tokens[length:]
        self.finished, self.in_prompt = False, len(self.tokens) == len(self.prompt)
        is_echoed = self.params.echo and not self.in_prompt
        self.text.restart(self.prompt if is_echoed else (), self.tokens[len(self.prompt) :])

    def no_next_token(self) -> str:
        """Say why there is no token that could be sampled."""
        if self.controls is not None:
            why = self.controls.error or "penalties, biases and its constraint leave none, or its logits are NaN"
            return f"no token can come after {len(self.tokens)} tokens: {why}"
        return (
            f"the logits are NaN or infinite after {len(self.tokens)} tokens: the weights are damaged, or too large "
            "for this dtype (try --dtype float32)"
        )

    @property
    def first_page(self) -> int | None:
        """The first page, if the pages follow each other."""
        return self.pages[0] if self.is_contiguous else None

    def begin(self, most_pages: int) -> None:
        """Begin without pages, of which there will be at most `most_pages`; page 0 stands for those to come."""
        self.pages, self.table = [], torch.zeros(most_pages, dtype=torch.int32, device="cpu")
        self.n_cached = self.n_named = self.n_claimed = 0
        self.drafted = []
        self.name, self.is_contiguous, self.scores = ROOT, True, [0.0]

    def add_page(self, page: int) -> None:
        self.is_contiguous = self.is_contiguous and (not self.pages or page == self.pages[-1] + 1)
        self.table[len(self.pages)] = page
        self.pages.append(page)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence, one after another, that a step computes, and how many of the last it samples after.

    A sequence that generates has a chunk of its newest token, and with speculation of draft tokens after it.
    """

    sequence: Sequence
    start: int  # position of the first
    tokens: abc.Sequence[int]
    n_sampled: int
    n_drafts: int = 0

    @property
    def stop(self) -> int:
        """The position after the last token that is sure to stay."""
        return self.start + len(self.tokens) - self.n_drafts

    @property
    def is_of_prompt(self) -> bool:
        """Whether it is part of a prompt, or of a text that is computed again."""
        return self.sequence.in_prompt or not self.n_sampled or len(self.tokens) - self.n_drafts > 1

    def with_drafts(self, drafts: abc.Sequence[int]) -> Chunk:
        """Return the chunk of a sequence that generates with draft tokens after its newest."""
        tokens = [*self.tokens, *drafts]
        return replace(self, tokens=tokens, n_sampled=len(tokens), n_drafts=len(drafts))
