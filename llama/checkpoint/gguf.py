"""Read GGUF: architecture, tokenizer and weights in one file or a split one; blocks can be decoded to floats."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import SHARD_DIM, Reading, dtype_name, needed, positive_int
from llama.checkpoint.expert_tensors import unstacked
from llama.checkpoint.family import ATTENTION, FEED_FORWARD
from llama.checkpoint.gguf_config import (
    ALL_ROPE_FACTORS,
    FIELD_KEYS,
    family_of,
    ignored_keys,
    read_metadata,
    read_multipliers,
    read_xielu,
    under_llamas_keys,
    with_own_keys,
)
from llama.checkpoint.gguf_header import Header, read_header
from llama.checkpoint.gguf_tensors import StoredTensor, decode_rows, floats_of, map_tensors
from llama.checkpoint.mapped_file import MappedMemory
from llama.checkpoint.multipliers import Multipliers, folded
from llama.checkpoint.names import ROTATED, NamingScheme, meta_name, module_name, renamed
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.tensors import FUSED, GATE_IN_UP, part_of_pairs, unfused, xielu_weight
from llama.config import ModelArgs, with_keys_of_file
from llama.files import GGUF_SPLIT
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

TABLE, OUTPUT = "tok_embeddings.weight", "output.weight"


class GGUFCheckpoint:
    """Read GGUF files of Llama's families. They are mapped; a tensor's blocks are decoded when it is read.

    Rows of Q and K are put into Meta's order where the architecture has another.
    """

    naming: NamingScheme = "gguf"
    pads_vocab = False
    stop_tokens: frozenset[int] = frozenset()  # the tokenizer in the file knows them
    rounding = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata: Mapping[str, Any] = {}
        tensors: dict[str, StoredTensor] = {}
        files = split_files(path)
        for number, file in enumerate(files):
            header = read_header(file)
            if number == 0:
                self._metadata = header.metadata
            _check_split(file, header, number, len(files))
            for name, tensor in map_tensors(file, header).items():
                if name in tensors:
                    raise ValueError(f"{file}: tensor {name} is in an earlier file of the split, too")
                tensors[name] = tensor
        if self._metadata.get("general.type") == "adapter":
            raise ValueError(f"{path} is an adapter: give its base model as --ckpt_dir, and this file as --lora")
        if self._metadata.get("general.type") == "imatrix":
            raise ValueError(f"{path} is an importance matrix, no model: llama convert --imatrix takes it")
        rope_factors = {name: tensors.pop(name) for name in ALL_ROPE_FACTORS & tensors.keys()}
        try:
            self.family = family_of(self._metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self._metadata = under_llamas_keys(self._metadata, self.family)
        ignored = ignored_keys(self._metadata, self.family)
        if ignored:
            log.warning("%s has keys that are ignored: %s", path, with_own_keys(", ".join(ignored), self.family))
        self._mapped = MappedMemory()
        try:
            args = read_metadata(
                self._metadata,
                self.family,
                tied="output.weight" not in tensors,
                rope_factors={
                    name: tuple(decode_rows(each, 0, each.shape[0]).tolist()) for name, each in rope_factors.items()
                },
            )
            why = self.family.refused.get("use_parallel_residual")  # which GGUF's own key does not tell
            if why is not None and "blk.0.ffn_norm.weight" not in tensors:
                raise ValueError(f"attention beside the feed-forward is not supported: {why}")
            multipliers = read_multipliers(self._metadata, self.family, args)
            self.args, self.factors = folded(args, multipliers)
            xielu = read_xielu(self._metadata, args.n_layers) if args.activation == "xielu" else []
        except ValueError as error:
            keys = {field: key for field, key in FIELD_KEYS.items() if key in self._metadata}
            raise ValueError(f"{path}: {with_own_keys(with_keys_of_file(error, keys), self.family)}") from None
        fused = FUSED["gguf"] | (GATE_IN_UP if self.family.gguf_gate_in_up else {})
        if "blk.0.ffn_gate.weight" in tensors:
            fused = FUSED["gguf"]
        stored: dict[str, StoredTensor] = renamed(path, needed(path, tensors), self.family.gguf_names)
        if args.experts is not None:
            stored = unstacked(path, stored, args.experts)
        parts = unfused(path, stored, fused, args, "gguf")
        self._tensors = {meta_name(name, "gguf"): tensor for name, tensor in parts}
        for layer, values in enumerate(xielu):
            weight = xielu_weight(*values).numpy()
            self._tensors[f"layers.{layer}.feed_forward.xielu.weight"] = floats_of(weight, (4,))
        if args.tied_embeddings and "tok_embeddings" in self.factors and self.block_type(TABLE) is not None:
            self._untie(args, multipliers)
        self._find_biases()
        # What chooses experts is in fp32, whatever the others are in.
        dtypes = {tensor.dtype for name, tensor in self._tensors.items() if module_name(name) in SHARD_DIM}
        self.is_quantized = None in dtypes
        self.dtype = (dtypes.pop() if len(dtypes) == 1 else None) or torch.bfloat16
        self.context_len = positive_int(self._metadata.get("llama.context_length"))

    def _untie(self, args: ModelArgs, multipliers: Multipliers) -> None:
        """Have blocks stay the output that they are, where the same table is scaled and becomes floats."""
        self._tensors[OUTPUT] = self._tensors[TABLE]
        self.args, self.factors = folded(dataclasses.replace(args, tied_embeddings=False), multipliers)

    def _find_biases(self) -> None:
        """Set the architecture's biases by the tensors; those of a module that has none in any layer are zeros."""
        biased = {module_name(name) for name in self._tensors if name.endswith(".bias")}
        self.args = dataclasses.replace(
            self.args,
            attention_bias=not biased.isdisjoint(ATTENTION),
            mlp_bias=not biased.isdisjoint(FEED_FORWARD),
        )
        for name, shape in global_shapes(self.args).items():
            if name.endswith(".bias") and module_name(name) in {*ATTENTION, *FEED_FORWARD} - biased:
                self._tensors[name] = floats_of(np.zeros(shape[0], np.float32), shape)

    @property
    def model_name(self) -> str:
        return str(self._metadata.get("general.name", ""))

    @property
    def tokenizer_metadata(self) -> Mapping[str, Any]:
        return {key: value for key, value in self._metadata.items() if key.startswith("tokenizer.")}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        tensor, factor = self._tensors[name], self.factors.get(module_name(name))
        stop = tensor.shape[dim] if stop is None else stop
        if self._is_reordered(name):
            decode = functools.partial(decode_rows, tensor)
            return part_of_pairs(decode, tensor.shape[0], self.args, dim, start, stop)
        if dim == 0:
            part = decode_rows(tensor, start, stop)
        else:
            part = decode_rows(tensor, 0, tensor.shape[0]).narrow(dim, start, stop - start)
        return part if factor is None else part.float() * factor

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        dtype = self._tensors[name].dtype
        if dtype is None or module_name(name) in self.factors:
            return torch.float32, "copy"
        return dtype, "copy" if self._is_reordered(name) else "strided" if dim else "zero_copy"

    def stored_as(self, name: str) -> str:
        tensor = self._tensors[name]
        return tensor.type.name if tensor.dtype is None else dtype_name(tensor.dtype)

    def block_type(self, name: str) -> BlockType | None:
        is_scaled = module_name(name) in self.factors
        return None if is_scaled else BLOCK_TYPES.get(self._tensors[name].type.name)

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        elements, size = tensor.type.elements, tensor.type.size
        rows = torch.from_numpy(tensor.raw).view(tensor.shape[0], -1)
        stop = tensor.shape[dim] if stop is None else stop
        if dim == 0:
            if not self._is_reordered(name):
                return rows[start:stop]
            return part_of_pairs(lambda first, last: rows[first:last], len(rows), self.args, 0, start, stop)
        assert not self._is_reordered(name)  # ranks cut these along heads
        assert start % elements == stop % elements == 0, (name, start, stop)
        return rows[:, start // elements * size : stop // elements * size]

    def _is_reordered(self, name: str) -> bool:
        return self.family.gguf_rows == "halves" and module_name(name) in ROTATED

    def release(self, name: str) -> None:
        self._mapped.release(torch.from_numpy(self._tensors[name].raw))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata)


def split_files(path: Path) -> list[Path]:
    """Return all files of the model that `path` belongs to: name-00001-of-0000N.gguf and so on, or path alone.

    Raise FileNotFoundError when one is missing.
    """
    split = GGUF_SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split[3])
    files = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{path} is one of {count} files, but not beside it are {', '.join(missing[:3])}")
    return files


def is_later_split(path: Path) -> bool:
    """Tell whether a file's name is that of a split's second file, or a later one."""
    split = GGUF_SPLIT.fullmatch(path.name)
    return split is not None and int(split[2]) != 1


def _check_split(file: Path, header: Header, number: int, count: int) -> None:
    """Raise ValueError unless the file's own metadata agrees with its name."""
    stated = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
    if stated != (number, count):
        raise ValueError(
            f"{file} says that it is file {stated[0]} of {stated[1]}, counted from 0, but stands as {number} of "
            f"{count}: files of a split keep their names name-00001-of-0000N.gguf"
        )
