"""Matrices of quantized releases: GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8, MXFP4; their values, and blocks.

Knows no names of tensors (see released_layouts.py), and nothing of files, configurations or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockFields, BlockType
from llama.quantization.packing import put_together
from llama.quantization.released_layouts import IntegerLayout, Parts

DECODED_AT_ONCE = 1 << 21  # values; their temporaries take some 20 MB
BLOCK = 32  # values in each of the block types that a release may become

# The block type that groups of so many bits are, value for value, without zero points and with them.
SYMMETRIC_TYPES = {4: BLOCK_TYPES["Q4_0"], 5: BLOCK_TYPES["Q5_0"], 8: BLOCK_TYPES["Q8_0"]}
ASYMMETRIC_TYPES = {4: BLOCK_TYPES["Q4_1"]}


class ReleasedMatrix(Protocol):
    """Offer a matrix (out, in) whose values no single tensor has."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def first_row(self) -> int:
        """Return which row of the tensors is the first one: fused matrices are several of these."""
        ...

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

    def __getitem__(self, rows: slice) -> ReleasedMatrix:
        """Return a part of the matrix, of rows one after another, as if it was a tensor; read nothing."""
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
    first_row: int = 0

    def __getitem__(self, rows: slice) -> IntegerMatrix:
        return _rows_of(self, rows)

    @property
    def block_type(self) -> BlockType | None:
        whole = self.group_of is None and self.group_size % BLOCK == 0 and self.shape[1] % BLOCK == 0
        return (SYMMETRIC_TYPES if self.symmetric else ASYMMETRIC_TYPES).get(self.bits) if whole else None

    def values(self, dim: int, start: int, stop: int) -> Tensor:
        return _in_turn(self, dim, start, stop, self._values)

    def blocks(self, dim: int, start: int, stop: int) -> tuple[Tensor, float]:
        block_type = self.block_type
        assert block_type is not None, self.name
        rows, columns = _spans(self, dim, start, stop)
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
        return codes.float().sub_(zeros).mul_(scales).flatten(1)

    def _blocks(self, rows: slice, columns: slice, block_type: BlockType) -> tuple[Tensor, float, float]:
        codes, numbers, zeros = self._fields(rows, columns)
        n_codes = 1 << self.bits
        if self.symmetric:
            largest = numbers.abs() * (n_codes / 2)
        else:
            # From the top where the zero point is nearer to it: a smaller minimum is rounded less.
            largest = numbers.abs() * (n_codes - 1)
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
        """Return codes (rows, n, columns / n), and the fp32 scale and zero point of each run of these: (rows, n, 1)."""
        codes = self.layout.codes(self.parts, rows, columns, self.bits)
        if self.layout.has_room and bool((codes >> self.bits).any()):
            raise ValueError(f"{self.name} has codes of more than {self.bits} bits: download it again")
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
        in_runs = self.group_of is None and self.group_size % BLOCK == self.shape[1] % BLOCK == 0
        run = BLOCK if in_runs else 1
        if self.group_of is None:
            group_of = torch.arange(columns.start, columns.stop, run) // self.group_size
        else:
            group_of = self.group_of[columns]
        codes = codes.unflatten(1, (-1, run))
        scales, zeros = scales[:, group_of].unsqueeze(-1), zeros[:, group_of].unsqueeze(-1)
        if bool((scales == 0).any()) and bool(((scales == 0) & (codes != zeros)).any()):
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
    first_row: int = 0
    block_type = None

    def __getitem__(self, rows: slice) -> FloatMatrix:
        return _rows_of(self, rows)

    def values(self, dim: int, start: int, stop: int) -> Tensor:
        return _in_turn(self, dim, start, stop, self._values)

    def blocks(self, dim: int, start: int, stop: int) -> tuple[Tensor, float]:
        raise AssertionError(self.kind)

    def _values(self, rows: slice, columns: slice) -> Tensor:
        values = self.decode(self.parts, self.shape, rows)[:, columns]
        if not bool(values.isfinite().all()):
            raise ValueError(f"{self.name} has values or scales that are not finite: download it again")
        return values


def _spans(matrix: ReleasedMatrix, dim: int, start: int, stop: int) -> tuple[slice, slice]:
    """Return the rows, as the tensors count them, and columns of indices [start, stop) along `dim`."""
    spans = [slice(0, size) for size in matrix.shape]
    spans[dim] = slice(start, stop)
    rows, columns = spans
    return slice(matrix.first_row + rows.start, matrix.first_row + rows.stop), columns


def _chunks(rows: slice, columns: slice) -> list[slice]:
    step = max(1, DECODED_AT_ONCE // max(1, columns.stop - columns.start))
    return [slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]


def _in_turn(matrix: ReleasedMatrix, dim: int, start: int, stop: int, read: Callable[[slice, slice], Tensor]) -> Tensor:
    """Return what `read` returns of rows and columns, a few rows at once; columns begin between words and blocks."""
    rows, columns = _spans(matrix, dim, start, stop)
    values = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
    wider = slice(columns.start // BLOCK * BLOCK, min(-(-columns.stop // BLOCK) * BLOCK, matrix.shape[1]))
    for part in _chunks(rows, wider):
        read_part = read(part, wider)[:, columns.start - wider.start : columns.stop - wider.start]
        values[part.start - rows.start : part.stop - rows.start] = read_part
    return values


def _rows_of(matrix: MatrixT, rows: slice) -> MatrixT:
    """Return a part of a matrix, of rows one after another; nothing is read."""
    start, stop, step = rows.indices(matrix.shape[0])
    assert step == 1, rows
    return replace(matrix, first_row=matrix.first_row + start, shape=(max(0, stop - start), matrix.shape[1]))


MatrixT = TypeVar("MatrixT", IntegerMatrix, FloatMatrix)
