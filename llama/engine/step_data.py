"""What a step's sampling is told, and what it gives: on the device, and as lists on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.outputs import TopTokens
from llama.sampling import FilterTensors, SamplingParams, SamplingTensors


@dataclass(frozen=True)
class Scores:
    """What a step tells of its tokens' probabilities; a graph is captured for each."""

    logprobs: bool = False
    top: int = 0  # how many of the likeliest tokens

    @staticmethod
    def of(params: Sequence[SamplingParams]) -> Scores:
        """Return what all of the rows need together."""
        return Scores(any(each.needs_logprobs for each in params), max(each.top_logprobs for each in params))


@dataclass(frozen=True)
class StepParams:
    """Sampling parameters of the rows that a step samples, on its device, and what else they ask for."""

    tensors: SamplingTensors
    filters: FilterTensors | None
    scores: Scores
    has_xtc: bool  # whether a row needs a random number for XTC

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device) -> StepParams:
        """Take the parameters of each row to a device."""
        filters = FilterTensors.of(params, device)
        has_xtc = filters is not None and "xtc" in filters.kinds
        return StepParams(SamplingTensors.of(params, device), filters, Scores.of(params), has_xtc)


class SampledTokens(NamedTuple):
    """Tensors that a sampler returns for n final states; those that are not asked for are None.

    tokens: (n + 1,), of which the last is what the first rank announces; logprobs: (n,); top_tokens, top_logprobs:
    (n, k), likeliest first.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> SampledTokens:
        """Return what a function makes of each tensor."""
        rest = [None if each is None else function(each) for each in self[1:]]
        return SampledTokens(function(self.tokens), *rest)


@dataclass(frozen=True)
class StepOutput:
    """The tokens that a step sampled: a list for each chunk."""

    tokens: list[list[int]]  # INVALID where logits are NaN or infinite
    logprobs: list[list[float]] | None = None  # where a chunk's sampling parameters ask for them
    announced: int | None = None  # what the first rank launched the step with; None if nothing was sampled
    top_logprobs: list[list[TopTokens]] | None = None  # as many as any chunk's sampling parameters ask for

    def cut(self, lengths: Sequence[int]) -> StepOutput:
        """Return the first tokens of each chunk, with their scores."""

        def first(values: list[list[Any]]) -> list[list[Any]]:
            return [each[:n] for each, n in zip(values, lengths, strict=True)]

        return StepOutput(
            first(self.tokens),
            first(self.logprobs) if self.logprobs else None,
            self.announced,
            first(self.top_logprobs) if self.top_logprobs else None,
        )
