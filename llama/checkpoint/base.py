"""What a checkpoint offers, whatever its format: the architecture, and whole tensors under Meta's names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES, F8_E4M3, QUANTIZE, BlockType
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

# The block type that each kind of weight gets with --quantize. Tables of tokens stay at 8 bits: each choice of a token
# depends on all their rows.
QUANTIZED = {
    mode: {kind: BLOCK_TYPES["Q8_0" if kind in ("tok_embeddings", "output") else name] for kind in SHARD_DIM}
    for mode, name in QUANTIZE.items()
} | {"fp8": dict.fromkeys(SHARD_DIM, F8_E4M3)}

# What weights may be stored in, where they are not blocks.
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def module_name(name: str) -> str:
    """What a tensor is, whatever its layer: "layers.3.attention.wq.weight" -> "wq"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shard_dim(name: str) -> int | None:
    """Along which dimension ranks split a tensor; None: whole everywhere, as are norms and biases of split inputs."""
    dim = SHARD_DIM.get(module_name(name))
    return None if dim == 1 and name.endswith(".bias") else dim


def quantized_type(name: str, shape: tuple[int, ...], mode: str) -> BlockType | None:
    """The block type of a whole tensor with --quantize `mode`.

    None where it stays in floats: norms, biases, and weights whose rows are not whole blocks.
    """
    block_type = QUANTIZED[mode].get(module_name(name))
    whole = block_type is not None and len(shape) == 2 and shape[1] % block_type.elements == 0
    return block_type if whole else None


# What a read tensor is: contiguous memory of a mapped file, columns of one, or memory that reading takes.
Reading = Literal["zero_copy", "strided", "copy"]


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

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a generation by the model's own configuration, beside those that the tokenizer knows."""
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


class StoredCheckpoint(Checkpoint, Protocol):
    """A checkpoint that lies in files."""

    @property
    def pads_vocab(self) -> bool:
        """Whether the embedding may have more rows than the tokenizer has tokens, as folders of this format do."""
        ...

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        """The dtype that `read` gives, and where from; nothing is read."""
        ...

    def stored_as(self, name: str) -> str:
        """What a tensor is stored in, for people: a dtype, or the name of a block type, kept or not."""
        ...

    def block_type(self, name: str) -> BlockType | None:
        """What a tensor is stored in; None where it is floats, or blocks of a type that is not run as it is."""
        ...

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """What `read` would decode: uint8 (rows, row_bytes); only for tensors that have a block type.

        start and stop count rows or, on dim 1, values: multiples of the type's `elements`.
        """
        ...
