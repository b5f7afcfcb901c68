"""The kernels of filters.py: each program takes a chunk of one row's tokens, as in sampling_kernels.py.

Where a filter ends is a search for a token, by the digits of its key: its rank among the row's tokens, and its id, so
that no two keys are alike. The masses that are searched through are whole numbers, so their sums are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llama.backends.cuda.sampling_kernels import (
    BINS,
    BITS,
    CHUNK,
    INFINITY,
    SMALLEST_TEMPERATURE,
    STATE,
    UNITS,
    _add_by_digit,
    _chunk_of,
    _find_digit,
    _store_state,
    _target,
)

ID_BITS = tl.constexpr(18)  # of LARGEST_VOCAB's ids; a rank has 32 bits
KEY_DIGITS = tl.constexpr(9)  # of 6 bits each
RANK_MASK = tl.constexpr(2**32 - 1)
GREATEST = tl.constexpr(2**31 - 1)
INFINITE_KEY = tl.constexpr(2**62)
MOST_TOKENS = tl.constexpr(2.0**20)


@triton.jit
def prepare(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    temperature_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    MIN_P: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Probabilities over the greatest one, and ranks by falling logit, of one chunk of a row.

    The grid is (bsz, chunks), here and below. maxima: (bsz, chunks); temperature, min_p: (bsz,); probs, ranks:
    (bsz, chunks, CHUNK). MIN_P: no search comes before min_p. A row without a finite maximum has no probabilities, nor
    have the places behind the vocabulary.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    maximum = _row_max(maxima_ptr + row * chunks, chunks, CHUNKS)
    probs = tl.minimum(tl.exp(_scaled(logits, maximum, tl.load(temperature_ptr + row))), 1.0)
    probs = tl.where(tl.abs(maximum) < INFINITY, probs, 0.0)
    if MIN_P:
        probs = tl.where(probs >= tl.load(min_p_ptr + row), probs, 0.0)
    at = (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    tl.store(probs_ptr + at, probs)
    tl.store(ranks_ptr + at, _rank(logits).to(tl.int32))


@triton.jit
def search(
    probs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    state_ptr: tl.tensor,
    next_masses_ptr: tl.tensor,
    next_state_ptr: tl.tensor,
    DIGIT: tl.constexpr,
    COUNTS: tl.constexpr,
) -> None:
    """A row's search finds the digit before by its masses; one chunk's keys that have it add theirs to the next's.

    probs, ranks: (bsz, chunks, CHUNK); limit: (bsz,); masses: (bsz, BINS); state: (bsz, STATE). COUNTS: the limit is a
    number of tokens, each of mass 1; else it is a share of all mass.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    probs, keys = tl.load(probs_ptr + at), _keys(tl.load(ranks_ptr + at), chunk)
    masses = _mass_of(probs, COUNTS)
    digits = keys >> (BITS * (KEY_DIGITS - 1 - DIGIT))
    if DIGIT > 0:
        key, before, target = _found(masses_ptr, state_ptr, limit_ptr, row, DIGIT, COUNTS)
        masses = tl.where(digits >> BITS == key, masses, 0)
        if chunk == 0:
            _store_state(next_state_ptr, row, key, before, target)
    _add_by_digit(next_masses_ptr + row * BINS, (digits & (BINS - 1)).to(tl.int32), masses)


@triton.jit
def keep(
    probs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    state_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    COUNTS: tl.constexpr,
    MIN_P: tl.constexpr,
) -> None:
    """A row's search ends with the last token that stays; the probabilities of those behind it become 0.

    Shapes as in `search`. MIN_P: min_p comes next, and takes its part as well.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    probs, keys = tl.load(probs_ptr + at), _keys(tl.load(ranks_ptr + at), chunk)
    last, before, target = _found(masses_ptr, state_ptr, limit_ptr, row, KEY_DIGITS, COUNTS)
    if not COUNTS:  # what lies below a unit of mass stays where nothing is to go
        last = tl.where(tl.load(limit_ptr + row) < 1, last, INFINITE_KEY)
    probs = tl.where(keys <= last, probs, 0.0)
    if MIN_P:
        probs = tl.where(probs >= tl.load(min_p_ptr + row), probs, 0.0)
    tl.store(probs_ptr + at, probs)


@triton.jit
def add_up(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    temperature_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """The sum of a chunk's probabilities, and of their products with scaled logits: (bsz, chunks) each."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    probs = tl.load(probs_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    maximum = _row_max(maxima_ptr + row * chunks, chunks, CHUNKS)
    scaled = _scaled(logits, maximum, tl.load(temperature_ptr + row))
    tl.store(sums_ptr + row * chunks + chunk, tl.sum(probs, 0))
    tl.store(moments_ptr + row * chunks + chunk, tl.sum(probs * tl.where(probs > 0, scaled, 0.0), 0))


@triton.jit
def rank_by_surprise(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    temperature_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """Ranks of one chunk's tokens by how far their surprise is from the expected one; sums, moments: as of `add_up`.

    That is how far the scaled logit is from their mean.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    maximum = _row_max(maxima_ptr + row * chunks, chunks, CHUNKS)
    scaled = _scaled(logits, maximum, tl.load(temperature_ptr + row))
    mean = _row_sum(moments_ptr + row * chunks, chunks, CHUNKS) / _row_sum(sums_ptr + row * chunks, chunks, CHUNKS)
    ranks = tl.abs(scaled - mean).to(tl.int32, bitcast=True)
    tl.store(ranks_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK), ranks)


@triton.jit
def last_of_likeliest(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    probs_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    last_ptr: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """The greatest key, by falling logit, of one chunk's tokens that reach XTC's threshold, or -1: (bsz, chunks)."""
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    probs = tl.load(probs_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    least = tl.load(threshold_ptr + row) * _row_sum(sums_ptr + row * chunks, chunks, CHUNKS)
    keys = tl.where((probs > 0) & (probs >= least), _keys(_rank(logits), chunk), -1)
    tl.store(last_ptr + row * chunks + chunk, tl.max(keys, 0))


@triton.jit
def write(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    probs_ptr: tl.tensor,
    is_filtered_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    probability_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    last_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    XTC: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """The logits of one chunk of a row, (bsz, vocab_size), -inf where no probability is left; XTC takes its part first.

    is_filtered, threshold, probability, uniform: (bsz,); a row that is not filtered is written as it is.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    probs = tl.load(probs_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    if XTC:
        least = tl.load(threshold_ptr + row) * _row_sum(sums_ptr + row * chunks, chunks, CHUNKS)
        places = tl.arange(0, CHUNKS)
        last = tl.max(tl.load(last_ptr + row * chunks + places, mask=places < chunks, other=-1), 0)
        without = tl.where((probs >= least) & (_keys(_rank(logits), chunk) != last), 0.0, probs)
        probs = tl.where(tl.load(uniform_ptr + row) < tl.load(probability_ptr + row), without, probs)
    kept = tl.where(probs > 0, logits, -INFINITY)
    kept = tl.where(tl.load(is_filtered_ptr + row).to(tl.int32) != 0, kept, logits)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(kept_ptr + row * vocab_size + ids, kept, mask=ids < vocab_size)


@triton.jit
def _scaled(logits: tl.tensor, maximum: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    # As llama.sampling: subtracted before the division, which could overflow, and never 0 by 0.
    return (logits - maximum) / tl.maximum(temperature, SMALLEST_TEMPERATURE)


@triton.jit
def _rank(logits: tl.tensor) -> tl.tensor:
    """Whole numbers of 32 bits, int64, that rise where logits fall."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # -0.0 is no less than 0.0
    return -(bits ^ ((bits >> 31) & GREATEST)).to(tl.int64) + GREATEST


@triton.jit
def _keys(ranks: tl.tensor, chunk: tl.tensor) -> tl.tensor:
    """Keys of a chunk's ranks: tokens by rank, and by id among equals."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    return ((ranks.to(tl.int64) & RANK_MASK) << ID_BITS) + ids


@triton.jit
def _mass_of(probs: tl.tensor, COUNTS: tl.constexpr) -> tl.tensor:
    if COUNTS:
        return (probs > 0).to(tl.int64)
    else:
        return (probs * UNITS).to(tl.int64)


@triton.jit
def _found(
    masses_ptr: tl.tensor,
    state_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    row: tl.tensor,
    DIGIT: tl.constexpr,
    COUNTS: tl.constexpr,
) -> tl.tensor:
    """The digits of a row's search up to the one before DIGIT, the mass before them, and the target."""
    masses = tl.load(masses_ptr + row * BINS + tl.arange(0, BINS))
    if DIGIT == 1:
        total, limit = tl.sum(masses, 0), tl.load(limit_ptr + row)
        key, before = total * 0, total * 0
        if COUNTS:
            target = tl.minimum(tl.minimum(limit, MOST_TOKENS).to(tl.int64), total) - 1
        else:
            target = _target(total, limit)
    else:
        state_ptr += row * STATE
        key, before, target = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    key, before = _find_digit(masses, key, before, target)
    return key, before, target


@triton.jit
def _row_max(values_ptr: tl.tensor, chunks: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    places = tl.arange(0, CHUNKS)
    return tl.max(tl.load(values_ptr + places, mask=places < chunks, other=-INFINITY), 0)


@triton.jit
def _row_sum(values_ptr: tl.tensor, chunks: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    places = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(values_ptr + places, mask=places < chunks, other=0.0), 0)
