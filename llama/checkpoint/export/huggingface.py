"""Write Hugging Face's format: safetensors, config.json, generation_config.json and the tokenizer.

With --quantize weights are blocks, bytes (rows, row_bytes) under their usual names, whose types are in config.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import Progress, quantized_type
from llama.checkpoint.export.hf_config import hf_config
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.export.streaming_writers import SafetensorsFile, TensorEntry, write_json
from llama.checkpoint.export.tokenizer import write_tokenizer
from llama.checkpoint.names import ROTATED, XIELU_PARTS, module_name, stored_name, with_own_parts
from llama.checkpoint.release_config import BLOCKS_METHOD
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.tensors import norm_offset, pair_halves, xielu_parts
from llama.quantization.gguf_blocks import BlockType, quantize
from llama.quantization.k_quants import quantize_blocks

MAX_FILE_BYTES = 5_000_000_000


class HuggingFaceWriter:
    """Write a Hugging Face folder. Making the writer raises ValueError for what its config.json cannot express."""

    def __init__(self, plan: ExportPlan, quantize: str | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Plan the files. quantize is int8 or int4; None keeps all weights in the plan's dtype."""
        self.plan, self.max_file_bytes = plan, max_file_bytes
        self.config, self.family, lost = hf_config(plan)
        self.entries: dict[str, TensorEntry] = {}
        self.block_types: dict[str, BlockType] = {}
        for name, shape in global_shapes(plan.args).items():
            if name.endswith(".bias") and module_name(name) in lost:
                continue
            block_type = self._block_type(name, shape, quantize) if quantize else None
            if block_type is None:
                self.entries[name] = TensorEntry(shape, plan.dtype)
            else:
                row_bytes = shape[1] // block_type.elements * block_type.size
                self.entries[name] = TensorEntry((shape[0], row_bytes), torch.uint8)
                self.block_types[name] = block_type
        shapes = global_shapes(plan.args)
        rounded = {name for name, each in self.block_types.items() if plan.checkpoint.block_type(name) != each}
        plan.check_importance({name: shapes[name] for name in self.block_types if name in rounded})
        if self.block_types:
            types = {self._name(name): block_type.name for name, block_type in self.block_types.items()}
            self.config["quantization_config"] = {"quant_method": BLOCKS_METHOD, "types": types}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def write(self, folder: Path, progress: Progress) -> None:
        folder.mkdir()
        write_tokenizer(self.plan.tokenizer, folder, "hf")
        names_of_files = self._split_names()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(names_of_files):
            count = len(names_of_files)
            file_name = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            entries = {own: entry for name in names for own, entry in self._entries(name).items()}
            file = SafetensorsFile(folder / file_name, entries)
            types = {name: getattr(self.block_types.get(name), "name", "") for name in names}
            for name, tensor in self.plan.read_all(names, types):
                for part in self._stored(name, tensor):
                    file.add(part)
                progress(self.entries[name].nbytes)
            weight_map |= dict.fromkeys(entries, file_name)
            file.close()
        if len(names_of_files) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        self._write_generation_config(folder / "generation_config.json")
        # Last, because without it a folder cannot be opened.
        write_json(folder / "config.json", self.config)

    def _block_type(self, name: str, shape: tuple[int, ...], quantize: str) -> BlockType | None:
        """Return the blocks that a tensor becomes: what it is stored in, where that is no larger; None for floats."""
        asked, stored = quantized_type(name, shape, quantize), self.plan.checkpoint.block_type(name)
        if asked is None or stored is None or asked.size * stored.elements < stored.size * asked.elements:
            return asked
        return stored

    def _name(self, name: str) -> str:
        """Return what the family calls a tensor in its files."""
        return with_own_parts(stored_name(name, "hf"), self.family.hf_names)

    def _entries(self, name: str) -> dict[str, TensorEntry]:
        """Return what the family's files have for a tensor, by their names."""
        if module_name(name) != "xielu":
            return {self._name(name): self.entries[name]}
        module, shapes = self._name(name).rpartition(".")[0], ((1,), (1,), (), ())
        parts = zip(XIELU_PARTS, shapes, strict=True)
        return {f"{module}.{part}": TensorEntry(shape, self.plan.dtype) for part, shape in parts}

    def _split_names(self) -> list[list[str]]:
        """Return the names of the tensors in each file, all of which are at most max_file_bytes long if possible."""
        files: list[list[str]] = [[]]
        size = 0
        for name, entry in self.entries.items():
            if files[-1] and size + entry.nbytes > self.max_file_bytes:
                files.append([])
                size = 0
            files[-1].append(name)
            size += entry.nbytes
        return files

    def _stored(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return a whole tensor as it is written: in the plan's dtype or in blocks, rows in Hugging Face's order."""
        if module_name(name) == "xielu":
            return [part.to(self.plan.dtype) for part in xielu_parts(tensor).values()]
        if name not in self.block_types:
            offset = norm_offset(name, self.family)
            stored = self.plan.as_dtype(name, tensor.float() - offset if offset else tensor, self.plan.dtype)
        elif tensor.dtype == torch.uint8:  # blocks that stay
            stored = tensor
        else:
            try:
                weights = self.plan.column_weights(name, tuple(tensor.shape))
                if weights is None:
                    stored = quantize(tensor, self.block_types[name])
                else:
                    stored = quantize_blocks(tensor.float(), self.block_types[name], weights)
            except ValueError as error:
                raise ValueError(f"{self.plan.own_name(name)}: {error}") from None
        args = self.plan.args
        return [pair_halves(stored, args.head_dim, args.rotary_dim) if module_name(name) in ROTATED else stored]

    def _write_generation_config(self, path: Path) -> None:
        """Copy the checkpoint's own file where it has one; else write the ids that begin and end a generation."""
        own = self.plan.checkpoint.path / path.name
        if own.is_file():
            shutil.copyfile(own, path)
        else:
            write_json(path, {key: self.config[key] for key in ("bos_token_id", "eos_token_id") if key in self.config})
