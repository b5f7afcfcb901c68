"""Take away in what families' tensors differ: fused ones, biases that only some modules have, the order of rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.family import Family
from llama.checkpoint.names import XIELU_PARTS, NamingScheme, meta_name, module_name
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs

# Modules of a layer that hold several of the model's, one after the other.
FUSED: dict[NamingScheme, dict[str, tuple[str, ...]]] = {
    "hf": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    "gguf": {"attn_qkv": ("attn_q", "attn_k", "attn_v")},
}
GATE_IN_UP = {"ffn_up": ("ffn_gate", "ffn_up")}  # of some families of GGUF's alone


def parts_of_fused(
    module: str, parts_by_module: Mapping[str, tuple[str, ...]], args: ModelArgs, scheme: NamingScheme
) -> list[tuple[str, int]]:
    """Return the modules that a fused one holds, by names like its own, with their rows; nothing if it is none."""
    for fused, parts in parts_by_module.items():
        prefix = module.removesuffix(fused)
        if prefix != module:
            names = [f"{prefix}{part}" for part in parts]
            return [(name, _rows(module_name(meta_name(f"{name}.weight", scheme)), args)) for name in names]
    return []


def _rows(module: str, args: ModelArgs) -> int:
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads, "wv": args.n_kv_heads}
    return heads[module] * args.head_dim if module in heads else args.hidden_dim


def unfused(
    path: Path,
    tensors: Mapping[str, Any],
    parts_by_module: Mapping[str, tuple[str, ...]],
    args: ModelArgs,
    scheme: NamingScheme,
) -> Iterator[tuple[str, Any]]:
    """Yield tensors by their names in a file, with what fused ones hold in their place.

    Raise ValueError where one has not the rows that the architecture asks for.
    """
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        parts = parts_of_fused(module, parts_by_module, args, scheme)
        if not parts:
            yield name, tensor
            continue
        n_rows = sum(rows for _, rows in parts)
        if not tensor.shape or tensor.shape[0] != n_rows:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, its configuration asks for {n_rows} rows: weights "
                "and configuration do not belong together"
            )
        first = 0
        for part, rows in parts:
            yield f"{part}.{kind}", tensor[first : first + rows]
            first += rows


def missing_biases(
    path: Path, args: ModelArgs, biased: Collection[str], names: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the biases that are zeros: of modules without one, where others have one.

    Raise ValueError where a file has one of these.
    """
    biases = (each for each in global_shapes(args).items() if each[0].endswith(".bias") and "norm" not in each[0])
    missing = {name: shape for name, shape in biases if module_name(name) not in biased}
    for name in missing:
        if name in names:
            raise ValueError(f"{path} has an unexpected bias of {name.removesuffix('.bias')}")
    return missing


def norm_offset(name: str, family: Family) -> float:
    """Return what is added to a tensor of a Hugging Face folder: to the weights of some families' norms, 1."""
    return family.hf_norm_offset if name.endswith("norm.weight") else 0.0


def xielu_weight(alpha_p: float, alpha_n: float, beta: float, eps: float) -> Tensor:
    """Return the weight of `llama.norms.XIELU` for what files have, whose alphas were trained before a softplus."""
    alphas = F.softplus(torch.tensor([alpha_p, alpha_n], dtype=torch.float32, device="cpu"))
    return torch.cat([alphas, alphas.new_tensor([beta, eps])]) + alphas.new_tensor([0.0, beta, 0.0, 0.0])


def xielu_parts(weight: Tensor) -> dict[str, Tensor]:
    """Return what files have for the weight of an xIELU, as `xielu_weight` reads it."""
    alpha_p, alpha_n, beta, eps = weight.float()
    alphas = torch.stack([alpha_p, alpha_n - beta])
    before = (alphas + torch.log(-torch.expm1(-alphas))).split(1)
    return dict(zip(XIELU_PARTS, (*before, beta, eps), strict=True))


def pair_neighbours(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Put rows of whole heads from Hugging Face's order, whose RoPE rotates halves, into Meta's, with neighbours.

    rotary_dim: how many rows of a head are rotated, if not all; the others stay behind them.
    """
    dim = rotary_dim or head_dim
    heads = rows.unflatten(0, (-1, head_dim))
    rotated = heads[:, :dim].unflatten(1, (2, dim // 2)).transpose(1, 2).flatten(1, 2)
    return (rotated if dim == head_dim else torch.cat([rotated, heads[:, dim:]], dim=1)).flatten(0, 1)


def pair_halves(rows: Tensor, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """Put rows of whole heads from Meta's order, whose RoPE rotates neighbours, into Hugging Face's, with halves.

    rotary_dim: as in pair_neighbours, whose inverse this is.
    """
    dim = rotary_dim or head_dim
    heads = rows.unflatten(0, (-1, head_dim))
    rotated = heads[:, :dim].unflatten(1, (dim // 2, 2)).transpose(1, 2).flatten(1, 2)
    return (rotated if dim == head_dim else torch.cat([rotated, heads[:, dim:]], dim=1)).flatten(0, 1)


def part_of_pairs(
    rows: Callable[[int, int], Tensor], n_rows: int, args: ModelArgs, dim: int, start: int, stop: int
) -> Tensor:
    """Return indices [start, stop) along `dim` of a matrix of whole heads, of halves, in Meta's order.

    rows: returns rows [first, last) of the matrix, of n_rows, as they are stored.
    """
    if dim != 0:
        return pair_neighbours(rows(0, n_rows).narrow(dim, start, stop - start), args.head_dim, args.rotary_dim)
    # The order changes within heads, so the heads around the rows are read.
    first = start - start % args.head_dim
    last = min(-(-stop // args.head_dim) * args.head_dim, n_rows)
    return pair_neighbours(rows(first, last), args.head_dim, args.rotary_dim).narrow(0, start - first, stop - start)
