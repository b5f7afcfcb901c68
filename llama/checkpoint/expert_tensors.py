"""Take apart tensors that hold the matrices of all experts of a layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.config import Experts

# Modules of all experts, and those of each that they hold, one after the other, in Hugging Face's folders and in GGUF.
STACKED = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj",),
    "ffn_gate_exps": ("ffn_gate.{}",),
    "ffn_up_exps": ("ffn_up.{}",),
    "ffn_down_exps": ("ffn_down.{}",),
    "ffn_gate_up_exps": ("ffn_gate.{}", "ffn_up.{}"),
}


def stacked_name(name: str) -> str:
    """Return what GGUF calls the tensor of all experts that holds one of theirs: "blk.3.ffn_up.7" -> "..ffn_up_exps".

    Other names stay.
    """
    return re.sub(r"\.(ffn_gate|ffn_up|ffn_down)\.\d+\.weight$", r".\1_exps.weight", name)


def unstacked(path: Path, tensors: Mapping[str, Any], experts: Experts, transposed: bool = False) -> dict[str, Any]:
    """Return tensors by their names in a file, with each expert's matrices, as views, in place of those of all.

    transposed: whether a tensor of all holds matrices (in, out). Raise ValueError where one has another number of them.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        stacked = next((each for each in STACKED if module.endswith(f".{each}")), None)
        if stacked is None:
            found[name] = tensor
            continue
        shape = tuple(tensor.shape)
        parts = STACKED[stacked]
        if len(shape) != 3 or shape[0] != experts.n_experts or shape[2 if transposed else 1] % len(parts):
            raise ValueError(
                f"{path}: {name} has shape {shape}, not matrices of {experts.n_experts} experts: weights and "
                "configuration do not belong together"
            )
        prefix = module.removesuffix(stacked)
        for number in range(experts.n_experts):
            matrix = tensor[number]
            if transposed:
                matrix = matrix.t()
            n_rows = matrix.shape[0] // len(parts)
            for i, part in enumerate(parts):
                rows = matrix if len(parts) == 1 else matrix[i * n_rows : (i + 1) * n_rows]
                found[f"{prefix}{part.format(number)}.weight"] = rows
    return found
