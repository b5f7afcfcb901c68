"""From logits to tokens: what a request asks for, and pure functions whose randomness is an argument."""

from __future__ import annotations

from llama.sampling.filters import FilterTensors
from llama.sampling.history import SparseAdjustments, TokenAdjustments, TokenHistory
from llama.sampling.params import MAX_TEMPERATURE, MAX_TOP_LOGPROBS, SamplingParams
from llama.sampling.sampler import (
    INVALID,
    TOP_K_PREFIX,
    XTC_STREAM,
    SamplingTensors,
    draw,
    log_probs,
    nucleus,
    probabilities,
    sample,
    sample_top_p,
    top_log_probs,
    uniforms,
)
from llama.sampling.token_sampler import TokenSampler, TorchSampler

__all__ = [
    "INVALID", "MAX_TEMPERATURE", "MAX_TOP_LOGPROBS", "TOP_K_PREFIX", "XTC_STREAM", "FilterTensors", "SamplingParams",
    "SamplingTensors", "SparseAdjustments", "TokenAdjustments", "TokenHistory", "TokenSampler", "TorchSampler", "draw",
    "log_probs", "nucleus", "probabilities", "sample", "sample_top_p", "top_log_probs", "uniforms",
]  # fmt: skip
