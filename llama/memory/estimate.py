"""What a job takes of each rank's memory beside the weights: the cache, and the most that computing holds at once.

All figures are bytes of one rank.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from llama.backends.cuda.available import has_triton
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.quantization.planar import DENSE_AT_ONCE

# Positions whose logits are held at once while scoring a prompt: 128 MiB for a vocabulary of 128k.
SCORED_AT_ONCE = 256

# Positions of all rows together that are read at once: enough that a matrix product is as fast as it gets there.
# On CUDA without Triton they are all read at once: torch's fused kernels take no mask where query heads share KV heads.
READ_AT_ONCE = 2048
READ_AT_ONCE_GPU = 8192

# Positions in one step of speculation, of all rows together: more of them take a CPU as long as separate steps.
MOST_POSITIONS = 16

# The constants below, and the sums in `activation_bytes`, were measured with torch's memory profiler on a CPU.
SAMPLED = 29  # bytes of each logit while a token is sampled: its fp32 value, and 6.25 times that for a full sort
SCORED = 8  # bytes of each logit of a scored prompt
PLAIN = 10  # bytes of each attention score where no fused kernel serves
HEAP = 100_000_000  # what glibc's heap keeps between blocks in use, where they are large (measured: 22 to 180 MB)


@dataclass(frozen=True)
class Job:
    """The largest batch of a run: bsz prompts of up to prompt_len tokens, up to `length` with what follows them."""

    bsz: int
    prompt_len: int
    length: int
    scored: bool = False  # log-probabilities of prompts are asked for
    guessed: bool = False  # speculation samples more than one token a row


def read_at_once(bsz: int, device: torch.device) -> int:
    """Positions of each of bsz rows that are read at once."""
    if device.type == "cuda" and not has_triton(device):
        return sys.maxsize
    return max(1, (READ_AT_ONCE_GPU if device.type == "cuda" else READ_AT_ONCE) // bsz)


def cache_bytes(args: ModelArgs, parallel: ModelParallel, dtype: torch.dtype, job: Job) -> int:
    n_local_kv_heads = len(parallel.kv_heads(args.n_heads, args.n_kv_heads))
    return 2 * args.n_layers * job.bsz * job.length * n_local_kv_heads * args.head_dim * dtype.itemsize


def activation_bytes(
    args: ModelArgs,
    parallel: ModelParallel,
    dtype: torch.dtype,
    device: torch.device,
    job: Job,
    kernels: bool = False,
) -> int:
    """The most that the forward passes and the sampling of a job hold at once, beside weights and cache.

    Counted per position that the prefill reads at once, which is where it peaks: a layer's input, the sum after
    attention and the normalised sum, and what is computed from them. After the first chunk there is a mask, too.
    With kernels (fused.py, gpu_layers.py) the sum is one, in fp32, and norms and rotations make nothing beside their
    results.
    """
    half = dtype != torch.float32
    x = args.dim * dtype.itemsize
    q = parallel.heads(args.n_heads) * args.head_dim
    kv = len(parallel.kv_heads(args.n_heads, args.n_kv_heads)) * args.head_dim
    kept = 4 * args.head_dim + 32  # rotation, positions, slots, ids
    seqlen = min(job.prompt_len, read_at_once(job.bsz, device))
    scores = 2 * kv * dtype.itemsize * half * job.prompt_len // seqlen  # K and V of the whole prompt, packed
    masked = seqlen < job.prompt_len or (args.sliding_window is not None and args.sliding_window < job.prompt_len)
    if masked:
        kept += job.prompt_len
        scores += job.prompt_len * dtype.itemsize
    if device.type == "cuda" and (masked or not half) and args.n_heads != args.n_kv_heads:
        scores = PLAIN * parallel.heads(args.n_heads) * job.prompt_len
    norm = 2 * x + (12 if half else 8) * args.dim * (device.type != "cuda")  # fp32 copies; CUDA's kernel has none
    rotate_k = 2 * x + (q + 3 * kv) * dtype.itemsize + 8 * kv * half
    rotate_q = 2 * x + 2 * q * dtype.itemsize + 8 * q * half
    attend = 2 * x + 3 * q * dtype.itemsize + scores
    feed_forward = 3 * x + 3 * parallel.part(args.hidden_dim) * dtype.itemsize
    layer = max(norm, rotate_k, rotate_q, attend, feed_forward)
    dense = 0
    hidden = parallel.part(args.hidden_dim, parallel.ffn_multiple) * dtype.itemsize
    if kernels and device.type == "cuda":
        kept = 8 * args.head_dim + 32  # no mask
        layer = 4 * args.dim + 2 * x + max(3 * q + 2 * kv, 3 * hidden // dtype.itemsize) * dtype.itemsize
        dense = DENSE_AT_ONCE * dtype.itemsize  # of quantized weights
    elif kernels:
        packed = 0 if masked else 2 * (q - kv) * dtype.itemsize * half  # without a mask, for all query heads
        attend = max(3 * q * dtype.itemsize, 2 * q * dtype.itemsize + scores + packed)
        layer = 4 * args.dim + x + max(attend, x + 2 * hidden)
    n_tokens = job.bsz * seqlen
    prefill = n_tokens * (kept + layer) + dense
    sampled = max(job.bsz, MOST_POSITIONS * job.guessed) * SAMPLED
    logits = args.vocab_size * max(sampled, min(seqlen, SCORED_AT_ONCE) * SCORED if job.scored else 0)
    peak = max(prefill, n_tokens * x + logits)
    heap = HEAP // 2 if kernels else HEAP  # measured with kernels: 40 MB
    return peak + min(2 * peak, heap) if device.type == "cpu" else peak
