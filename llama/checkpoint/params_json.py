"""Read the architecture from Meta's `params.json`, of Llama 4, too, and from Mistral's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.hf_experts import query_scaling
from llama.checks import check_int, check_number
from llama.config import MAX_LAYERS, Experts, ModelArgs, read_json_object, with_keys_of_file

# Keys of released params.json files that say nothing about the computation.
HARMLESS_KEYS = {
    "max_seq_len", "max_batch_size", "model_parallel_size", "dtype", "name", "_name_or_path", "max_position_embeddings",
}  # fmt: skip

# Keys about the form of the weights, which llama.checkpoint.meta_releases reads.
RELEASE_KEYS = {"quantization_args", "lora_args"}

# Keys that matter to it; the other fields of ModelArgs come from other formats.
USED_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "head_dim", "hidden_dim", "sliding_window",
}  # fmt: skip

_VISION = "a vision model: only text models are supported"
# Keys that mean another architecture or another kind of weights, and why they are refused.
REFUSED_KEYS = {
    "vision_args": _VISION,
    "vision_chunk_size": _VISION,
    "vision_max_num_chunks": _VISION,
    "vision_num_cross_attention_layers": _VISION,
}

# Keys of params.json about scaled RoPE, and the fields of Llama3Scaling that they set.
ROPE_KEYS = {"rope_scaling_factor": "factor", "rope_high_freq_factor": "high_freq_factor"}
# What these are in Llama 4, whose files do not say it.
LLAMA4_ROPE = {"factor": 16.0, "high_freq_factor": 1.0}
# Llama 4's keys beside Llama 3's; what sees pictures in it is beside its text model, and left out.
LLAMA4_PARAMS = {
    "moe_args", "ffn_exp", "attention_chunk_size", "nope_layer_interval", "use_qk_norm", "attn_temperature_tuning",
    "floor_scale", "attn_scale", "vision_args",
}  # fmt: skip
MOE_KEYS = {"num_experts", "capacity_factor", "auto_scale_F", "top_k", "interleave_moe_layer_step"}
MISTRAL_MOE_KEYS = {"num_experts", "num_experts_per_tok"}


def read_params(path: Path) -> ModelArgs:
    """Read Meta's or Mistral's params.json; raise ValueError for a key that is neither used nor known to be harmless.

    A key of null means the same as none.
    """
    params = {key: value for key, value in read_json_object(path).items() if value is not None}
    is_llama4 = "moe_args" in params
    for key in params.keys() & REFUSED_KEYS.keys() - (LLAMA4_PARAMS if is_llama4 else set()):
        raise ValueError(f"{path} has {key!r}: {REFUSED_KEYS[key]}")
    fields = {key: value for key, value in params.items() if key not in HARMLESS_KEYS | RELEASE_KEYS}
    factors = {name: fields.pop(key) for key, name in ROPE_KEYS.items() if key in fields}
    known = USED_KEYS | (LLAMA4_PARAMS if is_llama4 else {"moe"})
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}: this architecture is not supported")
    try:
        if is_llama4:
            fields, factors = _llama4_fields(fields), LLAMA4_ROPE | factors
        elif "moe" in fields:
            fields["experts"] = _mistral_experts(fields.pop("moe"), fields.get("hidden_dim"))
        args = ModelArgs(**fields)
        if args.rope_scaling is None:
            return args
        return dataclasses.replace(args, rope_scaling=dataclasses.replace(args.rope_scaling, **factors))
    except ValueError as error:
        keys = {"n_experts": "num_experts", "n_active": "top_k" if is_llama4 else "num_experts_per_tok"}
        raise ValueError(f"{path}: {with_keys_of_file(error, keys)}") from None


def _mistral_experts(moe: object, hidden_dim: Any) -> Experts:
    found = _object("moe", moe, MISTRAL_MOE_KEYS)
    return Experts(found.get("num_experts", 0), found.get("num_experts_per_tok", 0), hidden_dim)


def _llama4_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelArgs that a params.json of Llama 4 sets."""
    fields = {key: value for key, value in params.items() if key not in LLAMA4_PARAMS}
    n_layers, interval = params.get("n_layers"), params.get("nope_layer_interval")
    check_int("n_layers", n_layers, most=MAX_LAYERS)
    assert type(n_layers) is int
    unrotated: tuple[int, ...] = ()
    if interval is not None:
        check_int("nope_layer_interval", interval)
        unrotated = tuple(i for i in range(n_layers) if (i + 1) % interval == 0)
    scaling = None
    if unrotated and params.get("attn_temperature_tuning"):
        scaling = query_scaling(params.get("attn_scale", 0.1), params.get("floor_scale", 8192))
    moe = _object("moe_args", params["moe_args"], MOE_KEYS)
    step = moe.get("interleave_moe_layer_step", 1)
    check_int("interleave_moe_layer_step", step)
    hidden_dim = _expert_hidden_dim(params, moe)
    return fields | {
        "attention_chunk": params.get("attention_chunk_size"),
        "unrotated_layers": unrotated,
        "full_layers": unrotated,
        "qk_norm": "unit" if params.get("use_qk_norm") else None,
        "query_scaling": scaling,
        "experts": Experts(
            n_experts=moe.get("num_experts", 0),
            n_active=moe.get("top_k", 1),
            hidden_dim=hidden_dim,
            router="sigmoid of input",
            shared_hidden_dim=hidden_dim,
            dense_layers=tuple(i for i in range(n_layers) if (i + 1) % step),
        ),
    }


def _expert_hidden_dim(params: Mapping[str, Any], moe: Mapping[str, Any]) -> int:
    """Return the hidden features of an expert, by the rule of Llama 4's MoE."""
    dim, multiple_of = params.get("dim", 4096), params.get("multiple_of", 256)
    check_int("dim", dim)
    check_int("multiple_of", multiple_of)
    numbers = params.get("ffn_exp", 4.0), params.get("ffn_dim_multiplier", 1.0), moe.get("capacity_factor", 1.0)
    for name, value in zip(("ffn_exp", "ffn_dim_multiplier", "capacity_factor"), numbers, strict=True):
        check_number(name, value)
    exponent, multiplier, capacity = numbers
    hidden_dim = int(multiplier * int(2 * int(exponent * dim) / 3))
    if moe.get("auto_scale_F", True):
        hidden_dim = int(hidden_dim / (capacity + 1))
    return hidden_dim + -hidden_dim % multiple_of


def _object(key: str, value: object, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not known.issuperset(value):
        raise ValueError(f"{key} must be an object with keys of {', '.join(sorted(known))}, got {value!r}")
    return value
