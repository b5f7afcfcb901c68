"""Tokens from logits on a GPU: llama.sampling's choices without a sort, and without a value that the host waits for."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from llama.backends.cuda import sampling_kernels as kernels
from llama.backends.cuda.available import LARGEST_VOCAB

WARPS = 4  # a program's; 8 tokens a thread


def greedy(logits: Tensor) -> Tensor:
    """The greatest logit's token, (bsz,), the lowest id among equals; INVALID where the maximum is not finite.

    logits: (bsz, vocab_size), fp32, and no more than 2**18 tokens here and below.
    """
    bsz, chunks = grid_of(logits)
    row = logits.stride(0), logits.shape[1]
    maxima = logits.new_empty(bsz, chunks)
    tokens = logits.new_empty(bsz, dtype=torch.int64)
    kernels.maxima[bsz, chunks](logits, *row, maxima, maxima, ZEROS=0, num_warps=WARPS)
    kernels.first_of_maximum[(bsz,)](logits, *row, maxima, tokens, chunks, CHUNKS=padded(chunks), num_warps=WARPS)
    return tokens


def sample_nucleus(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, (bsz,), drawn from the nucleus as llama.sampling.sample does; INVALID where that says so.

    logits: (bsz, vocab_size), fp32; temperature, top_p, uniform: (bsz,), fp32; at temperature 0 any token may come.
    At top_p 1 llama.sampling draws in the order of the vocabulary: there `sample_all` gives the same tokens.
    """
    bsz, chunks = grid_of(logits)
    check_rows(bsz, top_p)
    steps = 2 * kernels.DIGITS.value - 1  # two searches, which begin with the same masses
    masses = logits.new_empty(steps, bsz, kernels.BINS.value, dtype=torch.int64)
    states = logits.new_empty(steps + 1, bsz, kernels.STATE.value, dtype=torch.int64)
    keys = _weigh(logits, temperature, uniform, masses, by_digit=True)
    for step in range(1, steps):
        digit = step if step < kernels.DIGITS.value else step - kernels.DIGITS.value + 1
        search = top_p, uniform, masses[0], masses[step - 1], states[step - 1]
        kernels.refine[bsz, chunks](
            keys,
            *search,
            masses[step],
            states[step],
            SHIFT=kernels.BITS.value * (kernels.DIGITS.value - 1 - digit),
            NUCLEUS=step == 1,
            DRAW=step == kernels.DIGITS.value,
            num_warps=WARPS,
        )
    counts = logits.new_empty(bsz, chunks, dtype=torch.int64)
    tokens = logits.new_empty(bsz, dtype=torch.int64)
    kernels.count[bsz, chunks](keys, masses[-1], states[-2], states[-1], counts, num_warps=WARPS)
    kernels.pick_equal[(bsz,)](keys, states[-1], counts, tokens, chunks, CHUNKS=padded(chunks), num_warps=WARPS)
    return tokens


def sample_all(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """`sample_nucleus` at top_p 1: every token can come, and they are drawn in the order of the vocabulary."""
    bsz, chunks = grid_of(logits)
    masses = logits.new_empty(1, bsz, chunks, dtype=torch.int64)
    tokens = logits.new_empty(bsz, dtype=torch.int64)
    keys = _weigh(logits, temperature, uniform, masses, by_digit=False)
    kernels.pick[(bsz,)](keys, uniform, masses, tokens, chunks, CHUNKS=padded(chunks), num_warps=WARPS)
    return tokens


def _weigh(logits: Tensor, temperature: Tensor, uniform: Tensor, masses: Tensor, by_digit: bool) -> Tensor:
    """Keys, (bsz, chunks, kernels.CHUNK.value), int32. Their masses go to masses[0], and zeros to the others.

    masses: (any, bsz, kernels.BINS.value), of the first digit's values, or (1, bsz, chunks).
    """
    bsz, chunks = grid_of(logits)
    check_rows(bsz, temperature, uniform)
    row = logits.stride(0), logits.shape[1]
    maxima = logits.new_empty(bsz, chunks)
    keys = logits.new_empty(bsz, chunks, kernels.CHUNK.value, dtype=torch.int32)
    zeros = len(masses) * kernels.BINS.value if by_digit else 0
    kernels.maxima[bsz, chunks](logits, *row, maxima, masses, ZEROS=zeros, num_warps=WARPS)
    kernels.weigh[bsz, chunks](
        logits, *row, temperature, maxima, keys, masses, BY_DIGIT=by_digit, CHUNKS=padded(chunks), num_warps=WARPS
    )
    return keys


def grid_of(logits: Tensor) -> tuple[int, int]:
    """Return (bsz, chunks) of logits (bsz, vocab_size), fp32."""
    bsz, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and vocab_size <= LARGEST_VOCAB, logits.shape
    return bsz, triton.cdiv(vocab_size, kernels.CHUNK.value)


def check_rows(bsz: int, *values: Tensor) -> None:
    """Assert what kernels read: a number of each row, fp32."""
    for each in values:
        assert each.dtype == torch.float32 and each.shape == (bsz,) and each.is_contiguous(), (
            each.shape,
            each.stride(),
        )


def padded(chunks: int) -> int:
    """Return the power of two that a program reads the chunks' values by."""
    return max(16, triton.next_power_of_2(chunks))
