"""Give the tensors of Llama 4's shards, as Meta released them, the names and the order that this package has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llama.config import ModelArgs

# What some modules of a layer are called in the shards; those that hold several, or are transposed, are below.
RENAMED = {
    "attention.wqkv.layer_norm_weight": "attention_norm.weight",
    "feed_forward.norm.weight": "ffn_norm.weight",
    "feed_forward.mlp.layer_norm_weight": "ffn_norm.weight",
    "feed_forward.mlp.fc2_weight": "feed_forward.w2.weight",
    "feed_forward.w_in_shared_FD.weight": "feed_forward.shared.w1.weight",
    "feed_forward.w_out_shared_DF.weight": "feed_forward.shared.w2.weight",
    "feed_forward.w_swiglu_FD.weight": "feed_forward.shared.w3.weight",
}
# Matrices of all experts, one below another, each of them (in, out).
_LAYER = re.compile(r"(layers\.\d+\.)?")
TRANSPOSED = {"moe_w_in_eD_F": "w1", "moe_w_out_eF_D": "w2", "moe_w_swiglu_eD_F": "w3"}


def as_llamas(path: Path, shard: Mapping[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Return a shard's tensors, as views, under the names of `llama.model`.

    Raise ValueError where one does not hold what the architecture asks for.
    """
    assert args.experts is not None
    n_experts, found = args.experts.n_experts, {}
    for name, tensor in shard.items():
        prefix = _LAYER.match(name)[0]  # type: ignore[index]  # which matches nothing, too
        rest = name.removeprefix(prefix)
        module = rest.rpartition(".")[2]
        if rest in RENAMED:
            found[prefix + RENAMED[rest]] = tensor
        elif rest == "attention.wqkv.weight":
            rows = _equal(path, name, tensor, args.n_heads + 2 * args.n_kv_heads)
            first = 0
            for part, heads in (("wq", args.n_heads), ("wk", args.n_kv_heads), ("wv", args.n_kv_heads)):
                found[f"{prefix}attention.{part}.weight"] = tensor[first : first + heads * rows]
                first += heads * rows
        elif rest == "feed_forward.mlp.fc1_weight":
            rows = _equal(path, name, tensor, 2)
            found[f"{prefix}feed_forward.w1.weight"], found[f"{prefix}feed_forward.w3.weight"] = tensor.split(rows)
        elif rest == "feed_forward.router_DE" and tensor.dim() == 2:
            found[f"{prefix}feed_forward.gate.weight"] = tensor.t()
        elif rest.startswith("feed_forward.experts.") and module in TRANSPOSED:
            for number, matrix in enumerate(tensor.split(_equal(path, name, tensor, n_experts))):
                found[f"{prefix}feed_forward.experts.{number}.{TRANSPOSED[module]}.weight"] = matrix.t()
        else:
            found[name] = tensor
    return found


def _equal(path: Path, name: str, tensor: Tensor, parts: int) -> int:
    """Return the rows of each of so many equal parts of a matrix."""
    if tensor.dim() != 2 or not len(tensor) or len(tensor) % parts:
        raise ValueError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, not {parts} parts: weights and params.json do not belong "
            "together"
        )
    return len(tensor) // parts
