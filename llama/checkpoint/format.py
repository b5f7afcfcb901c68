"""What a checkpoint offers, whatever its format: the architecture, and whole tensors under Meta's names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llama.config import ModelArgs
from llama.tokenizer import Tokenizer

# The dimension along which ranks, and Meta's shards, split a tensor; the others (norms) are whole everywhere.
SHARD_DIM = {
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
}


def kind(name: str) -> str:
    """What a tensor is, whatever its layer: "layers.3.attention.wq.weight" -> "wq"."""
    return name.removesuffix(".weight").rpartition(".")[2]


class Checkpoint(Protocol):
    """An opened checkpoint; opening reads headers only. Wrong or broken files raise ValueError."""

    @property
    def path(self) -> Path: ...

    @property
    def args(self) -> ModelArgs:
        """The architecture; its vocab_size is -1 when the file leaves it to the tokenizer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in; bfloat16 for quantized blocks, which stand for no dtype."""
        ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor, however many files hold it."""
        ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) along `dim` of a tensor, on the CPU; a view of the mapped file where that is possible."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer inside or beside the weights; FileNotFoundError when there is none."""
        ...
