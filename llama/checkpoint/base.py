"""Define what a checkpoint offers, whatever its format: the architecture, and whole tensors under Meta's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llama.checkpoint.family import Family
from llama.checkpoint.names import DERIVED, UNNEEDED, NamingScheme, StoredT, module_name
from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES, F8_E4M3, QUANTIZE, BlockType
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

# The dimension along which ranks, and Meta's shards, split a module's weight; others are whole everywhere.
# Norms of queries and keys are whole, too, where they are of a head: see `llama.checkpoint.load`.
SHARD_DIM = {
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "q_norm": 0,
    "k_norm": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
}

# The block type that each module's weight gets with --quantize. Tables of tokens stay at 8 bits: each choice of a
# token depends on all their rows.
QUANTIZED = {
    mode: {module: BLOCK_TYPES["Q8_0" if module in ("tok_embeddings", "output") else name] for module in SHARD_DIM}
    for mode, name in QUANTIZE.items()
} | {"fp8": dict.fromkeys(SHARD_DIM, F8_E4M3)}

# What weights may be stored in where they are not blocks, under the names of both safetensors and GGUF.
WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Pages of a mapped file that were read count as the process's memory until the file is closed.
READ_BEFORE_REOPENING = 1 << 28  # bytes

COMPARED_AT_ONCE = 1 << 20  # values of each of two matrices

# What `read` returns: contiguous memory of a mapped file, columns of one, or memory of its own.
Reading = Literal["zero_copy", "strided", "copy"]

# What is told the bytes of each piece that has been read or written.
Progress = Callable[[int], object]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def shard_dim(name: str) -> int | None:
    """Return the dimension along which ranks split a tensor, or None where each has the whole.

    Norms are whole, and so are the biases of linears whose inputs are split.
    """
    dim = SHARD_DIM.get(module_name(name))
    return None if dim == 1 and name.endswith(".bias") else dim


def quantized_type(name: str, shape: tuple[int, ...], mode: str) -> BlockType | None:
    """Return the block type that a whole tensor gets with --quantize `mode`.

    Return None where it stays in floats: norms, biases, and weights whose rows are not whole blocks.
    """
    block_type = QUANTIZED[mode].get(module_name(name))
    fits = block_type is not None and len(shape) == 2 and shape[1] % block_type.elements == 0
    return block_type if fits else None


def needed(path: Path, tensors: Mapping[str, StoredT]) -> dict[str, StoredT]:
    """Return the tensors of a checkpoint, by their names there, without those that inference does not use.

    Log those that are left out, except what is computed here and lies in released files.
    """
    left_out = [name for name in tensors if UNNEEDED.fullmatch(name) and not DERIVED.fullmatch(name)]
    if left_out:
        log.info("%s has tensors that are not used: %s", path, some_of(left_out))
    return {name: tensor for name, tensor in tensors.items() if not UNNEEDED.fullmatch(name)}


def some_of(names: Collection[str], most: int = 3) -> str:
    """Return the first names of many, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def positive_int(value: object) -> int | None:
    """Return a value of a file's metadata if it is a positive integer, else None."""
    return value if type(value) is int and value > 0 else None


def read_in_turn(names: Iterable[str], reopen: Callable[[], Callable[[str], Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield names with their whole tensors, and open the files anew now and then so that read pages leave the memory.

    reopen: opens the files and returns what reads one tensor of them.
    """
    read, n_bytes = reopen(), 0
    for name in names:
        if n_bytes > READ_BEFORE_REOPENING:
            read, n_bytes = reopen(), 0
        tensor = read(name)
        n_bytes += tensor.nbytes
        yield name, tensor
        del tensor


def same_matrix(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Return whether two matrices of the same shape are equal; read no further than the first rows that differ."""
    n_rows, n_columns = checkpoint.shape(a)
    step = max(1, COMPARED_AT_ONCE // n_columns)
    parts = ((first, min(first + step, n_rows)) for first in range(0, n_rows, step))
    return all(torch.equal(checkpoint.read(a, 0, *part), checkpoint.read(b, 0, *part)) for part in parts)


class Checkpoint(Protocol):
    """Offer an opened checkpoint. Opening one reads headers only; it raises ValueError for wrong or broken files."""

    @property
    def path(self) -> Path: ...

    @property
    def naming(self) -> NamingScheme:
        """Return how the files name tensors, for messages: inside this package they have Meta's names."""
        ...

    @property
    def args(self) -> ModelArgs:
        """Return the architecture; its vocab_size is -1 where the files leave it to the tokenizer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return what the weights are stored in; bfloat16 for quantized blocks, which stand for no dtype."""
        ...

    @property
    def family(self) -> Family:
        """Return what the model is one of, and how its files name and order what they hold."""
        ...

    @property
    def is_quantized(self) -> bool:
        """Tell whether any matrix is stored in blocks."""
        ...

    @property
    def context_len(self) -> int | None:
        """Return how many tokens of context the files say that the model was trained for, if they say it."""
        ...

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Return ids that end a generation by the model's own configuration, beside those that the tokenizer knows."""
        ...

    @property
    def pads_vocab(self) -> bool:
        """Tell whether the embedding may have more rows than the tokenizer has tokens, as in Hugging Face's folders."""
        ...

    @property
    def tokenizer_metadata(self) -> Mapping[str, Any] | None:
        """Return the tokenizer as keys of GGUF's metadata; None where it lies in files beside the weights."""
        ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor, however many files it is spread over."""
        ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Return indices [start, stop) along `dim` of a tensor, on the CPU; a view of the mapped file if possible."""
        ...

    def stored_as(self, name: str) -> str:
        """Return what a tensor is stored in, for people: a dtype or a block type, run as it is or not."""
        ...

    def block_type(self, name: str) -> BlockType | None:
        """Return the block type of a tensor; None where it is floats, or blocks of no type of BLOCK_TYPES."""
        ...

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Return what `read` would decode, but for `rounding`, of a tensor that has a block type.

        They are uint8 (rows, row_bytes).

        start and stop count rows or, along dim 1, values: multiples of the type's `elements`.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer inside or beside the weights; raise FileNotFoundError when there is none."""
        ...


class StoredCheckpoint(Checkpoint, Protocol):
    """Offer a checkpoint that lies in files; there is one class per format."""

    @property
    def model_name(self) -> str:
        """Return what the files call the model, empty where they do not say."""
        ...

    @property
    def factors(self) -> Mapping[str, float]:
        """Return by module what is multiplied as weights are read, where the model's multipliers are folded."""
        ...

    @property
    def rounding(self) -> float:
        """Return the largest error of the blocks read so far that the files have in another form, as a share.

        It is one of the largest value of their matrix. Where blocks are stored, and where floats are read, it is 0.
        """
        ...

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        """Return the dtype that `read` would return, and where its memory is; read nothing."""
        ...

    def release(self, name: str) -> None:
        """Let a tensor's pages leave this process's memory; who reads it again, or a view of it, gets them again."""
        ...
