"""Read from a `config.json` what mixtures of experts say, and Llama 4's other settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.checkpoint.family import Family
from llama.checkpoint.hf_rope import required, true_or_false
from llama.checks import check_int, check_number
from llama.config import MAX_LAYERS, Experts, ModelArgs
from llama.rope_scaling import QueryScaling

# Fields of Experts and the keys of config.json that say them, by the names that families' own are called here.
EXPERTS_CONFIG_KEYS = {
    "n_experts": "num_experts",
    "n_active": "num_experts_per_tok",
    "shared_hidden_dim": "shared_expert_intermediate_size",
}
OTHER_EXPERTS_KEYS = {
    "num_local_experts", "moe_intermediate_size", "norm_topk_prob", "moe_layers", "interleave_moe_layer_step",
    "decoder_sparse_step", "mlp_only_layers", "clip_qkv", "router_aux_loss_coef", "router_jitter_noise",
    "output_router_logits",
}  # fmt: skip
LLAMA4_KEYS = {
    "attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale", "use_qk_norm", "no_rope_layers",
    "no_rope_layer_interval", "for_llm_compressor", "layer_types",
}  # fmt: skip
CHUNKED_LAYER_TYPES = {"chunked_attention", "full_attention"}


def read_experts(config: Mapping[str, Any], family: Family) -> Experts | None:
    """Return a family's experts; None where it has none, or none in any layer."""
    if family.router is None:
        return None
    n_layers = required(config, "num_hidden_layers")
    check_int("num_hidden_layers", n_layers, most=MAX_LAYERS)
    router = family.router
    if "norm_topk_prob" in family.defaults:  # others have no such choice, whatever a file says
        router = "softmax of chosen" if true_or_false(config, "norm_topk_prob") else "softmax"
    for key in ("clip_qkv", "use_sliding_window"):
        if config.get(key) not in (None, False):
            raise ValueError(f"{key} {config[key]!r} is not supported beside experts")
    dense = _dense_layers(config, n_layers)
    if len(dense) == n_layers:
        return None
    return Experts(
        n_experts=config.get("num_local_experts") or required(config, "num_experts"),  # both are written
        n_active=required(config, "num_experts_per_tok"),
        hidden_dim=required(config, "moe_intermediate_size"),
        router=router,
        shared_hidden_dim=config.get("shared_expert_intermediate_size"),
        dense_layers=dense,
    )


def _dense_layers(config: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """Return the layers that have one feed-forward, by either of the spellings of which have experts."""
    listed = config.get("moe_layers")
    if listed is not None:
        return tuple(i for i in range(n_layers) if i not in _numbers("moe_layers", listed))
    step = config.get("interleave_moe_layer_step", config.get("decoder_sparse_step")) or 1
    check_int("interleave_moe_layer_step", step)
    without = _numbers("mlp_only_layers", config.get("mlp_only_layers") or [])
    return tuple(i for i in range(n_layers) if (i + 1) % step or i in without)


def llama4_fields(config: Mapping[str, Any], args: ModelArgs) -> dict[str, Any]:
    """Return the fields of ModelArgs about attention that Llama 4's config.json sets, beside those that args have."""
    n_layers, unrotated = args.n_layers, args.unrotated_layers
    kinds = config.get("layer_types")
    full = unrotated
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != n_layers or not CHUNKED_LAYER_TYPES.issuperset(map(str, kinds)):
            wanted = sorted(CHUNKED_LAYER_TYPES)
            raise ValueError(f"layer_types must be a list of {n_layers}, each of {wanted}, got {kinds!r}")
        full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    scaling = None
    if config.get("attn_temperature_tuning", True) and unrotated:  # a number in early releases
        scaling = query_scaling(config.get("attn_scale", 0.1), config.get("floor_scale", 8192))
    return {
        "attention_chunk": config.get("attention_chunk_size"),
        "full_layers": full,
        "qk_norm": "unit" if true_or_false(config, "use_qk_norm", True) else None,
        "query_scaling": scaling,
    }


def query_scaling(beta: Any, period: Any) -> QueryScaling:
    """Return Llama 4's scaling of queries, whose positions count from 1."""
    check_number("floor_scale", period)
    if period != int(period):
        raise ValueError(f"floor_scale must be a whole number, got {period!r}")
    return QueryScaling(beta, int(period), shift=1)


def _numbers(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise ValueError(f"{key} must be a list of whole numbers, got {value!r}")
    return value
