"""Write one GGUF file, dense or in blocks, as llama.cpp's converter and quantize write it, a few tensors at a time."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES, Progress
from llama.checkpoint.expert_tensors import stacked_name
from llama.checkpoint.export.gguf_metadata import describe
from llama.checkpoint.export.gguf_types import GGUF_FILE_TYPES, fitting, type_of
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.imatrix import origin
from llama.checkpoint.names import ROTATED, module_name, stored_name, with_own_parts
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.tensors import pair_halves
from llama.quantization.gguf_blocks import BLOCK_TYPES
from llama.quantization.k_quants import quantize_blocks
from llama.tokenizer.gguf_tokens import GGUFTokens
from llama.tokenizer.vocab import END_TOKENS

log = logging.getLogger("llama")

# What a file's weights keep the types that they have by, where they are quantized and --dtype says nothing.
AS_STORED = "stored"


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: the model's tensors whose rows it holds, and its ggml type."""

    parts: list[str]
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape[:-1]).numel() * row_bytes(self.type, self.shape[-1])


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of a row of so many values of a ggml type."""
    if type_name in WEIGHT_DTYPES:
        return columns * WEIGHT_DTYPES[type_name].itemsize
    block_type = BLOCK_TYPES[type_name]
    return columns // block_type.elements * block_type.size


class GGUFFileWriter:
    """Write a GGUF file. Making the writer raises ValueError for what the format cannot express."""

    def __init__(self, plan: ExportPlan, type_name: str, *, is_pure: bool = False) -> None:
        """Plan a file of the type or mixture type_name, one of GGUF_FILE_TYPES, or AS_STORED.

        is_pure: whether all matrices get the type that a mixture is mostly of.
        """
        self.plan, self.type_name, self.is_pure = plan, type_name, is_pure
        self._biased = self._modules_with_biases()
        self.description = describe(plan, self._biased)
        self.tokenizer_metadata = plan.tokenizer.gguf_metadata()
        self._name_stops()
        self.entries: dict[str, _Entry] = {}
        self._plan_entries()
        plan.check_importance(self._quantized())

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def write(self, path: Path, progress: Progress) -> None:
        import gguf

        architecture, factors = self.description.architecture, self.description.factors
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_file_type(self._file_type())
        if any(entry.type not in WEIGHT_DTYPES for entry in self.entries.values()):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        calibrated = origin(self.plan.importance) if self.plan.importance else {}
        for key, value in {**self.description.metadata, **self.tokenizer_metadata, **calibrated}.items():
            _add_value(writer, key, value)
        float32 = np.dtype(np.float32)  # of tensors in blocks the library looks at raw_dtype instead
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for name, entry in self.entries.items():
            raw_dtype = gguf.GGMLQuantizationType[entry.type]
            writer.add_tensor_info(name, entry.shape, float32, entry.nbytes, raw_dtype=raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        rows = self._rows()
        for entry in self.entries.values():
            parts = [next(rows) for _ in entry.parts]
            writer.write_tensor_data((parts[0] if len(parts) == 1 else torch.cat(parts)).numpy())
            del parts
            progress(entry.nbytes)
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()

    def _plan_entries(self) -> None:
        """Set the file's tensors, by their names there, in their order; one holds the matrices of all experts."""
        family = self.description.family
        shapes = global_shapes(self.plan.args)
        for name, shape in shapes.items():
            if module_name(name) == "xielu":  # whose numbers are keys
                continue
            if name.endswith(".bias") and "norm" not in name and module_name(name) not in self._biased:
                continue
            parts = [name]
            rows = shape[0]
            if family.gguf_gate_in_up and module_name(name) in ("w1", "w3"):
                if module_name(name) == "w1":
                    continue
                parts, rows = [name.replace(".w3.", ".w1."), name], 2 * shape[0]
            stored = with_own_parts(stacked_name(stored_name(name, "gguf")), family.gguf_names)
            if ".experts." not in name:
                self.entries[stored] = _Entry(parts, (rows, *shape[1:]), self._type(name, shape))
            elif stored in self.entries:
                self.entries[stored].parts.extend(parts)
            else:
                n_experts = self.plan.args.experts.n_experts if self.plan.args.experts else 0
                self.entries[stored] = _Entry(parts, (n_experts, *shape), self._type(name, shape))

    def _quantized(self) -> dict[str, tuple[int, ...]]:
        """Return the matrices whose values become blocks, with their shapes."""
        shapes, checkpoint = global_shapes(self.plan.args), self.plan.checkpoint
        types = {part: entry.type for entry in self.entries.values() for part in entry.parts}
        stored = {name: checkpoint.block_type(name) for name in types}
        return {
            name: shapes[name]
            for name, type_name in types.items()
            if type_name in BLOCK_TYPES and getattr(stored[name], "name", None) != type_name
        }

    def _type(self, name: str, shape: tuple[int, ...]) -> str:
        """Return the ggml type of a tensor."""
        if self.type_name != AS_STORED:
            return type_of(GGUF_FILE_TYPES[self.type_name], name, shape, self.plan.args, self.is_pure)
        if len(shape) < 2 or module_name(name) == "gate":
            return "F32"
        block_type = self.plan.checkpoint.block_type(name)
        stored = block_type.name if block_type else self.plan.checkpoint.stored_as(name)
        if stored in BLOCK_TYPES:
            return fitting(stored, shape[-1])
        return GGUF_FILE_TYPES[stored].type if stored in GGUF_FILE_TYPES else "BF16"

    def _file_type(self) -> int:
        """Return the code of the mixture, or of the type that most of the weights have."""
        if self.type_name != AS_STORED:
            return GGUF_FILE_TYPES[self.type_name].code
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            sizes[entry.type] += entry.nbytes
        ((most, _),) = sizes.most_common(1)
        return next(mixture.code for mixture in GGUF_FILE_TYPES.values() if mixture.type == most)

    def _modules_with_biases(self) -> set[str]:
        """Return the linears that have a bias other than zeros in some layer; of others, none is written."""
        biases = (name for name in global_shapes(self.plan.args) if name.endswith(".bias") and "norm" not in name)
        return {module_name(name) for name in biases if self.plan.checkpoint.read(name).any()}

    def _rows(self) -> Iterator[Tensor]:
        """Yield the rows (rows, row_bytes) of the model's tensors, one after the other, as the file has them."""
        types = {part: entry.type for entry in self.entries.values() for part in entry.parts}
        family, args = self.description.family, self.plan.args
        shapes = global_shapes(args)
        for name, tensor in self.plan.read_all(types, types):
            tensor = tensor.narrow(0, 0, shapes[name][0])  # rows that only pad a table are left out
            rows = tensor if tensor.dtype == torch.uint8 else self._encoded(name, tensor, types[name])
            if family.gguf_rows == "halves" and module_name(name) in ROTATED:
                rows = pair_halves(rows.view(len(tensor), -1), args.head_dim, args.rotary_dim)
            yield rows.view(-1) if tensor.dim() == 1 else rows

    def _encoded(self, name: str, tensor: Tensor, type_name: str) -> Tensor:
        """Return a tensor's values as bytes of that ggml type, (rows, row_bytes)."""
        if type_name in WEIGHT_DTYPES:
            values = self.plan.as_dtype(name, tensor, WEIGHT_DTYPES[type_name])
            return values.contiguous().view(torch.uint8)
        try:
            weights = self.plan.column_weights(name, tuple(tensor.shape))
            return quantize_blocks(tensor, BLOCK_TYPES[type_name], weights)
        except ValueError as error:
            raise ValueError(f"{self.plan.own_name(name)}: {error}") from None

    def _name_stops(self) -> None:
        """Have the file name the tokens that end a generation by the model's configuration; log what it cannot."""
        wanted = self.plan.tokenizer.tokenizer.stop_tokens | self.plan.checkpoint.stop_tokens
        tokens = GGUFTokens.from_metadata(self.tokenizer_metadata)
        named = {i for i, text in enumerate(tokens.texts) if text in END_TOKENS}
        missing = sorted(wanted - named - {tokens.eos_id, *tokens.stops})
        keys = [key for key in _STOP_KEYS if key not in self.tokenizer_metadata]
        self.tokenizer_metadata = {**self.tokenizer_metadata, **dict(zip(keys, missing, strict=False))}
        lost = missing[len(keys) :]
        if lost:
            log.warning("GGUF cannot say that these tokens end a generation: %s", ", ".join(map(str, lost)))


_STOP_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def _add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)
