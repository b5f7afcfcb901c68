"""The kernels of sampling.py: each program takes a chunk of one row's tokens, or makes the last choice of a row.

A token's mass is its probability over the greatest one, in whole units: sums are exact in any order, so a row's token
depends neither on the grid nor on other rows. Its key orders tokens by falling probability. Where the nucleus ends,
and which probability is drawn, are searches for a key: a digit a launch, by the masses of all the digit's values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama.sampling import INVALID

# One program's tokens: 126 programs for Llama 3's vocabulary, one for each of an H100's 132 multiprocessors.
CHUNK = tl.constexpr(1024)
UNITS = tl.constexpr(2.0**44)  # the mass of the likeliest token
# Tokens of a unit or more have keys of at most 44 * 2**23: five digits of six bits. Four would need digits of eight,
# with four times the work where a distribution is flat.
BITS, BINS, DIGITS = tl.constexpr(6), tl.constexpr(2**6), tl.constexpr(5)
FIRST_SHIFT = tl.constexpr(BITS.value * (DIGITS.value - 1))
DIGITS_AT_ONCE = tl.constexpr(8)  # a digit's values whose masses are summed at once, in registers
STATE = tl.constexpr(3)  # of a search: the digits so far, the mass before them, the target
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
SMALLEST_TEMPERATURE = tl.constexpr(torch.finfo(torch.float32).tiny)
INFINITY = tl.constexpr(float("inf"))
NO_TOKEN = tl.constexpr(INVALID)


@triton.jit
def maxima(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    maxima_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    ZEROS: tl.constexpr,
) -> None:
    """The maximum of one chunk of a row, infinite where there is a NaN; the first chunk's program clears `zeros`.

    The grid is (bsz, chunks). logits: (bsz, vocab_size); maxima: (bsz, chunks); zeros: (bsz * ZEROS,).
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    logits = tl.where(logits == logits, logits, INFINITY)
    tl.store(maxima_ptr + row * tl.num_programs(1) + chunk, tl.max(logits, 0))
    if chunk == 0:
        for first in range(0, ZEROS, CHUNK):
            places = first + tl.arange(0, CHUNK)
            tl.store(zeros_ptr + row * ZEROS + places, tl.zeros([CHUNK], tl.int64), mask=places < ZEROS)


@triton.jit
def first_of_maximum(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    maxima_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """The first token of a row whose logit is the greatest. The grid is (bsz,); maxima: (bsz, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CHUNKS)
    highest = tl.load(maxima_ptr + row * chunks + places, mask=places < chunks, other=-INFINITY)
    maximum = tl.max(highest, 0)
    chunk = tl.min(tl.where(highest == maximum, places, CHUNKS), 0)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    place = tl.min(tl.where(logits == maximum, tl.arange(0, CHUNK), CHUNK), 0)
    token = tl.where(tl.abs(maximum) < INFINITY, chunk * CHUNK + place, NO_TOKEN)
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def weigh(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    temperature_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    BY_DIGIT: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Keys of one chunk of a row, and their mass: the chunk's, or added to that of the first digit's values.

    The grid is (bsz, chunks). temperature: (bsz,); maxima: (bsz, chunks); keys: (bsz, chunks, CHUNK);
    masses: (bsz, chunks) or (bsz, BINS).
    A row without a finite maximum has no mass, nor have the places behind the vocabulary.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    logits = _chunk_of(logits_ptr + row * row_stride, chunk, vocab_size)
    places = tl.arange(0, CHUNKS)
    maximum = tl.max(tl.load(maxima_ptr + row * chunks + places, mask=places < chunks, other=-INFINITY), 0)
    # As llama.sampling: subtracted before the division, which could overflow, and never 0 by 0.
    temperature = tl.maximum(tl.load(temperature_ptr + row), SMALLEST_TEMPERATURE)
    # The hardware's exponential is an approximation: it is not to pass 1.
    probs = tl.minimum(tl.exp((logits - maximum) / temperature), 1.0)
    probs = tl.where(tl.abs(maximum) < INFINITY, probs, 0.0)
    keys = -(probs.to(tl.int32, bitcast=True) - ONE)
    tl.store(keys_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK), keys)
    if BY_DIGIT:
        _add_by_digit(masses_ptr + row * BINS, keys >> FIRST_SHIFT, _mass(keys))
    else:
        tl.store(masses_ptr + row * chunks + chunk, tl.sum(_mass(keys), 0))


@triton.jit
def refine(
    keys_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    first_masses_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    state_ptr: tl.tensor,
    next_masses_ptr: tl.tensor,
    next_state_ptr: tl.tensor,
    SHIFT: tl.constexpr,
    NUCLEUS: tl.constexpr,
    DRAW: tl.constexpr,
) -> None:
    """A row's search finds a digit by its masses; one chunk's keys that have it add theirs to those of the next digit.

    The grid is (bsz, chunks). keys: (bsz, chunks, CHUNK); top_p, uniform: (bsz,); masses: (bsz, BINS);
    state: (bsz, STATE).
    NUCLEUS: the search for the last key of the nucleus begins. DRAW: it ends, and that for the token's key begins.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    # Before all else, so that memory answers while the digit is found.
    keys = tl.load(keys_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    bins = row * BINS + tl.arange(0, BINS)
    masses = tl.load(masses_ptr + bins)
    if NUCLEUS:
        key, before = 0, 0
        target = _target(tl.sum(masses, 0), tl.load(top_p_ptr + row))
    else:
        key, before, target = _load_state(state_ptr, row)
    key, before = _find_digit(masses, key, before, target)
    if DRAW:
        # Of the tokens with the last key those stay that have no more than the target before them.
        mass = _mass(key)
        kept = before + (target - before + mass) // mass * mass
        key, before = 0, 0
        target = _target(kept, tl.load(uniform_ptr + row))
        key, before = _find_digit(tl.load(first_masses_ptr + bins), key, before, target)
    if chunk == 0:
        _store_state(next_state_ptr, row, key, before, target)
    digits = keys >> SHIFT
    masses = tl.where(digits >> BITS == key, _mass(keys), 0)
    _add_by_digit(next_masses_ptr + row * BINS, digits & (BINS - 1), masses)


@triton.jit
def count(
    keys_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    state_ptr: tl.tensor,
    next_state_ptr: tl.tensor,
    counts_ptr: tl.tensor,
) -> None:
    """A row's search ends with the key to draw; how many tokens of one chunk have it.

    The grid is (bsz, chunks). keys: (bsz, chunks, CHUNK); masses: (bsz, BINS); state: (bsz, STATE);
    counts: (bsz, chunks). The next state is the key, 0, and how many tokens with that key come before the one drawn.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    keys = tl.load(keys_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    key, before, target = _load_state(state_ptr, row)
    key, before = _find_digit(tl.load(masses_ptr + row * BINS + tl.arange(0, BINS)), key, before, target)
    if chunk == 0:
        _store_state(next_state_ptr, row, key, 0, (target - before) // _mass(key))
    tl.store(counts_ptr + row * chunks + chunk, tl.sum((keys == key).to(tl.int64), 0))


@triton.jit
def pick_equal(
    keys_ptr: tl.tensor,
    state_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """The token of a row that `count` told of. The grid is (bsz,); keys: (bsz, chunks, CHUNK); counts: (bsz, chunks).

    A row without mass has no token with its key.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CHUNKS)
    key, before, target = _load_state(state_ptr, row)
    counts = tl.load(counts_ptr + row * chunks + places, mask=places < chunks, other=0)
    chunk, before = _passing(counts, before, target)
    keys = tl.load(keys_ptr + (row * chunks + tl.minimum(chunk, chunks - 1)) * CHUNK + tl.arange(0, CHUNK))
    place, before = _passing((keys == key).to(tl.int64), before, target)
    token = tl.where(tl.sum(counts, 0) > 0, chunk * CHUNK + place, NO_TOKEN)
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def pick(
    keys_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    masses_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
) -> None:
    """The token of a row, by id, in which the mass passes uniform's share of it.

    The grid is (bsz,). keys: (bsz, chunks, CHUNK); uniform: (bsz,); masses: (bsz, chunks).
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CHUNKS)
    masses = tl.load(masses_ptr + row * chunks + places, mask=places < chunks, other=0)
    total = tl.sum(masses, 0)
    target = _target(total, tl.load(uniform_ptr + row))
    chunk, before = _passing(masses, 0, target)
    keys = tl.load(keys_ptr + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK))
    place, before = _passing(_mass(keys), before, target)
    tl.store(tokens_ptr + row, tl.where(total > 0, chunk * CHUNK + place, NO_TOKEN).to(tl.int64))


@triton.jit
def _chunk_of(row_ptr: tl.tensor, chunk: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + ids, mask=ids < vocab_size, other=-INFINITY)


@triton.jit
def _mass(keys: tl.tensor) -> tl.tensor:
    return ((-(keys - ONE)).to(tl.float32, bitcast=True) * UNITS).to(tl.int64)


@triton.jit
def _target(mass: tl.tensor, share: tl.tensor) -> tl.tensor:
    """The share of a mass in whole units, and less than all of it: what passes it exists."""
    return tl.minimum((mass.to(tl.float64) * share.to(tl.float64)).to(tl.int64), mass - 1)


@triton.jit
def _passing(masses: tl.tensor, before: tl.tensor, target: tl.tensor) -> tl.tensor:
    """The place where the sum of `before` and the masses (n,) passes the target, and that sum before this place."""
    sums = before + tl.cumsum(masses, 0)
    place = tl.sum((sums <= target).to(tl.int32), 0)
    return place, before + tl.sum(tl.where(sums <= target, masses, 0), 0)


@triton.jit
def _find_digit(masses: tl.tensor, key: tl.tensor, before: tl.tensor, target: tl.tensor) -> tl.tensor:
    """The key with a digit more, and the mass before all keys that begin with it; masses: (BINS,)."""
    digit, before = _passing(masses, before, target)
    return digit + key * BINS, before


@triton.jit
def _add_by_digit(sums_ptr: tl.tensor, digits: tl.tensor, masses: tl.tensor) -> None:
    """Add masses (CHUNK,) to the sums (BINS,) of their digits. Integers: the order of programs changes nothing."""
    first = tl.min(tl.where(masses > 0, digits, BINS), 0)
    stop = tl.max(tl.where(masses > 0, digits + 1, 0), 0)
    # From a search's second digit on, most chunks have few masses, of few digits, or none.
    for digit in range(first, stop, DIGITS_AT_ONCE):
        group = digit + tl.arange(0, DIGITS_AT_ONCE)
        mass = tl.sum(tl.where(digits[None, :] == group[:, None], masses[None, :], 0), 1)
        tl.atomic_add(sums_ptr + group, mass, mask=mass > 0, sem="relaxed")


@triton.jit
def _load_state(state_ptr: tl.tensor, row: tl.tensor) -> tl.tensor:
    state_ptr += row * STATE
    return tl.load(state_ptr).to(tl.int32), tl.load(state_ptr + 1), tl.load(state_ptr + 2)


@triton.jit
def _store_state(state_ptr: tl.tensor, row: tl.tensor, key: tl.tensor, before: tl.tensor, target: tl.tensor) -> None:
    state_ptr += row * STATE
    tl.store(state_ptr, key)
    tl.store(state_ptr + 1, before)
    tl.store(state_ptr + 2, target)
