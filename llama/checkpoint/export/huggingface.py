"""Write Hugging Face's format: safetensors, config.json, generation_config.json and the tokenizer.

With --quantize weights are blocks, bytes (rows, row_bytes) under their usual names, whose types are in config.json.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.base import Progress, dtype_name, quantized_type
from llama.checkpoint.context import recognised
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.export.streaming_writers import SafetensorsFile, TensorEntry, write_json
from llama.checkpoint.export.tokenizer import write_tokenizer
from llama.checkpoint.families import FAMILIES
from llama.checkpoint.hf_config import (
    CONFIG_FLAGS,
    GRANITE_KEYS,
    OPTIONAL_CONFIG_KEYS,
    REQUIRED_CONFIG_KEYS,
)
from llama.checkpoint.load import global_shapes
from llama.checkpoint.names import ROTATED, module_name, stored_name
from llama.checkpoint.release_config import BLOCKS_METHOD
from llama.checkpoint.tensors import pair_halves
from llama.quantization.gguf_blocks import BlockType, quantize
from llama.rope_scaling import (
    DynamicScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

MAX_FILE_BYTES = 5_000_000_000
ROPE_TYPES = {
    LinearScaling: "linear",
    DynamicScaling: "dynamic",
    Llama3Scaling: "llama3",
    YarnScaling: "yarn",
    LongRopeScaling: "longrope",
}


class HuggingFaceWriter:
    """Write a Hugging Face folder. Making the writer raises ValueError for what its config.json cannot express."""

    def __init__(self, plan: ExportPlan, quantize: str | None = None, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Plan the files. quantize is int8 or int4; None keeps all weights in the plan's dtype."""
        self.plan, self.max_file_bytes = plan, max_file_bytes
        self.config = hf_config(plan)
        self.entries: dict[str, TensorEntry] = {}
        self.block_types: dict[str, BlockType] = {}
        for name, shape in global_shapes(plan.args).items():
            block_type = quantized_type(name, shape, quantize) if quantize else None
            if block_type is None:
                self.entries[name] = TensorEntry(shape, plan.dtype)
            else:
                row_bytes = shape[1] // block_type.elements * block_type.size
                self.entries[name] = TensorEntry((shape[0], row_bytes), torch.uint8)
                self.block_types[name] = block_type
        if self.block_types:
            types = {stored_name(name, "hf"): block_type.name for name, block_type in self.block_types.items()}
            self.config["quantization_config"] = {"quant_method": BLOCKS_METHOD, "types": types}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def write(self, folder: Path, progress: Progress) -> None:
        folder.mkdir()
        write_tokenizer(self.plan.tokenizer, folder, "hf")
        names_of_files = self._split_names()
        weight_map = {}
        for i, names in enumerate(names_of_files):
            count = len(names_of_files)
            file_name = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            file = SafetensorsFile(folder / file_name, {stored_name(name, "hf"): self.entries[name] for name in names})
            for name, tensor in self.plan.read_all(names):
                file.add(self._stored(name, tensor))
                progress(self.entries[name].nbytes)
                weight_map[stored_name(name, "hf")] = file_name
            file.close()
        if len(names_of_files) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        self._write_generation_config(folder / "generation_config.json")
        # Last, because without it a folder cannot be opened.
        write_json(folder / "config.json", self.config)

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

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a whole tensor as it is written: in the plan's dtype or in blocks, rows in Hugging Face's order."""
        if name not in self.block_types:
            stored = self.plan.as_dtype(name, tensor, self.plan.dtype)
        else:
            try:
                stored = quantize(tensor, self.block_types[name])
            except ValueError as error:
                raise ValueError(f"{self.plan.own_name(name)}: {error}") from None
        return pair_halves(stored, self.plan.args.head_dim) if module_name(name) in ROTATED else stored

    def _write_generation_config(self, path: Path) -> None:
        """Copy the checkpoint's own file where it has one; else write the ids that begin and end a generation."""
        own = self.plan.checkpoint.path / path.name
        if own.is_file():
            shutil.copyfile(own, path)
        else:
            write_json(path, {key: self.config[key] for key in ("bos_token_id", "eos_token_id") if key in self.config})


def hf_config(plan: ExportPlan) -> dict[str, Any]:
    """Return the content of config.json; raise ValueError for what transformers' configuration cannot express.

    RoPE settings are spelled in the older way, which every version of transformers reads.
    """
    args, tokenizer = plan.args, plan.tokenizer.tokenizer
    windowed, is_scaled = args.sliding_window is not None, args.score_factor != 1.0
    family = "granite" if is_scaled else "mistral" if windowed else "llama"
    if args.rotary_dim is not None:
        raise ValueError(
            f"Hugging Face's Llama rotates all {args.head_dim} dimensions of a head, and not {args.rotary_dim} of them"
        )
    fields = REQUIRED_CONFIG_KEYS | OPTIONAL_CONFIG_KEYS | CONFIG_FLAGS
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family].architectures[0]],
        "model_type": family,
        **{key: getattr(args, field) for field, key in fields.items()},
        "max_position_embeddings": plan.context_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "torch_dtype": dtype_name(plan.dtype),
        "use_cache": True,
    }
    if windowed:
        if args.attention_bias or args.mlp_bias or is_scaled:
            raise ValueError(
                "Hugging Face's Mistral has no biases and no scaled scores, its Llama and Granite no sliding window: "
                "nothing has both"
            )
        config["sliding_window"] = args.sliding_window
    if is_scaled:
        config |= dict.fromkeys(GRANITE_KEYS.values(), 1.0)
        config[GRANITE_KEYS["scores"]] = args.score_factor / math.sqrt(args.head_dim)
    scaling = recognised(args)
    if scaling is not None:
        config["rope_scaling"] = _rope_settings(scaling)
        if isinstance(scaling, DynamicScaling):
            config["max_position_embeddings"] = scaling.old_context_len
    if tokenizer.bos_id >= 0:
        config["bos_token_id"] = tokenizer.bos_id
    stops = sorted(tokenizer.stop_tokens | plan.checkpoint.stop_tokens)
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return config


def _rope_settings(scaling: RopeScaling) -> dict[str, Any]:
    """Return the rope_scaling of config.json, whose keys but one are the fields of the scaling."""
    if isinstance(scaling, FactorScaling):
        raise ValueError("RoPE factors for each pair that follow no rule cannot be written to config.json")
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    if isinstance(scaling, LongRopeScaling):
        fields["short_factor"], fields["long_factor"] = fields.pop("short_factors"), fields.pop("long_factors")
        fields["attention_factor"] = fields.pop("magnitude")
    old_context_len = fields.pop("old_context_len", None)
    if old_context_len is not None and not isinstance(scaling, DynamicScaling):
        fields["original_max_position_embeddings"] = old_context_len
    return {"rope_type": ROPE_TYPES[type(scaling)], **fields}
