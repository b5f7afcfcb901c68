"""The memory of a batch on each rank beside the weights: its cache, and the peak of its activations.

All figures are bytes of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama.backends.base import Backend
from llama.cache import PAGE_SIZE, pages_for
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.rope import LayerRotations

# Positions whose logits are in memory at once while a prompt is scored: 128 MiB for a vocabulary of 128k.
MAX_SCORED_POSITIONS = 256

# Most positions of one speculative step, of all sequences together: see D25.
MAX_SPECULATIVE_POSITIONS = 16

# The constants below, and the sums in `activation_bytes`, were measured with torch's memory profiler on a CPU.
SAMPLED_LOGIT_BYTES = 29  # per logit while a token is sampled: its fp32 value, and 6.25 times that for a full sort
SCORED_LOGIT_BYTES = 8  # per logit while a prompt is scored
HEAP = 100_000_000  # fragmentation of glibc's heap by large tensors (measured: 22 to 180 MB)


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a run: bsz prompts of up to prompt_len tokens, up to `length` with their completions."""

    bsz: int
    prompt_len: int
    length: int
    scored: bool = False  # log-probabilities of prompts are asked for
    speculative: bool = False  # a step samples more than one token a sequence


def cache_bytes(args: ModelArgs, parallel: ModelParallel, dtype: torch.dtype, shape: BatchShape) -> int:
    """Return the bytes of the pages that a batch's keys and values fill on this rank."""
    n_local_kv_heads = len(parallel.kv_heads(args.n_heads, args.n_kv_heads))
    slots = shape.bsz * pages_for(shape.length) * PAGE_SIZE
    return 2 * args.n_layers * slots * n_local_kv_heads * args.head_dim * dtype.itemsize


def _widest(args: ModelArgs) -> int:
    """Return the most hidden features of a token that are in memory at once: an expert may have all tokens."""
    experts = args.experts
    if experts is None:
        return args.hidden_dim
    dense = args.hidden_dim if experts.dense_layers else 0
    return max(dense, experts.hidden_dim, experts.shared_hidden_dim or 0)


def activation_bytes(
    args: ModelArgs,
    parallel: ModelParallel,
    dtype: torch.dtype,
    backend: Backend,
    shape: BatchShape,
) -> int:
    """Estimate the peak bytes of a step, of its forward pass and its sampling, beside weights and cache.

    The peak is in a step with as many tokens of prompts as one computes, and a new token of each other row. Counted per
    token are a layer's input, the residual after attention, the normalised residual, and what is computed from them.
    Prompts may begin in pages of other texts: then they have a mask, and their pages do not follow each other, so that
    a layer's keys and values are copied. Our kernels need neither; Triton's copy what they leave to torch.
    """
    device, kernels = backend.device, backend.own_kernels
    half, size = dtype != torch.float32, dtype.itemsize
    x = args.dim * size
    q = parallel.heads(args.n_heads) * args.head_dim
    kv = len(parallel.kv_heads(args.n_heads, args.n_kv_heads)) * args.head_dim
    hidden = parallel.part(_widest(args), parallel.ffn_multiple) * size
    # Of experts what each makes of a token, in fp32, and an expert's tokens.
    routed = 0 if args.experts is None else 4 * args.dim * args.experts.n_active + x
    # One of several rows may be set back, and be computed again with all that it has generated.
    longest = shape.length if shape.bsz > 1 else shape.prompt_len
    n_tokens = min(shape.bsz * longest, backend.max_prefill_tokens + shape.bsz - 1)
    inputs = 4 * args.head_dim * LayerRotations(args).count + 32  # rotations, positions, slots, ids
    once = 0
    if kernels and device.type == "cuda":
        inputs += 4 * args.head_dim
        layer = 4 * args.dim + 2 * x + max((3 * q + 4 * kv) * size, 3 * hidden + routed)
        once = backend.dequantized_values * size
    elif kernels:  # one residual, in fp32, and no memory beside the results of norms, rotations and attention
        largest = max((q + 2 * kv) * size, hidden * (1 + args.is_gated) + routed, x + hidden + routed)
        layer = 4 * args.dim + 2 * x + largest
    else:
        inputs += longest * len(args.sights)  # the masks
        n_keys = shape.bsz * shape.length
        keys = 2 * n_keys * kv * size
        if device.type == "cuda" and args.n_heads != args.n_kv_heads:  # see `attend`
            keys += 2 * n_keys * q * size
        if half and device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            # For a matrix unit keys and values are packed: without a mask for all query heads.
            keys += 2 * max(n_keys * kv, n_tokens * q) * size
        scores = longest * size + keys // n_tokens  # torch converts the mask
        of_norm = (12 if half else 8) * (device.type != "cuda")  # fp32 copies; CUDA's kernel has none
        norm_q = (8 if args.qk_norm == "all heads" else of_norm) * (args.qk_norm is not None)
        rotate_k = (q + 3 * kv) * size + 8 * kv * half
        rotate_q = 2 * q * size + 8 * q * half
        attend = max(3 * q * size, 2 * q * size + scores)
        norms = (q + 2 * kv) * size + norm_q * q
        norm = 2 * x + of_norm * args.dim * (not args.layer_norms)  # whose kernel has no copies
        features = (2 if args.activation == "relu2" else 3) * hidden
        features += (hidden + hidden // size) * (args.activation == "xielu")  # two sides, and which it is
        inside = 2 * x - x * args.output_norms  # the layer's input, and what it is normalised to
        layer = max(norm, inside + max(rotate_k, rotate_q, attend, norms, x + features + routed))
    prefill = n_tokens * (inputs + layer) + once
    sampled = max(shape.bsz, MAX_SPECULATIVE_POSITIONS * shape.speculative) * SAMPLED_LOGIT_BYTES
    scored = min(shape.prompt_len, MAX_SCORED_POSITIONS) * SCORED_LOGIT_BYTES * shape.scored
    peak = max(prefill, n_tokens * x + args.vocab_size * max(sampled, scored))
    heap = HEAP // 2 if kernels else HEAP  # measured with kernels: 40 MB
    return peak + min(2 * peak, heap) if device.type == "cpu" else peak
