"""Read params.json with Meta's consolidated.00.pth to consolidated.NN.pth, each with slices of every tensor.

Mistral's own folders have consolidated.safetensors instead, and are read as one shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.base import SHARD_DIM, WEIGHT_DTYPES, Reading, dtype_name, needed
from llama.checkpoint.families import FAMILIES
from llama.checkpoint.llama4_shards import as_llamas
from llama.checkpoint.lora import LowRankPair
from llama.checkpoint.mapped_file import Layouts, MappedMemory, map_folder
from llama.checkpoint.meta_releases import find_adapters, find_meta_matrices
from llama.checkpoint.names import NamingScheme, module_name
from llama.checkpoint.params_json import RELEASE_KEYS, read_params
from llama.checkpoint.torch_pickle import map_pickle
from llama.config import read_json_object
from llama.quantization.gguf_blocks import BlockType
from llama.quantization.released import ReleasedMatrix
from llama.tokenizer import Tokenizer

# What Mistral's own folders have in place of shards: whole tensors under Meta's names, in Meta's order.
MISTRAL_LAYOUTS: Layouts = (("consolidated.safetensors", "consolidated.safetensors.index.json"),)


class MetaCheckpoint:
    """Read a folder of Meta shards, or Mistral's. Files are mapped; pickles that would run code are refused.

    One shard may be a quantized release: see D79. `pairs` are adapters that lie in it, by the matrices they add to.
    """

    naming: NamingScheme = "meta"
    family = FAMILIES["llama"]
    factors: Mapping[str, float] = {}
    pads_vocab = False
    model_name = ""
    context_len = None
    tokenizer_metadata = None
    stop_tokens: frozenset[int] = frozenset()

    def __init__(self, folder: Path) -> None:
        self.path = folder
        params = folder / "params.json"
        if not params.is_file():
            raise FileNotFoundError(f"{folder} has consolidated weights but no params.json: copy it there as well")
        args = read_params(params)
        files = _shard_files(folder)
        shards = [map_pickle(file) for file in files] if files else [map_folder(folder, MISTRAL_LAYOUTS)]
        self._mapped = MappedMemory()
        self._shards = [needed(folder, shard) for shard in shards]
        if args.experts is not None and args.experts.router == "sigmoid of input":
            self._shards = [as_llamas(folder, shard, args) for shard in self._shards]
        self._matrices, self.pairs, self.rounding = *self._find_release(read_json_object(params)), 0.0
        self.is_quantized = any(matrix.block_type for matrix in self._matrices.values())
        self._check_shards()
        self.args = dataclasses.replace(args, tied_embeddings="output.weight" not in self.names())
        self._check_count()
        norm = self._shards[0].get("norm.weight")
        self.dtype = torch.bfloat16 if norm is None or self.is_quantized else norm.dtype

    def names(self) -> Collection[str]:
        return self._shards[0].keys() | self._matrices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._matrices:
            return self._matrices[name].shape
        pieces = self._pieces(name)
        shape = list(pieces[0].shape)
        if len(pieces) > 1:
            shape[self._split_dim(name)] *= len(pieces)
        return tuple(shape)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape(name)[dim] if stop is None else stop
        if name in self._matrices:
            return self._matrices[name].values(dim, start, stop)
        pieces, split_dim = self._pieces(name), self._split_dim(name)
        if len(pieces) > 1 and dim == split_dim:
            return _read_across(pieces, dim, start, stop)
        slices = [piece.narrow(dim, start, stop - start) for piece in pieces]
        return slices[0] if len(slices) == 1 else torch.cat(slices, split_dim)

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        if name in self._matrices:
            return torch.float32, "copy"
        pieces, split_dim = self._pieces(name), self._split_dim(name)
        stop = self.shape(name)[dim] if stop is None else stop
        size = pieces[0].shape[dim]
        if len(pieces) > 1 and (dim != split_dim or start // size < (stop - 1) // size):
            return pieces[0].dtype, "copy"
        is_whole = pieces[0].is_contiguous() and (dim == 0 or stop - start == size)
        return pieces[0].dtype, "zero_copy" if is_whole else "strided"

    def stored_as(self, name: str) -> str:
        return self._matrices[name].kind if name in self._matrices else dtype_name(self.reads_as(name)[0])

    def block_type(self, name: str) -> BlockType | None:
        return self._matrices[name].block_type if name in self._matrices else None

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        blocks, error = self._matrices[name].blocks(dim, start, self.shape(name)[dim] if stop is None else stop)
        self.rounding = max(self.rounding, error)
        return blocks

    def release(self, name: str) -> None:
        matrix = self._matrices.get(name)
        for tensor in matrix.parts.values() if matrix else [shard[name] for shard in self._shards]:
            self._mapped.release(tensor)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path)

    def _find_release(self, params: Mapping[str, Any]) -> tuple[dict[str, ReleasedMatrix], dict[str, LowRankPair]]:
        """Take a quantized release's matrices and adapters, if it is one, out of the only shard."""
        is_release = any(params.get(key) is not None for key in RELEASE_KEYS)
        if is_release and len(self._shards) > 1:
            raise ValueError(f"{self.path} has {len(self._shards)} shards: quantized releases of Meta have one alone")
        pairs = find_adapters(self.path, self._shards[0], params)
        return find_meta_matrices(self.path, self._shards[0], params), pairs

    def _pieces(self, name: str) -> list[Tensor]:
        """Return the shards' slices of a tensor, each once: the first alone where every shard has the whole."""
        pieces = [shard[name] for shard in self._shards]
        if module_name(name) not in SHARD_DIM or pieces[0].dim() < 2:
            return pieces[:1]
        if module_name(name) in ("wk", "wv"):
            # With more shards than KV heads, consecutive shards repeat a head.
            return pieces[:: max(1, len(pieces) // self.args.n_kv_heads)]
        return pieces

    def _split_dim(self, name: str) -> int:
        """Return where the shards split a tensor. Llama 1 and 2 split the embeddings by feature, Llama 3 by token."""
        if module_name(name) == "tok_embeddings" and self._shards[0][name].shape[1] != self.args.dim:
            return 1
        return SHARD_DIM.get(module_name(name), 0)

    def _check_count(self) -> None:
        """Raise ValueError when the last shards are missing: their number is only in shapes (see D4)."""
        query = "layers.0.attention.wq.weight"
        rows = self.shape(query)[0] if query in self.names() and len(self.shape(query)) == 2 else 0
        times, rest = divmod(self.args.n_heads * self.args.head_dim, rows or 1)
        if rows and times > 1 and rest == 0:
            found = len(self._shards)
            raise ValueError(
                f"{self.path} has {found} shard{'s' * (found > 1)}, but its params.json describes {found * times}: "
                f"consolidated.{found:02d}.pth and what follows is missing"
            )

    def _check_shards(self) -> None:
        """Raise ValueError unless all shards have the same tensors, in dtypes that are known."""
        for number, problem in shard_problems(self._shards):
            raise ValueError(f"{self.path}: shards 00 and {number:02d} do not belong together: the latter {problem}")
        for shard in self._shards:
            for name, tensor in shard.items():
                if tensor.dtype not in WEIGHT_DTYPES.values():
                    raise ValueError(f"{self.path}: {name} has dtype {tensor.dtype}, which is not supported")


def shard_problems(shards: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[int, str]]:
    """Yield numbers of shards and what each lacks, or has other than the first."""
    first = shards[0]
    for number, shard in enumerate(shards):
        for name in sorted(first.keys() | shard.keys()):
            if name not in shard:
                yield number, f"lacks {name}"
            elif name not in first:
                yield number, f"has {name}, which shard 00 lacks"
            elif shard[name].shape != first[name].shape:
                yield number, f"has {name} of shape {tuple(shard[name].shape)}, shard 00 of {tuple(first[name].shape)}"


def _read_across(pieces: list[Tensor], dim: int, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of the pieces laid end to end; a view when one piece has them all."""
    size = pieces[0].shape[dim]
    found = []
    for i, piece in enumerate(pieces):
        low, high = max(start - i * size, 0), min(stop - i * size, size)
        if low < high:
            found.append(piece.narrow(dim, low, high - low))
    if not found:
        return pieces[0].narrow(dim, 0, 0)
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _shard_files(folder: Path) -> list[Path]:
    """Return the shards in their order, if there are any; raise ValueError when a number between them is missing."""
    files = sorted(folder.glob("consolidated.*.pth"))
    numbers = [file.name.split(".")[1] for file in files]
    expected = [f"{i:02d}" for i in range(len(files))]
    if numbers != expected:
        raise ValueError(
            f"{folder} must hold consolidated.00.pth to consolidated.{len(files) - 1:02d}.pth without a gap, "
            f"found {', '.join(numbers)}"
        )
    return files
