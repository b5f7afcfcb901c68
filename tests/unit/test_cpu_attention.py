"""Attention by the CPU kernels is a softmax of all keys that a query sees, for each token on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama.backends.cpu import ops as kernels
from llama.backends.cpu import structures
from llama.backends.cpu.build import library
from llama.cache import PAGE_SIZE

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


class Rows:
    """Rows of a cache in scattered pages, with tokens at [starts[i], starts[i] + counts[i]) of each."""

    def __init__(
        self,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        starts: list[int],
        counts: list[int],
        window: int = 0,
        chunk: int = 0,
    ) -> None:
        torch.manual_seed(1)
        self.heads, self.head_dim, self.dtype, self.window, self.chunk = heads, head_dim, dtype, window, chunk
        self.stops = [start + n for start, n in zip(starts, counts, strict=True)]
        per_row = max(self.stops) // PAGE_SIZE + 1
        self.table = torch.randperm(len(starts) * per_row).int().view(len(starts), per_row)
        shape = (1, self.table.numel(), PAGE_SIZE, heads[1], head_dim)
        self.keys, self.values = (torch.randn(shape).to(dtype) for _ in range(2))
        for row, stop in enumerate(self.stops):
            for position in range(stop, per_row * PAGE_SIZE):  # what was never written may be anything
                for cached in (self.keys, self.values):
                    cached[0, self.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = float("nan")
        self.positions = torch.cat([torch.arange(*span) for span in zip(starts, self.stops, strict=True)])
        self.rows = torch.arange(len(starts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        self.q = torch.randn(len(self.rows), heads[0] * head_dim).to(dtype)

    def attend(self, tokens: slice, threads: int = 1) -> Tensor:
        positions, rows, y = self.positions[tokens].clone(), self.rows[tokens].clone(), self.q[tokens].clone()
        read = {
            "positions": positions,
            "rows": rows,
            "page_table": self.table,
            "keys": self.keys,
            "values": self.values,
        }
        addresses = kernels.pointers(*((tensor, tensor.dtype, tensor.numel()) for tensor in read.values()))
        inputs = structures.LayersInput(
            n_tokens=len(rows),
            n_rows=self.table.shape[0],
            pages_per_row=self.table.shape[1],
            n_pages=self.table.numel(),
            n_heads=self.heads[0],
            n_kv_heads=self.heads[1],
            head_dim=self.head_dim,
            cache_type=structures.FLOAT_TYPE_IDS[self.dtype],
            threads=threads,
            **dict(zip(read, addresses, strict=True)),
        )
        layers = (structures.Layer * 1)()
        layers[0].sight = structures.SightView(self.window, self.chunk)
        kernels.attend(layers, 0, inputs, y)
        return y

    def expected(self) -> Tensor:
        """The same in fp64: (n_tokens, n_heads * head_dim)."""
        n_heads, n_kv_heads = self.heads
        parts = []
        for row, stop in enumerate(self.stops):
            tokens = self.rows == row
            k, v = (
                cached[0][self.table[row].long()]
                .flatten(0, 1)[:stop]
                .double()
                .repeat_interleave(n_heads // n_kv_heads, 1)
                for cached in (self.keys, self.values)
            )
            scores = torch.einsum("qhd,khd->hqk", self.q[tokens].double().unflatten(1, (n_heads, -1)), k)
            queries, seen = self.positions[tokens, None], torch.arange(stop)
            hidden = seen > queries
            if self.window:
                hidden |= seen <= queries - self.window
            if self.chunk:
                hidden |= seen < queries // self.chunk * self.chunk
            weights = (scores / self.head_dim**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        return torch.cat(parts)


# Heads, head_dim, starts and counts of rows; a window, and a chunk.
CASES: dict[str, tuple[Any, ...]] = {
    "one head a group": ((4, 4), 64, [0, 250], [70, 37]),
    "three": ((6, 2), 64, [0, 250], [70, 37]),
    "four": ((8, 2), 128, [500], [33]),
    "eight": ((16, 2), 80, [0, 509], [20, 9]),
    "heads of 2": ((4, 2), 2, [0, 500], [33, 45]),
    "heads of 10": ((4, 2), 10, [0, 500], [33, 45], 9),
    "heads of 96": ((4, 2), 96, [255], [3]),
    "heads of 100": ((4, 2), 100, [0, 300], [33, 45]),
    "window": ((8, 2), 64, [700], [70], 300),
    "chunk": ((8, 2), 64, [0, 700], [70, 70], 0, 300),
    "chunks within a block": ((8, 4), 32, [250, 40], [70, 20], 0, 7),
    "window and chunk": ((8, 2), 64, [500, 256], [70, 30], 100, 270),
    "many rows": ((8, 2), 64, [0, 1, 2, 300, 5, 511, 512], [1, 3, 1, 1, 20, 1, 1]),
}
# Of the largest value: fp32's and fp16's results are those of fp32 sums, and weights in bf16 are rounded to it.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_a_softmax_over_the_keys_that_are_seen(name: str, dtype: torch.dtype) -> None:
    heads, head_dim, *spans = CASES[name]
    rows = Rows(heads, head_dim, dtype, *spans)
    expected = rows.expected()
    error = (rows.attend(slice(None)).double() - expected).abs().max()
    assert error <= BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_may_be_cut_anywhere(name: str, dtype: torch.dtype) -> None:
    """Attention of long chunks was torch's once, whose bits depend on the chunk and on the number of threads."""
    heads, head_dim, *spans = CASES[name]
    rows = Rows(heads, head_dim, dtype, *spans)
    together, n = rows.attend(slice(None)), len(rows.q)
    for size in (1, 7, n - 1):
        parts = [rows.attend(slice(first, first + size), threads=2) for first in range(0, n, size)]
        assert torch.equal(torch.cat(parts), together), size
