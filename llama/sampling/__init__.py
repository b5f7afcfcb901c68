"""From logits to tokens: what a request asks for, and pure functions whose randomness is an argument."""

from __future__ import annotations

from llama.sampling.params import MAX_TEMPERATURE, MAX_TOP_LOGPROBS, SamplingParams
from llama.sampling.sampler import (
    INVALID,
    TOP_K_PREFIX,
    SamplingTensors,
    TokenSampler,
    TorchSampler,
    draw,
    log_probs,
    nucleus,
    probabilities,
    sample,
    sample_top_p,
    top_log_probs,
    uniforms,
)

__all__ = [
    "INVALID", "MAX_TEMPERATURE", "MAX_TOP_LOGPROBS", "TOP_K_PREFIX", "SamplingParams", "SamplingTensors",
    "TokenSampler", "TorchSampler", "draw", "log_probs", "nucleus", "probabilities", "sample", "sample_top_p",
    "top_log_probs", "uniforms",
]  # fmt: skip
