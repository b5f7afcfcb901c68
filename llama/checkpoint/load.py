"""Fill a model built on the meta device with this rank's part of a checkpoint, strictly and one tensor at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.format import Checkpoint, kind, shard_dim
from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import ModelParallel

# Stored by Meta, computed here.
DERIVED = {"rope.freqs"}


def load_weights(model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Assign every parameter of a meta-device model; ValueError names missing, unexpected and mis-shaped tensors.

    Host memory peaks at this rank's part plus one tensor; a part that is a view of the mapped file, in the dtype
    asked for, is used where it lies.
    """
    expected = check_weights(checkpoint, model.args)
    for name in expected:
        part = read_part(checkpoint, name, model.args, model.parallel)
        parent, _, attribute = name.rpartition(".")
        parameter = model.get_parameter(name)
        assert part.shape == parameter.shape, (name, part.shape, parameter.shape)
        part = torch.nn.Parameter(part.to(device, dtype).contiguous(), requires_grad=False)
        setattr(model.get_submodule(parent), attribute, part)
    if model.args.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.to(device)  # what is computed and not loaded: the rotary frequencies


def check_weights(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole tensors; ValueError unless they are those that the configuration asks for."""
    expected = global_shapes(args)
    check_names(checkpoint, set(expected))
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise ValueError(
                f"{checkpoint.path}: {name} has shape {checkpoint.shape(name)}, its configuration asks for {shape}: "
                "weights and configuration do not belong together, or some files are missing"
            )
    return expected


def read_part(checkpoint: Checkpoint, name: str, args: ModelArgs, parallel: ModelParallel) -> Tensor:
    """This rank's part of a tensor, padded with zeros where the ranks do not divide it."""
    dim = shard_dim(name)
    if dim is None or parallel.size == 1:
        return checkpoint.read(name)
    if kind(name) in ("wk", "wv"):
        return _read_kv_heads(checkpoint, name, args, parallel)
    total = checkpoint.shape(name)[dim]
    part = checkpoint.read(name, dim, *parallel.span(total))
    padding = parallel.part(total) - part.shape[dim]
    return F.pad(part, (0, 0) * (part.dim() - 1 - dim) + (0, padding)) if padding else part


def _read_kv_heads(checkpoint: Checkpoint, name: str, args: ModelArgs, parallel: ModelParallel) -> Tensor:
    heads = parallel.kv_heads(args.n_heads, args.n_kv_heads)
    first, last = heads[0], heads[-1]
    rows = checkpoint.read(name, 0, first * args.head_dim, (last + 1) * args.head_dim)
    if heads == list(range(first, last + 1)):
        return rows
    picked = torch.tensor([head - first for head in heads])
    return rows.unflatten(0, (-1, args.head_dim))[picked].flatten(0, 1)


def check_names(checkpoint: Checkpoint, expected: set[str]) -> None:
    """ValueError when the checkpoint lacks a tensor, or has one that the model would silently ignore."""
    found = set(checkpoint.names()) - DERIVED
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{checkpoint.path} {what} tensors {some}{more}: the configuration does not describe it")


def global_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every whole tensor of a model."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layer = {
        "attention.wq": (q_dim, args.dim),
        "attention.wk": (kv_dim, args.dim),
        "attention.wv": (kv_dim, args.dim),
        "attention.wo": (args.dim, q_dim),
        "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim),
        "feed_forward.w3": (args.hidden_dim, args.dim),
    }
    biased = {"attention": args.attention_bias, "feed_forward": args.mlp_bias}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        for name, shape in layer.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            if biased[name.partition(".")[0]]:
                shapes[f"layers.{i}.{name}.bias"] = shape[:1]
        shapes |= {f"layers.{i}.{name}.weight": (args.dim,) for name in ("attention_norm", "ffn_norm")}
    shapes["norm.weight"] = (args.dim,)
    if not args.tied_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes
