"""Adapters for tests, as peft and llama.cpp write them, with names from their files and not from llama/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.config import ModelArgs
from tests.hugging_face import half_split

PREFIX = "base_model.model.model.layers."
# Modules of a layer as peft, as GGUF and as this package call them.
MODULES = {
    "self_attn.q_proj": ("attn_q", "attention.wq"),
    "self_attn.k_proj": ("attn_k", "attention.wk"),
    "self_attn.v_proj": ("attn_v", "attention.wv"),
    "self_attn.o_proj": ("attn_output", "attention.wo"),
    "mlp.gate_proj": ("ffn_gate", "feed_forward.w1"),
    "mlp.down_proj": ("ffn_down", "feed_forward.w2"),
    "mlp.up_proj": ("ffn_up", "feed_forward.w3"),
}
FUSED_MODULES = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}  # of some families
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def random_halves(
    args: ModelArgs, state: Mapping[str, Tensor], rank: int = 3, modules: Sequence[str] = tuple(MODULES), seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of "0.self_attn.q_proj" and so on, rows in Meta's order; as large as weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(args.n_layers):
        for module in modules:
            out, columns = state[f"layers.{layer}.{MODULES[module][1]}.weight"].shape
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(out, rank, generator=generator) / rank**0.5
            found[f"{layer}.{module}"] = a, b
    return found


def write_peft(
    folder: Path,
    args: ModelArgs,
    halves: Mapping[str, tuple[Tensor, Tensor]],
    more: Mapping[str, Tensor] = {},
    **config: Any,
) -> Path:
    """What peft saves; `more`: further tensors of the file."""
    tensors = dict(more)
    for name, (a, b) in halves.items():
        rotated = name.endswith(("q_proj", "k_proj"))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = half_split(b, args.head_dim) if rotated else b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6} | config))
    return folder


def write_gguf_adapter(
    path: Path,
    halves: Mapping[str, tuple[Tensor, Tensor]],
    more: Mapping[str, Tensor] = {},
    arch: str = "llama",
    **changes: Any,
) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py writes; `more`: further tensors. A key of None is left out."""
    metadata: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", arch))
    for key, value in metadata.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    tensors = dict(more)
    for name, (a, b) in halves.items():
        layer, _, module = name.partition(".")
        own = FUSED_MODULES.get(module) or MODULES[module][0]
        tensors |= {f"blk.{layer}.{own}.weight.lora_a": a, f"blk.{layer}.{own}.weight.lora_b": b}
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(
    state: Mapping[str, Tensor], halves: Mapping[str, tuple[Tensor, Tensor]], factor: float
) -> dict[str, Tensor]:
    """The state with an adapter in it."""
    found = dict(state)
    for name, (a, b) in halves.items():
        layer, _, module = name.partition(".")
        own = f"layers.{layer}.{MODULES[module][1]}.weight"
        found[own] = found[own] + factor * (b @ a)
    return found
