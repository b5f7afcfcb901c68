"""How quantized releases hold the codes, scales and zero points of a matrix: in which tensors, and in which order.

Knows nothing of files, configurations or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]  # the tensors of one matrix, by the ends of their names

# Which of 8 rows each place of AWQ's words has.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What the 4-bit floats of MXFP4 and NVFP4 (E2M1) stand for, in halves, with the offset of Q5_0's codes.
E2M1_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
E2M1_CODES = tuple(16 + half for half in E2M1_HALVES) + tuple(16 - half for half in E2M1_HALVES)


def unpack_words(packed: Tensor, span: slice, bits: int) -> Tensor:
    """Return the codes [span) of words (n, n_words), the first in the lowest bits: uint8 (n, stop - start)."""
    in_word = packed.element_size() * 8 // bits
    first = span.start // in_word
    # A copy, as what is but one column or row counts as contiguous, whatever its strides.
    words = packed[:, first : -(-span.stop // in_word)].clone(memory_format=torch.contiguous_format)
    codes = words.view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return codes[:, span.start - first * in_word : span.stop - first * in_word]


def unpack_transposed(packed: Tensor, span: slice, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Return the codes [span) of words (n, n_words), transposed: uint8 (stop - start, n).

    order: which code of a word each place has, from the lowest bits on; default: its own.
    """
    in_word = 32 // bits
    first = span.start // in_word
    words = packed[:, first : -(-span.stop // in_word)].t().contiguous()
    codes = torch.empty(len(words), in_word, words.shape[1], dtype=torch.uint8)
    for place, code in enumerate(order or range(in_word)):
        codes[:, code] = words >> place * bits & (1 << bits) - 1
    return codes.flatten(0, 1)[span.start - first * in_word : span.stop - first * in_word]


@dataclass(frozen=True)
class IntegerLayout:
    """How tensors hold a matrix (out, in) of whole numbers: of rows and columns, and of so many bits."""

    codes: Callable[[Parts, slice, slice, int], Tensor]  # uint8 (rows, columns)
    scales: Callable[[Parts, slice], Tensor]  # (rows, n_groups), of any floating dtype
    zeros: Callable[[Parts, slice, int], Tensor] | None = None  # uint8 (rows, n_groups); default: half of all codes
    has_room: bool = False  # whether codes lie in bytes that have room for larger ones


def _gptq_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return unpack_words(parts["qweight"][:, rows].t(), columns, bits)


def _gptq_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    return unpack_transposed(parts["qzeros"], rows, bits)


def _gptq_v1_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    """Add the 1 that the first version takes off; what that makes too large was 0."""
    return _gptq_zeros(parts, rows, bits) + 1 & (1 << bits) - 1


def _packed_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return unpack_words(parts["weight_packed"][rows], columns, bits)


def _packed_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    return unpack_transposed(parts["weight_zero_point"].t(), rows, bits)


def _signed(codes: Tensor) -> Tensor:
    """Return int8 codes with an offset of 128: uint8."""
    return codes.contiguous().view(torch.uint8) ^ 128


def _int8_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return _signed(parts["weight"][rows, columns])


def _int4_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    """Return codes of 4 bits that have a byte each, with an offset of 8; what is no such code becomes more than 15."""
    return parts["weight"][rows, columns].contiguous().view(torch.uint8) + 8


def _e2m1_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    table = torch.tensor(E2M1_CODES, dtype=torch.uint8)
    return table[unpack_words(parts["weight_packed"][rows], columns, 4).int()]


def _powers_of_two(parts: Parts, rows: slice) -> Tensor:
    """Return 2^(e - 128), half of what exponents stand for, of which 255 is NaN."""
    exponents = parts["weight_scale"][rows].view(torch.uint8).double()
    return torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 128))


def _by_row(name: str) -> Callable[[Parts, slice], Tensor]:
    return lambda parts, rows: parts[name][rows]


def _by_group(parts: Parts, rows: slice) -> Tensor:
    return parts["scales"][:, rows].t()


INTEGER_LAYOUTS = {
    "gptq": IntegerLayout(_gptq_codes, _by_group, _gptq_v1_zeros),
    "gptq_v2": IntegerLayout(_gptq_codes, _by_group, _gptq_zeros),
    "awq": IntegerLayout(
        lambda parts, rows, columns, bits: unpack_transposed(parts["qweight"][columns], rows, bits, AWQ_ORDER),
        _by_group,
        lambda parts, rows, bits: unpack_transposed(parts["qzeros"], rows, bits, AWQ_ORDER),
    ),
    "packed": IntegerLayout(_packed_codes, _by_row("weight_scale")),
    "packed with zeros": IntegerLayout(_packed_codes, _by_row("weight_scale"), _packed_zeros),
    "int8": IntegerLayout(_int8_codes, _by_row("weight_scale")),
    "int8 with zeros": IntegerLayout(
        _int8_codes, _by_row("weight_scale"), lambda parts, rows, bits: _signed(parts["weight_zero_point"][rows])
    ),
    "llm.int8": IntegerLayout(_int8_codes, lambda parts, rows: parts["SCB"][rows].float().unsqueeze(1) / 127),
    "meta int4": IntegerLayout(_int4_codes, _by_row("scales"), has_room=True),
    "meta int8": IntegerLayout(_int8_codes, _by_row("scales")),
    # Scales are of halves.
    "mxfp4": IntegerLayout(_e2m1_codes, _powers_of_two),
    "modelopt nvfp4": IntegerLayout(
        lambda parts, rows, columns, bits: _e2m1_codes({"weight_packed": parts["weight"]}, rows, columns, bits),
        lambda parts, rows: parts["weight_scale"][rows].float() * parts["weight_scale_2"].float() / 2,
    ),
    "nvfp4": IntegerLayout(
        _e2m1_codes,
        lambda parts, rows: parts["weight_scale"][rows].float() / (2 * parts["weight_global_scale"].float()),
    ),
}


class _HasValues(Protocol):
    def values(self, dim: int, start: int, stop: int) -> Tensor: ...


def hadamard_values(parts: Parts, shape: tuple[int, int], rows: slice, matrix: _HasValues) -> Tensor:
    """Return rows of a matrix times the normalised Hadamard matrix H of their length, a power of two.

    H is symmetric and its own inverse, so that W (H x) = (W H) x (arXiv:2405.16406). It is the Kronecker product of two
    smaller ones, by which rows are multiplied in turn.
    """
    height = 1 << (shape[1].bit_length() - 1) // 2
    left, right = _hadamard(height), _hadamard(shape[1] // height)
    values = matrix.values(0, rows.start, rows.stop).view(-1, len(left), len(right))
    return torch.matmul(left, values @ right).flatten(1).div_(math.sqrt(shape[1]))


def _hadamard(size: int) -> Tensor:
    """Return Sylvester's matrix of 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def fp8_values(parts: Parts, shape: tuple[int, int], rows: slice, tile: tuple[int, int]) -> Tensor:
    """Multiply 8-bit floats by the scale (n, m) of the tile, of so many rows and columns, that each lies in."""
    scales = parts["scale"].float()[torch.arange(rows.start, rows.stop) // tile[0]]
    return parts["weight"][rows].float().mul_(scales[:, torch.arange(shape[1]) // tile[1]])


def table_values(
    parts: Parts, shape: tuple[int, int], rows: slice, block_len: int, nested: tuple[int, float]
) -> Tensor:
    """Look 4-bit codes up in bitsandbytes' table, times the largest value of each run of `block_len` values.

    nested: how many of these largest values share a scale, and their mean; not used where they are floats.
    """
    first, last = rows.start * shape[1], rows.stop * shape[1]
    pairs = parts["weight"][first // 2 : -(-last // 2)]
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten()[first % 2 :][: last - first]
    blocks = slice(first // block_len, -(-last // block_len))
    largest = parts["absmax"][blocks]
    if "nested_absmax" in parts:
        groups = torch.arange(blocks.start, blocks.stop) // nested[0]
        largest = parts["nested_quant_map"][largest.int()] * parts["nested_absmax"][groups] + nested[1]
    values = parts["quant_map"].float()[codes.int()]
    return values.mul_(largest.float()[torch.arange(first, last) // block_len - blocks.start]).view(-1, shape[1])
