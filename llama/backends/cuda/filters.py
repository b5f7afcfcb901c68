"""Filters of tokens on a GPU: FilterTensors.apply without a sort, and without a value that the host waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.backends.cuda import filter_kernels as kernels
from llama.backends.cuda.sampling import WARPS, check_rows, grid_of, padded
from llama.backends.cuda.sampling_kernels import BINS, CHUNK, STATE, maxima
from llama.sampling import FilterTensors


def filter_logits(
    logits: Tensor, filters: FilterTensors, temperature: Tensor, xtc_uniform: Tensor | None = None
) -> Tensor:
    """Return logits whose left out tokens are -inf, (bsz, vocab_size), as `FilterTensors.apply` does.

    logits: (bsz, vocab_size), fp32; temperature, xtc_uniform: (bsz,), fp32. A filter reads the row ten times.
    """
    bsz, chunks = grid_of(logits)
    kinds, grid = filters.kinds, (bsz, chunks)
    uniform = temperature if xtc_uniform is None else xtc_uniform
    assert xtc_uniform is not None or "xtc" not in kinds, "XTC has random numbers of its own"
    check_rows(bsz, temperature, uniform, filters.top_k, filters.top_p, filters.min_p, filters.typical_p)
    check_rows(bsz, filters.xtc_probability, filters.xtc_threshold)
    row = logits, logits.stride(0), logits.shape[1]
    fixed = {"CHUNKS": padded(chunks), "num_warps": WARPS}

    steps = kernels.KEY_DIGITS.value
    searches = [kind for kind in ("top_k", "top_p", "typical_p") if kind in kinds]
    masses = logits.new_empty(len(searches), steps, bsz, BINS.value, dtype=torch.int64)
    states = logits.new_empty(steps + 1, bsz, STATE.value, dtype=torch.int64)
    highest, sums, moments = (logits.new_empty(bsz, chunks) for _ in range(3))
    probs = logits.new_empty(bsz, chunks, CHUNK.value)
    ranks = torch.empty_like(probs, dtype=torch.int32)
    last = logits.new_empty(bsz, chunks, dtype=torch.int64)
    kept = logits.new_empty(logits.shape)

    def add_up() -> None:
        kernels.add_up[grid](*row, temperature, highest, probs, sums, moments, **fixed)

    # min_p comes after the last of these.
    before_min_p = [kind for kind in searches if kind != "typical_p"][-1:]
    zeros = masses[:, :, 0].numel()
    maxima[grid](*row, highest, masses if searches else highest, ZEROS=zeros, num_warps=WARPS)
    min_p_first = "min_p" in kinds and not before_min_p
    kernels.prepare[grid](*row, temperature, highest, filters.min_p, probs, ranks, MIN_P=min_p_first, **fixed)
    for kind, of_digits in zip(searches, masses, strict=True):
        if kind == "typical_p":
            add_up()
            kernels.rank_by_surprise[grid](*row, temperature, highest, sums, moments, ranks, **fixed)
        limit, counts = getattr(filters, kind), kind == "top_k"
        for digit in range(steps):
            found = limit, of_digits[max(0, digit - 1)], states[max(0, digit - 1)]
            following = of_digits[digit], states[digit]
            kernels.search[grid](probs, ranks, *found, *following, DIGIT=digit, COUNTS=counts, num_warps=WARPS)
        min_p_next = "min_p" in kinds and before_min_p == [kind]
        kernels.keep[grid](
            probs, ranks, limit, of_digits[-1], states[steps - 1], filters.min_p,
            COUNTS=counts, MIN_P=min_p_next, num_warps=WARPS,
        )  # fmt: skip
    if "xtc" in kinds:
        add_up()
        kernels.last_of_likeliest[grid](*row, probs, filters.xtc_threshold, sums, last, **fixed)
    xtc = filters.xtc_threshold, filters.xtc_probability, uniform, sums, last
    kernels.write[grid](*row, probs, filters.is_filtered, *xtc, kept, XTC="xtc" in kinds, **fixed)
    return kept
