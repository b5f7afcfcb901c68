"""Read from a GGUF file's metadata what mixtures of experts say, and what llama.cpp knows of Llama 4 without a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.checkpoint.family import Family
from llama.checks import check_int
from llama.config import MAX_LAYERS, Experts, ModelArgs
from llama.rope_scaling import QueryScaling

COUNT, USED_COUNT = "llama.expert_count", "llama.expert_used_count"
HIDDEN, SHARED_HIDDEN = "llama.expert_feed_forward_length", "llama.expert_shared_feed_forward_length"
STEP = "llama.interleave_moe_layer_step"
WINDOW = "llama.attention.sliding_window"
EXPERTS_KEYS = {COUNT, USED_COUNT, HIDDEN, SHARED_HIDDEN, STEP, WINDOW}

# Llama 4, as released: tokens of a chunk, and how queries are scaled.
LLAMA4_CHUNK = 8192
LLAMA4_SCALING = QueryScaling(0.1, 8192, shift=1)
LLAMA4_WITHOUT_NORMS = 128  # experts of the model whose queries and keys are not normalised


def read_gguf_experts(metadata: Mapping[str, Any], family: Family) -> Experts | None:
    """Return the experts of a file, whose metadata is under llama's keys; None where it has none."""
    if metadata.get(COUNT, 0) == 0:
        return None
    if USED_COUNT not in metadata:
        raise ValueError(f"{USED_COUNT} is missing, of {metadata[COUNT]!r} experts")
    router = family.router or "softmax of chosen"  # Mixtral's files say that they are llama's
    hidden_dim, n_layers = metadata.get(HIDDEN, metadata.get("llama.feed_forward_length")), _n_layers(metadata)
    step = metadata.get(STEP, 1) if router == "sigmoid of input" else 1
    check_int(STEP, step)
    return Experts(
        n_experts=metadata[COUNT],
        n_active=metadata[USED_COUNT],
        hidden_dim=hidden_dim,
        router=router,
        shared_hidden_dim=hidden_dim if router == "sigmoid of input" else None,
        dense_layers=tuple(i for i in range(n_layers) if (i + 1) % step),
    )


def gguf_llama4_fields(metadata: Mapping[str, Any], args: ModelArgs) -> dict[str, Any]:
    """Return the fields of ModelArgs about attention that Llama 4's files leave to whoever reads them."""
    norm = None if metadata.get(COUNT) == LLAMA4_WITHOUT_NORMS else "unit"
    if metadata.get(WINDOW) == 0:  # all layers are rotated and see all, as in small models of that architecture
        return {"qk_norm": norm, "unrotated_layers": ()}
    return {
        "qk_norm": norm,
        "attention_chunk": LLAMA4_CHUNK,
        "full_layers": args.unrotated_layers,
        "query_scaling": LLAMA4_SCALING if args.unrotated_layers else None,
    }


def _n_layers(metadata: Mapping[str, Any]) -> int:
    n_layers = metadata.get("llama.block_count")
    check_int("llama.block_count", n_layers, most=MAX_LAYERS)
    assert type(n_layers) is int
    return n_layers
