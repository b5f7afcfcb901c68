"""The paged key/value cache, and the tokens of one forward pass with the pages that their rows read and write.

Knows nothing of the model, nor of which sequence holds which page: that is the engine's (engine/page_pool.py).
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Positions of a page: see D54. The CPU kernels' parts of 256 keys are whole pages.
PAGE_SIZE = 16


def pages_for(n_tokens: int) -> int:
    """Return the number of pages that hold n_tokens positions."""
    return -(-n_tokens // PAGE_SIZE)


class KVCache:
    """Keys and values of every layer, in pages of PAGE_SIZE positions.

    keys, values: (n_layers, n_pages, PAGE_SIZE, n_kv_heads, head_dim). A position that was not written yet has any
    finite value, and attention masks it. A slot is a position of a page, counted over all pages. On a CPU, memory is
    committed only when it is written, and can be given back.

    pages_per_row: of a cache that is used without an engine, the pages of each row, one row below another.
    """

    def __init__(
        self,
        n_layers: int,
        n_pages: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pages_per_row: int | None = None,
    ) -> None:
        shape = (n_layers, n_pages, PAGE_SIZE, n_kv_heads, head_dim)
        self._mapped: list[mmap.mmap] = []  # what keys and values are in, on a CPU
        # Zeros, because a masked position still meets a zero weight, and 0 * NaN is NaN.
        self.keys, self.values = (self._zeros(shape, device, dtype) for _ in range(2))
        self.pages_per_row = pages_per_row or n_pages

    def _zeros(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return zeros on a device: on a CPU, pages of the system that do not exist before they are written."""
        if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.zeros(shape, device=device, dtype=dtype)
        n_bytes = max(1, math.prod(shape) * dtype.itemsize)
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The system may be set to take 2 MB where the first byte is written: of each layer, as it has pages apart.
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._mapped.append(memory)
        return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)

    def discard(self, start: int, stop: int) -> None:
        """Give the memory of pages [start, stop) back to the system, where it is committed when it is written."""
        n_layers, n_pages = self.keys.shape[:2]
        size = self.keys.nbytes // (n_layers * n_pages)
        for memory in self._mapped:
            for layer in range(n_layers):
                first, last = ((layer * n_pages + page) * size for page in (start, stop))
                first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (n_tokens, n_kv_heads, head_dim) in a layer's slots (n_tokens,)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def copy_page(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of page `source` over page `target`."""
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]

    def grow(self, n_pages: int, n_written: int) -> None:
        """Enlarge the cache to n_pages pages, the first n_written of which keep their content."""
        self._mapped = []
        for name in ("keys", "values"):  # one after the other, so that the old keys are freed before values are copied
            old: Tensor = getattr(self, name)
            new = self._zeros((old.shape[0], n_pages, *old.shape[2:]), old.device, old.dtype)
            new[:, :n_written] = old[:, :n_written]
            setattr(self, name, new)
            del old

    @property
    def n_pages(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class RowGroup:
    """Rows of a forward pass, one after another, that have equally many tokens each."""

    rows: slice
    tokens: slice  # of all rows together
    n_rows: int
    seqlen: int
    kv_len: int  # positions of the longest row, the new ones included; an upper bound where the host does not know
    # The first row's first page, and the pages from one row's first to the next row's, where the pages of each row
    # follow each other; else None.
    run: tuple[int, int] | None
    from_start: bool  # whether all rows begin at position 0


@dataclass(frozen=True)
class ForwardBatch:
    """Where the tokens of one forward pass are: their positions, and the pages of the rows that they belong to.

    positions: (n_tokens,), int64, row after row.
    page_table: (at least n_rows, pages), int32: the pages of each row in order; any page beyond its length.
    lengths: (n_tokens,), int64: of each token, the length of the text by which dynamic scaling stretches its rotation;
    None: each token ends a text.
    """

    cache: KVCache
    positions: Tensor
    page_table: Tensor
    groups: tuple[RowGroup, ...]
    lengths: Tensor | None = None

    @staticmethod
    def of(
        cache: KVCache,
        page_table: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        first_pages: Sequence[int | None],
        lengths: Tensor | None = None,
    ) -> ForwardBatch:
        """Make a batch of rows that have counts[i] new tokens from position starts[i] on.

        first_pages: each row's first page if all its pages follow each other, else None.
        """
        device = page_table.device
        if all(count == 1 for count in counts):
            positions = torch.tensor(starts, dtype=torch.int64, device=device)
        else:
            pieces = [torch.arange(start, start + n, device="cpu") for start, n in zip(starts, counts, strict=True)]
            positions = torch.cat(pieces).to(device)
        groups, row, token = [], 0, 0
        while row < len(counts):
            stop, start, seqlen = row + 1, starts[row], counts[row]
            while stop < len(counts) and counts[stop] == seqlen and (seqlen == 1 or starts[stop] == start):
                stop += 1
            n_rows = stop - row
            groups.append(
                RowGroup(
                    slice(row, stop),
                    slice(token, token + n_rows * seqlen),
                    n_rows,
                    seqlen,
                    max(starts[row:stop]) + seqlen,
                    _run(first_pages[row:stop]),
                    not any(starts[row:stop]),
                )
            )
            row, token = stop, token + n_rows * seqlen
        return ForwardBatch(cache, positions, page_table, tuple(groups), lengths)

    @staticmethod
    def of_rows(cache: KVCache, start_pos: Tensor, seqlen: int) -> ForwardBatch:
        """Make a batch of `seqlen` tokens for each of the first rows of a cache, from start_pos (bsz,) on."""
        bsz, per_row = len(start_pos), cache.pages_per_row
        first_pages = range(0, bsz * per_row, per_row)
        table = torch.arange(bsz * per_row, dtype=torch.int32, device=start_pos.device).view(bsz, per_row)
        starts: list[int] = start_pos.tolist()
        # One position further would be the next row's first.
        assert max(starts) + seqlen <= per_row * PAGE_SIZE and bsz * per_row <= cache.n_pages, (starts, seqlen)
        lengths = (start_pos + seqlen).repeat_interleave(seqlen)
        return ForwardBatch.of(cache, table, starts, [seqlen] * bsz, list(first_pages), lengths)

    @staticmethod
    def of_steps(cache: KVCache, start_pos: Tensor, seqlen: int, page_table: Tensor) -> ForwardBatch:
        """Make a batch of `seqlen` tokens for each row from start_pos (rows,) on, without asking the device for it."""
        rows, n_tokens = len(start_pos), len(start_pos) * seqlen
        positions = (start_pos[:, None] + torch.arange(seqlen, device=start_pos.device)).flatten()
        kv_len = page_table.shape[1] * PAGE_SIZE
        group = RowGroup(slice(0, rows), slice(0, n_tokens), rows, seqlen, kv_len, None, False)
        return ForwardBatch(cache, positions, page_table, (group,))

    def next_positions(self) -> ForwardBatch:
        """Return the batch of the step after this one, of one group, whose rows have a token each."""
        (group,) = self.groups
        later = replace(group, kv_len=group.kv_len + 1, from_start=False)
        batch = ForwardBatch(self.cache, self.positions + 1, self.page_table, (later,))
        batch.__dict__["rows"] = self.rows  # which a cached_property has found already
        return batch

    @cached_property
    def rows(self) -> Tensor:
        """The row of each token: (n_tokens,), int32."""
        device = self.page_table.device
        parts = [
            torch.arange(group.rows.start, group.rows.stop, dtype=torch.int32, device=device)
            .repeat_interleave(group.seqlen, output_size=group.n_rows * group.seqlen)
            for group in self.groups
        ]  # fmt: skip
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each token: (n_tokens,), int64."""
        pages = self.page_table[self.rows.long(), self.positions // PAGE_SIZE].long()
        return pages * PAGE_SIZE + self.positions % PAGE_SIZE

    def read(self, layer: int, group: RowGroup) -> tuple[Tensor, Tensor]:
        """Return a group's keys and values, each (n_rows, kv_len, n_kv_heads, head_dim): views, if its pages allow."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        kv_len = group.kv_len
        if group.run is not None:
            first, step = group.run
            if (first + (group.n_rows - 1) * step) * PAGE_SIZE + kv_len <= keys.shape[0] * PAGE_SIZE:
                return self._view(keys, group, first, step), self._view(values, group, first, step)
        pages = self.page_table[group.rows, : pages_for(kv_len)].long()
        return keys[pages].flatten(1, 2)[:, :kv_len], values[pages].flatten(1, 2)[:, :kv_len]

    def _view(self, pages: Tensor, group: RowGroup, first: int, step: int) -> Tensor:
        """Return the positions of a group whose pages follow each other in pages (n_pages, PAGE_SIZE, ...)."""
        shape, strides = pages.shape[1:], pages.stride()
        return pages.as_strided(
            (group.n_rows, group.kv_len, *shape[1:]),
            (step * strides[0], *strides[1:]),
            pages.storage_offset() + first * strides[0],
        )


def _run(first_pages: Sequence[int | None]) -> tuple[int, int] | None:
    """Return the first row's first page and the step to the next row's, if all rows are equally far apart."""
    known = [page for page in first_pages if page is not None]
    if len(known) < len(first_pages):
        return None
    steps = {other - one for one, other in itertools.pairwise(known)} or {0}
    step = steps.pop()
    return (known[0], step) if not steps and step >= 0 else None
