"""Matrices as GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and MXFP4 release them: their values, and blocks.

Knows how tensors hold codes and scales, and nothing of files, configurations or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockFields, BlockType
from llama.quantization.plain_blocks import put_together

Parts = Mapping[str, Tensor]  # the tensors of one matrix, by the ends of their names

DECODED_AT_ONCE = 1 << 21  # values; their temporaries take some 20 MB
BLOCK = 32  # values in each of the block types that a release may become

# AWQ packs 8 columns in the order 0, 2, 4, 6, 1, 3, 5, 7: where each of them lies in a word.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# What the 4-bit floats of MXFP4 and NVFP4 (E2M1) stand for, in halves, with the offset of Q5_0's codes.
E2M1_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
E2M1_CODES = tuple(16 + half for half in E2M1_HALVES) + tuple(16 - half for half in E2M1_HALVES)
# The block type that groups of so many bits are, value for value, without zero points and with them.
SYMMETRIC_TYPES = {4: BLOCK_TYPES["Q4_0"], 5: BLOCK_TYPES["Q5_0"], 8: BLOCK_TYPES["Q8_0"]}
ASYMMETRIC_TYPES = {4: BLOCK_TYPES["Q4_1"]}


def unpack_words(packed: Tensor, span: slice, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """Return the codes [span) of words (n, n_words), the first in the lowest bits: uint8 (n, stop - start).

    places: where each code lies inside a word, if not in their own order.
    """
    in_word = packed.element_size() * 8 // bits
    first = span.start // in_word
    # A copy, as what is but one column or row counts as contiguous, whatever its strides.
    words = packed[:, first : -(-span.stop // in_word)].clone(memory_format=torch.contiguous_format)
    codes = words.view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    if places is not None:
        codes = codes.unflatten(-1, (-1, in_word))[..., list(places)].flatten(-2)
    return codes[:, span.start - first * in_word : span.stop - first * in_word]


@dataclass(frozen=True)
class IntegerLayout:
    """How tensors hold a matrix (out, in) of whole numbers: of rows and columns, and of so many bits."""

    codes: Callable[[Parts, slice, slice, int], Tensor]  # uint8 (rows, columns)
    scales: Callable[[Parts, slice], Tensor]  # (rows, n_groups), of any floating dtype
    zeros: Callable[[Parts, slice, int], Tensor] | None = None  # uint8 (rows, n_groups); default: half of all codes


def _gptq_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return unpack_words(parts["qweight"][:, rows].t(), columns, bits)


def _gptq_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    return unpack_words(parts["qzeros"], rows, bits).t()


def _gptq_v1_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    """Add the 1 that the first version takes off; what that makes too large was 0."""
    return _gptq_zeros(parts, rows, bits) + 1 & (1 << bits) - 1


def _packed_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return unpack_words(parts["weight_packed"][rows], columns, bits)


def _packed_zeros(parts: Parts, rows: slice, bits: int) -> Tensor:
    return unpack_words(parts["weight_zero_point"].t(), rows, bits).t()


def _signed(codes: Tensor) -> Tensor:
    """Return int8 codes with an offset of 128: uint8."""
    return codes.contiguous().view(torch.uint8) ^ 128


def _int8_codes(parts: Parts, rows: slice, columns: slice, bits: int) -> Tensor:
    return _signed(parts["weight"][rows, columns])


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
        lambda parts, rows, columns, bits: unpack_words(parts["qweight"][columns], rows, bits, AWQ_PLACES).t(),
        _by_group,
        lambda parts, rows, bits: unpack_words(parts["qzeros"], rows, bits, AWQ_PLACES).t(),
    ),
    "packed": IntegerLayout(_packed_codes, _by_row("weight_scale")),
    "packed with zeros": IntegerLayout(_packed_codes, _by_row("weight_scale"), _packed_zeros),
    "int8": IntegerLayout(_int8_codes, _by_row("weight_scale")),
    "int8 with zeros": IntegerLayout(
        _int8_codes, _by_row("weight_scale"), lambda parts, rows, bits: _signed(parts["weight_zero_point"][rows])
    ),
    "llm.int8": IntegerLayout(_int8_codes, lambda parts, rows: parts["SCB"][rows].float().unsqueeze(1) / 127),
    # Scales are of halves.
    "mxfp4": IntegerLayout(_e2m1_codes, _powers_of_two),
    "nvfp4": IntegerLayout(
        _e2m1_codes,
        lambda parts, rows: parts["weight_scale"][rows].float() / (2 * parts["weight_global_scale"].float()),
    ),
}


class ReleasedMatrix(Protocol):
    """Offer a matrix (out, in) whose values no single tensor has."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def parts(self) -> Parts: ...

    @property
    def kind(self) -> str:
        """Return what it is stored in, for people."""
        ...

    @property
    def block_type(self) -> BlockType | None:
        """Return the type of blocks that it is, code for code, with scales rounded to fp16; None if floats alone."""
        ...

    def values(self, dim: int, start: int, stop: int) -> Tensor:
        """Return the values [start, stop) along `dim`, in fp32."""
        ...

    def blocks(self, dim: int, start: int, stop: int) -> tuple[Tensor, float]:
        """Return the blocks of rows, or of columns between blocks, uint8 (rows, row_bytes), and their largest error.

        The error is a share of the largest value that a code of the matrix could have.
        """
        ...


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix of whole numbers: scale * (code - zero), with a scale, and a zero point, for each group of a row.

    Raise ValueError, while it is read, for scales that are not finite, and for those of 0 where codes say otherwise.
    """

    name: str  # for messages
    parts: Parts
    shape: tuple[int, int]
    layout: IntegerLayout
    kind: str
    bits: int
    group_size: int
    symmetric: bool
    group_of: Tensor | None = None  # of each column, where groups are not `group_size` columns one after another

    @property
    def block_type(self) -> BlockType | None:
        whole = self.group_of is None and self.group_size % BLOCK == 0 and self.shape[1] % BLOCK == 0
        return (SYMMETRIC_TYPES if self.symmetric else ASYMMETRIC_TYPES).get(self.bits) if whole else None

    def values(self, dim: int, start: int, stop: int) -> Tensor:
        return _in_turn(self.shape, dim, start, stop, self._values)

    def blocks(self, dim: int, start: int, stop: int) -> tuple[Tensor, float]:
        block_type = self.block_type
        assert block_type is not None, self.name
        rows, columns = _spans(self.shape, dim, start, stop)
        n_blocks = (columns.stop - columns.start) // BLOCK
        blocks = torch.empty(rows.stop - rows.start, n_blocks * block_type.size, dtype=torch.uint8)
        largest = error = 0.0
        for part in _chunks(rows, columns):
            made, part_largest, part_error = self._blocks(part, columns, block_type)
            blocks[part.start - rows.start : part.stop - rows.start] = made
            largest, error = max(largest, part_largest), max(error, part_error)
        return blocks, error / largest if largest else 0.0

    def _values(self, rows: slice, columns: slice) -> Tensor:
        codes, scales, zeros = self._fields(rows, columns)
        return codes.float().sub_(zeros.float()).mul_(scales)

    def _blocks(self, rows: slice, columns: slice, block_type: BlockType) -> tuple[Tensor, float, float]:
        codes, scales, zeros = self._fields(rows, columns)
        codes = codes.unflatten(1, (-1, BLOCK))
        numbers = scales[:, ::BLOCK].unsqueeze(-1)  # (rows, n_blocks, 1)
        n_codes = 1 << self.bits
        if self.symmetric:
            largest = numbers.abs() * (n_codes / 2)
        else:
            # From the top where the zero point is nearer to it: a smaller minimum is rounded less.
            largest, zeros = numbers.abs() * (n_codes - 1), zeros[:, ::BLOCK].unsqueeze(-1)
            from_top = zeros > n_codes // 2
            codes = torch.where(from_top, n_codes - 1 - codes, codes)
            numbers = torch.where(from_top, -numbers, numbers)
            numbers = torch.cat([numbers, -numbers * torch.where(from_top, n_codes - 1 - zeros, zeros)], dim=-1)
        halves = numbers.half()
        if not bool(halves.isfinite().all()):
            raise ValueError(
                f"{self.name} has scales up to {numbers.abs().max():g}, which {block_type.name} cannot hold"
            )
        wrong = halves.double() - numbers.double()
        if self.symmetric:
            error = wrong.abs() * (n_codes / 2)
        else:
            error = torch.maximum(wrong[..., 1].abs(), (wrong[..., 1] + (n_codes - 1) * wrong[..., 0]).abs())
        if self.bits == 8:
            codes = codes ^ 128  # Q8_0's codes have a sign
        made = put_together(BlockFields(codes, halves, None), block_type).flatten(1)
        if not made.numel():
            return made, 0.0, 0.0
        return made, float(largest.max()), float(error.max())

    def _fields(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, and the fp32 scale and zero point of each: (rows, columns)."""
        codes = self.layout.codes(self.parts, rows, columns, self.bits)
        scales = self.layout.scales(self.parts, rows).float()
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{self.name} has scales that are not finite: download it again")
        middle = 1 << self.bits - 1
        zeros = torch.full_like(scales, middle, dtype=torch.uint8)
        if self.layout.zeros is not None:
            zeros = self.layout.zeros(self.parts, rows, self.bits)
            if self.symmetric and bool((zeros != middle).any()):
                raise ValueError(
                    f"{self.name} has zero points beside {middle}, its quantization_config says that it is symmetric: "
                    "they do not belong together"
                )
        if self.group_of is None:
            group_of = torch.arange(columns.start, columns.stop) // self.group_size
        else:
            group_of = self.group_of[columns]
        scales, zeros = scales[:, group_of], zeros[:, group_of]
        if bool(((scales == 0) & (codes != zeros)).any()):
            raise ValueError(f"{self.name} has scales of 0, whose codes are not: download it again")
        return codes, scales, zeros


@dataclass(frozen=True)
class FloatMatrix:
    """A matrix that is floats once it is decoded: small floats with scales, or codes in a table.

    Raise ValueError, while it is read, for values that are not finite.
    """

    name: str  # for messages
    parts: Parts
    shape: tuple[int, int]
    kind: str
    decode: Callable[[Parts, tuple[int, int], slice], Tensor]  # fp32 (rows, in)
    block_type = None

    def values(self, dim: int, start: int, stop: int) -> Tensor:
        return _in_turn(self.shape, dim, start, stop, self._values)

    def blocks(self, dim: int, start: int, stop: int) -> tuple[Tensor, float]:
        raise AssertionError(self.kind)

    def _values(self, rows: slice, columns: slice) -> Tensor:
        values = self.decode(self.parts, self.shape, rows)[:, columns]
        if not bool(values.isfinite().all()):
            raise ValueError(f"{self.name} has values or scales that are not finite: download it again")
        return values


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


def _spans(shape: tuple[int, int], dim: int, start: int, stop: int) -> tuple[slice, slice]:
    spans = [slice(0, size) for size in shape]
    spans[dim] = slice(start, stop)
    return spans[0], spans[1]


def _chunks(rows: slice, columns: slice) -> list[slice]:
    step = max(1, DECODED_AT_ONCE // max(1, columns.stop - columns.start))
    return [slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]


def _in_turn(shape: tuple[int, int], dim: int, start: int, stop: int, read: Callable[[slice, slice], Tensor]) -> Tensor:
    """Return what `read` returns of rows and columns, a few rows at once; columns begin between words and blocks."""
    rows, columns = _spans(shape, dim, start, stop)
    values = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
    wider = slice(columns.start // BLOCK * BLOCK, min(-(-columns.stop // BLOCK) * BLOCK, shape[1]))
    for part in _chunks(rows, wider):
        read_part = read(part, wider)[:, columns.start - wider.start : columns.stop - wider.start]
        values[part.start - rows.start : part.stop - rows.start] = read_part
    return values
