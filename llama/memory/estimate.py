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

# Positions whose logits are in memory at once while a prompt is scored: 128 MiB for a vocabulary of 128k.
MAX_SCORED_POSITIONS = 256

# Most positions of one speculative step, of all sequences together: see D25.
MAX_SPECULATIVE_POSITIONS = 16

# The constants below, and the sums in `activation_bytes`, were measured with torch's memory profiler on a CPU.
SAMPLED_LOGIT_BYTES = 29  # per logit while a token is sampled: its fp32 value, and 6.25 times that for a full sort
SCORED_LOGIT_BYTES = 8  # per logit while a prompt is scored
UNFUSED_SCORE_BYTES = 10  # per attention score where torch has no fused kernel
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


def activation_bytes(
    args: ModelArgs,
    parallel: ModelParallel,
    dtype: torch.dtype,
    backend: Backend,
    shape: BatchShape,
) -> int:
    """Estimate the peak bytes of the forward passes and the sampling of a batch, beside weights and cache.

    The peak is in a step that computes tokens of prompts, and is counted per token: a layer's input, the residual after
    attention, the normalised residual, and what is computed from them. Where a step goes on with a prompt, there is a
    mask, too. The package's kernels have one residual, in fp32, and need no memory beside the results of norms and
    rotations.
    """
    steps = prompt_steps(shape, backend.max_prefill_tokens, args.sliding_window)
    prefill = max(step_bytes(args, parallel, dtype, backend, shape.prompt_len, *step) for step in steps)
    device, kernels = backend.device, backend.own_kernels
    n_tokens, x = steps[0][0], args.dim * dtype.itemsize
    sampled = max(shape.bsz, MAX_SPECULATIVE_POSITIONS * shape.speculative) * SAMPLED_LOGIT_BYTES
    logits = args.vocab_size * max(
        sampled, min(shape.prompt_len, MAX_SCORED_POSITIONS) * SCORED_LOGIT_BYTES if shape.scored else 0
    )
    peak = max(prefill, n_tokens * x + logits)
    heap = HEAP // 2 if kernels else HEAP  # measured with kernels: 40 MB
    return peak + min(2 * peak, heap) if device.type == "cpu" else peak


def step_bytes(
    args: ModelArgs,
    parallel: ModelParallel,
    dtype: torch.dtype,
    backend: Backend,
    prompt_len: int,
    n_tokens: int,
    masked: int,
) -> int:
    """Estimate the peak bytes of a step that computes n_tokens of prompts, with `masked` places in its masks."""
    device, kernels = backend.device, backend.own_kernels
    half = dtype != torch.float32
    x = args.dim * dtype.itemsize
    q = parallel.heads(args.n_heads) * args.head_dim
    kv = len(parallel.kv_heads(args.n_heads, args.n_kv_heads)) * args.head_dim
    inputs = 4 * args.head_dim + 32  # rotation, positions, slots, ids
    # Where there is a matrix unit (AMX), torch's attention packs K and V of the whole prompt.
    packs = half and device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    scores = 2 * kv * dtype.itemsize * packs * prompt_len // min(n_tokens, prompt_len)
    scores += masked * dtype.itemsize // n_tokens
    if device.type == "cuda" and (masked or not half) and args.n_heads != args.n_kv_heads:
        scores = UNFUSED_SCORE_BYTES * parallel.heads(args.n_heads) * prompt_len
    norm = 2 * x + (12 if half else 8) * args.dim * (device.type != "cuda")  # fp32 copies; CUDA's kernel has none
    rotate_k = 2 * x + (q + 3 * kv) * dtype.itemsize + 8 * kv * half
    rotate_q = 2 * x + 2 * q * dtype.itemsize + 8 * q * half
    attend = 2 * x + 3 * q * dtype.itemsize + scores
    feed_forward = 3 * x + 3 * parallel.part(args.hidden_dim) * dtype.itemsize
    layer = max(norm, rotate_k, rotate_q, attend, feed_forward)
    hidden = parallel.part(args.hidden_dim, parallel.ffn_multiple) * dtype.itemsize
    if kernels and device.type == "cuda":  # without a mask
        layer = 4 * args.dim + 2 * x + max(3 * q + 2 * kv, 3 * hidden // dtype.itemsize) * dtype.itemsize
        return n_tokens * (inputs + 4 * args.head_dim + layer) + backend.dequantized_values * dtype.itemsize
    if kernels:
        packed = 0 if masked else 2 * (q - kv) * dtype.itemsize * packs  # without a mask, for all query heads
        attend = max(3 * q * dtype.itemsize, 2 * q * dtype.itemsize + scores + packed)
        layer = 4 * args.dim + x + max(attend, x + 2 * hidden)
    return n_tokens * (inputs + layer) + masked


def prompt_steps(shape: BatchShape, most: int, window: int | None) -> list[tuple[int, int]]:
    """Return the largest steps that read a batch's prompts, `most` tokens at a time: their tokens, and places in masks.

    A step that goes on with a prompt, or has more keys than the window, masks each key of each of its tokens.
    """
    length, total = shape.prompt_len, shape.bsz * shape.prompt_len
    most_masked: dict[int, int] = {}  # by the number of tokens
    for first in range(0, total, min(most, total)):
        last = min(first + most, total)
        masked = 0
        for row in range(first // length, -(-last // length)):
            start, stop = max(first - row * length, 0), min(last - row * length, length)
            if start or (window is not None and window < stop):
                masked += (stop - start) * stop
        most_masked[last - first] = max(masked, most_masked.get(last - first, 0))
    return list(most_masked.items())
