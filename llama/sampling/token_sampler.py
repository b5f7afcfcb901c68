"""What a backend does from logits to tokens, and the way that every device can."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llama.sampling.filters import FilterTensors
from llama.sampling.sampler import SamplingTensors, sample


class TokenSampler(Protocol):
    """Draws tokens from logits; a backend may have one of its own."""

    def __call__(self, logits: Tensor, uniform: Tensor, rows: SamplingTensors) -> Tensor:
        """Draw one token for each row, (bsz,); see `sample`."""
        ...

    def filter(
        self, logits: Tensor, filters: FilterTensors, temperature: Tensor, xtc_uniform: Tensor | None = None
    ) -> Tensor:
        """Leave tokens out before one is drawn: return logits, (bsz, vocab_size); see `FilterTensors.apply`."""
        ...


class TorchSampler:
    """Draws tokens with torch's operations, on any device."""

    def __call__(self, logits: Tensor, uniform: Tensor, rows: SamplingTensors) -> Tensor:
        return sample(logits, uniform, rows)

    def filter(
        self, logits: Tensor, filters: FilterTensors, temperature: Tensor, xtc_uniform: Tensor | None = None
    ) -> Tensor:
        """See `TokenSampler`."""
        return filters.apply(logits, temperature, xtc_uniform)
