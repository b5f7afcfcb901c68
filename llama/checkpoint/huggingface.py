"""Read Hugging Face folders: config.json with safetensors or pytorch_model.bin files, whole or split with an index."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES, Reading, dtype_name, needed, positive_int, same_matrix
from llama.checkpoint.families import folded
from llama.checkpoint.hf_config import read_block_types, read_config, token_ids
from llama.checkpoint.load import global_shapes
from llama.checkpoint.mapped_file import Layouts, MappedMemory, map_folder
from llama.checkpoint.names import ROTATED, NamingScheme, meta_name, module_name, renamed, stored_name
from llama.checkpoint.tensors import FUSED, missing_biases, part_of_pairs, unfused
from llama.config import read_json_object
from llama.quantization.gguf_blocks import BlockType, dequantize
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

# What a folder has its weights in, the preferred first: the whole file, the index of a split one.
LAYOUTS: Layouts = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class HuggingFaceCheckpoint:
    """Read a folder in Hugging Face's layout. Files are mapped; rows of Q and K are put into Meta's order: see D15.

    Weights may be blocks, of types that config.json gives: `read` decodes them.
    """

    naming: NamingScheme = "hf"
    pads_vocab = True  # see D16
    tokenizer_metadata = None

    def __init__(self, folder: Path) -> None:
        self.path = folder
        config = read_config(folder / "config.json")
        self.args, stop_tokens, self.family = config.args, config.stop_tokens, config.family
        generation = folder / "generation_config.json"
        if generation.is_file():
            # Its end tokens, and nothing else: sampling is the caller's choice.
            stop_tokens |= token_ids(read_json_object(generation).get("eos_token_id"))
        self.stop_tokens = stop_tokens
        tensors = needed(folder, map_folder(folder, LAYOUTS))
        self._mapped = MappedMemory()
        block_types = check_blocks(folder, tensors)
        self.is_quantized = bool(block_types)
        self._block_types = {meta_name(name, "hf"): block_type for name, block_type in block_types.items()}
        tensors = renamed(tensors, self.family.hf_names)
        parts = unfused(folder, tensors, FUSED["hf"], self.args, "hf")
        self._tensors = {meta_name(name, "hf"): tensor for name, tensor in parts}
        for name, shape in missing_biases(folder, self.args, config.biased, self._tensors).items():
            self._tensors[name] = torch.zeros(shape)
        for name, tensor in self._tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES.values() and name not in self._block_types:
                raise ValueError(
                    f"{folder}: {stored_name(name, 'hf')} has dtype {tensor.dtype}, only "
                    f"{', '.join(WEIGHT_DTYPES)} work"
                )
        self.factors: Mapping[str, float] = {}
        if self.args.tied_embeddings:
            self._tie()
        self.args, self.factors = folded(self.args, config.multipliers)
        no_dtype = self.is_quantized or not self._tensors
        self.dtype = torch.bfloat16 if no_dtype else next(iter(self._tensors.values())).dtype

    @property
    def model_name(self) -> str:
        return str(read_json_object(self.path / "config.json").get("_name_or_path") or "")

    @property
    def context_len(self) -> int | None:
        return positive_int(read_json_object(self.path / "config.json").get("max_position_embeddings"))

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, block_type = tuple(self._tensors[name].shape), self.block_type(name)
        return shape if block_type is None else (shape[0], shape[1] // block_type.size * block_type.elements)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape(name)[dim] if stop is None else stop
        block_type, factor = self.block_type(name), self.factors.get(module_name(name))
        if block_type is None:
            part = self._slice(name, dim, start, stop)
            return part if factor is None else part.float() * factor
        if dim == 0:
            return dequantize(self.read_blocks(name, 0, start, stop), block_type)
        # Whole blocks around the columns.
        first = start - start % block_type.elements
        last = -(-stop // block_type.elements) * block_type.elements
        return dequantize(self.read_blocks(name, 1, first, last), block_type).narrow(1, start - first, stop - start)

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        if self.block_type(name) is not None:
            return torch.float32, "copy"
        if module_name(name) in self.factors:
            return torch.float32, "copy"
        return self._tensors[name].dtype, "copy" if self._is_reordered(name) else "strided" if dim else "zero_copy"

    def stored_as(self, name: str) -> str:
        block_type = self.block_type(name)
        return block_type.name if block_type else dtype_name(self._tensors[name].dtype)

    def block_type(self, name: str) -> BlockType | None:
        return self._block_types.get(name)

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        block_type = self._block_types[name]
        stop = self.shape(name)[dim] if stop is None else stop
        if dim == 1:
            assert start % block_type.elements == stop % block_type.elements == 0, (name, start, stop)
            start, stop = (column // block_type.elements * block_type.size for column in (start, stop))
        return self._slice(name, dim, start, stop)

    def release(self, name: str) -> None:
        self._mapped.release(self._tensors[name])

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path)

    def _tie(self) -> None:
        """Keep one of the embedding and the output projection, or both where they differ, as transformers does.

        Nothing is read where they are one tensor of the file, nor where headers alone tell that the folder cannot run.
        """
        table, output = "tok_embeddings.weight", "output.weight"
        if table not in self._tensors and output in self._tensors:
            self._tensors[table] = self._tensors.pop(output)
        if output not in self._tensors:
            return
        expected = global_shapes(self.args).items()
        fits = all(name in self._tensors and self.shape(name) == shape for name, shape in expected)
        if fits and not self._is_same(table, output):
            self.args = dataclasses.replace(self.args, tied_embeddings=False)
            log.warning("%s: lm_head is used, despite tie_word_embeddings, as it differs from the table", self.path)
        else:
            del self._tensors[output]

    def _is_same(self, a: str, b: str) -> bool:
        first, second = self._tensors[a], self._tensors[b]
        if first.dtype != second.dtype or self.shape(a) != self.shape(b):
            return False
        if first.data_ptr() == second.data_ptr():
            return True
        is_same = same_matrix(self, a, b)
        self.release(a)
        self.release(b)
        return is_same

    def _is_reordered(self, name: str) -> bool:
        return self.family.hf_rows == "halves" and module_name(name) in ROTATED

    def _slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows or columns of a tensor as it is stored, but with rows in Meta's order."""
        tensor = self._tensors[name]
        if not self._is_reordered(name):
            return tensor.narrow(dim, start, stop - start)
        return part_of_pairs(lambda first, last: tensor[first:last], tensor.shape[0], self.args, dim, start, stop)


def check_blocks(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, BlockType]:
    """Return the types of the tensors that are blocks, by the names that they have in the files.

    Raise ValueError unless these tensors are as config.json says.
    """
    block_types = read_block_types(folder / "config.json")
    for name, block_type in block_types.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape[1] % block_type.size:
            found = "missing" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise ValueError(
                f"{folder}: {name} is to be rows of {block_type.name} blocks of {block_type.size} bytes, but is "
                f"{found}: weights and config.json do not belong together"
            )
    return block_types
