"""How long a model's context is: what its files say or, where they do not, what is usual of its kind."""

from __future__ import annotations

import torch

from llama.checkpoint.base import Checkpoint
from llama.checks import MAX_INT
from llama.config import ModelArgs
from llama.rope import scaled_frequencies
from llama.rope_scaling import FactorScaling, Llama3Scaling, RopeScaling


def trained_context_len(checkpoint: Checkpoint) -> int:
    """Return how many tokens of context a model was trained for; a number beyond any model's counts as none."""
    said = checkpoint.context_len
    return said if said is not None and said <= MAX_INT else usual_context_len(checkpoint.args)


def usual_context_len(args: ModelArgs) -> int:
    """Return the context that models of this kind were trained for, where a format does not say it, as Meta's."""
    scaling = recognised(args)
    if isinstance(scaling, Llama3Scaling):
        return 131072
    if args.sliding_window is not None:
        return 32768
    return {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 2048 if args.norm_eps == 1e-6 else 4096)


def recognised(args: ModelArgs) -> RopeScaling | None:
    """Return the RoPE scaling, with GGUF's factors for each pair as Llama 3.1's rule where they came from it."""
    if not isinstance(args.rope_scaling, FactorScaling):
        return args.rope_scaling
    found = scaled_frequencies(args.head_dim, args.rope_theta, args.rope_scaling)
    scaling = Llama3Scaling(factor=float(max(args.rope_scaling.factors)))  # that of the longest wavelengths
    # GGUF has the factors in fp32.
    if torch.allclose(found, scaled_frequencies(args.head_dim, args.rope_theta, scaling), rtol=1e-6, atol=0):
        return scaling
    return args.rope_scaling
