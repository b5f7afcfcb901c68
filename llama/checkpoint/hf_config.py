"""Read the architecture from a Hugging Face `config.json`, in the older and the newer spelling of RoPE settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoint.families import ATTENTION, FAMILIES, FEED_FORWARD, REFUSED, Family, Multipliers, supported
from llama.checkpoint.hf_rope import read_rope_scaling, required, rope_parameters, true_or_false
from llama.checkpoint.release_config import read_release
from llama.checks import check_int, check_number
from llama.config import ModelArgs, read_json_object, with_keys_of_file
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType

log = logging.getLogger("llama")

# Fields of ModelArgs and the keys of config.json that say them: those that must be there, and those that may.
REQUIRED_CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
}
OPTIONAL_CONFIG_KEYS = {"n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
CONFIG_FLAGS = {"tied_embeddings": "tie_word_embeddings", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Granite's multipliers, and the other keys that some families have.
GRANITE_KEYS = {
    "embedding": "embedding_multiplier",
    "residual": "residual_multiplier",
    "scores": "attention_multiplier",
    "logits": "logits_scaling",
}
FAMILY_CONFIG_KEYS = {
    *GRANITE_KEYS.values(), "scale_emb", "scale_depth", "dim_model_base", "num_experts", "sparse_config",
    "attention_out_bias", "use_sliding_window", "layer_types",
}  # fmt: skip

USED_CONFIG_KEYS = {
    *REQUIRED_CONFIG_KEYS.values(), *OPTIONAL_CONFIG_KEYS.values(), *CONFIG_FLAGS.values(), "architectures",
    "model_type", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "max_position_embeddings", "original_max_position_embeddings", "hidden_act", "partial_rotary_factor",
    "quantization_config", "eos_token_id",
}  # fmt: skip
# Keys that say nothing about the computation of inference.
HARMLESS_CONFIG_KEYS = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attention_dropout", "auto_map",
    "bos_token_id", "dtype", "initializer_range", "max_sequence_length", "max_window_layers", "pad_token_id",
    "pretraining_tp", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "use_cache",
    "is_llama_config", "rope_interleaved", "neftune_noise_alpha", "id2label", "label2id", "return_dict",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What a config.json says: the architecture before multipliers are folded, and the ids that end a generation."""

    args: ModelArgs
    stop_tokens: frozenset[int]
    family: Family
    biased: frozenset[str]  # modules that have a bias
    multipliers: Multipliers


def read_config(path: Path) -> Config:
    """Read a config.json.

    Raise ValueError that names what is not supported, before any weight is looked at. Ignore keys that are not known,
    as transformers does, and log them: see D17.
    """
    config = read_json_object(path)
    family = _family(path, config)
    read_release(path.parent)  # which refuses other quantized ones
    own_keys = family.keys
    known = USED_CONFIG_KEYS | HARMLESS_CONFIG_KEYS | set(own_keys.values())
    unknown = sorted(config.keys() - known - (set() if family is FAMILIES["llama"] else FAMILY_CONFIG_KEYS))
    if unknown:
        log.warning("%s has keys that are ignored: %s", path, ", ".join(unknown))
    config = {**family.defaults, **config, **{key: config[own] for key, own in own_keys.items() if own in config}}
    rotated = 1.0 if family.is_partly_rotated else config.get("partial_rotary_factor")
    for key, value, expected in (
        ("hidden_act", config.get("hidden_act"), "silu"),
        ("partial_rotary_factor", rotated, 1.0),
    ):
        if value not in (None, expected):
            raise ValueError(f"{path} has {own_keys.get(key, key)} {value!r}: only {expected!r} is supported")
    try:
        for key in ("num_experts", "sparse_config"):
            if family is FAMILIES["minicpm"] and config.get(key):
                raise ValueError(f"{key} {config[key]!r} is not supported: only dense models with full attention are")
        rope = rope_parameters(path, config, family)
        for key in CONFIG_FLAGS.values():  # those, too, that the family does not read
            true_or_false(config, key)
        biases = {name: key is True or true_or_false(config, str(key)) for name, key in family.biases.items()}
        biased = frozenset(name for name, has in biases.items() if has)
        args = ModelArgs(
            **{field: required(config, key) for field, key in REQUIRED_CONFIG_KEYS.items()},
            **{field: config.get(key) for field, key in OPTIONAL_CONFIG_KEYS.items()},  # type: ignore[arg-type]
            tied_embeddings=true_or_false(config, "tie_word_embeddings"),
            attention_bias=not biased.isdisjoint(ATTENTION),
            mlp_bias=not biased.isdisjoint(FEED_FORWARD),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10000.0),
            rope_scaling=read_rope_scaling(rope, config),
            sliding_window=_window(config, family),
            rotary_dim=_rotary_dim(config, rope),
        )
        return Config(args, token_ids(config.get("eos_token_id")), family, biased, _multipliers(config, family, args))
    except ValueError as error:
        keys = {**REQUIRED_CONFIG_KEYS, **OPTIONAL_CONFIG_KEYS, "norm_eps": "rms_norm_eps"}
        keys |= {**{field: own_keys[key] for field, key in keys.items() if key in own_keys}, **own_keys}
        raise ValueError(f"{path}: {with_keys_of_file(error, keys)}") from None


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    """Return the row of the table that a config.json is of; raise ValueError that says why where there is none."""
    found, model_type = config.get("architectures") or [], config.get("model_type")
    first = found[0] if isinstance(found, list) and found else None
    described = ", ".join(map(str, found)) if isinstance(found, list) and found else repr(found or model_type)
    implied = next((name for name, row in FAMILIES.items() if first in row.architectures), None)
    if model_type is None:
        model_type = implied
    reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if reason is not None:
        raise ValueError(f"{path} describes {described}, which {reason}: it is not supported, as {supported()} are")
    if (found and implied is None) or not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path} describes {described} of model_type {model_type!r}: only {supported()} are supported")
    family = FAMILIES[model_type]
    if found and first not in family.architectures:
        log.warning("%s: model_type %r is used, not architectures %s", path, model_type, described)
    return family


def _rotary_dim(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int | None:
    """Return how many dimensions of a head are rotated; None for all."""
    part = rope["partial_rotary_factor"]
    check_number("partial_rotary_factor", part)
    if part == 1.0:
        return None
    dim, n_heads = (required(config, key) for key in ("hidden_size", "num_attention_heads"))
    check_int("hidden_size", dim)
    check_int("num_attention_heads", n_heads)
    head_dim = config.get("head_dim") or dim // n_heads
    check_int("head_dim", head_dim)
    return int(head_dim * part)


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the sliding window of all layers, where there is one.

    Llama's own code has no window, whatever the key says. Raise ValueError where some layers have one and others none,
    unless no text that the model was trained for is longer.
    """
    window = config.get("sliding_window")
    if family.window == "none" or window is None:
        return None
    n_layers = required(config, "num_hidden_layers")
    check_int("num_hidden_layers", n_layers)
    kinds = config.get("layer_types")
    if family.window == "if used":
        if not true_or_false(config, "use_sliding_window"):
            return None
        full = config.get("max_window_layers", 28)  # the first layers
        check_number("max_window_layers", full + 1 if type(full) is int else full)
        has_window = [i >= full for i in range(n_layers)]
    else:
        has_window = [family.window != "three of four" or i % 4 != 0 for i in range(n_layers)]
    if kinds is not None and family.window != "all":
        if not isinstance(kinds, list) or len(kinds) != n_layers or not LAYER_TYPES.issuperset(map(str, kinds)):
            raise ValueError(f"layer_types must be a list of {n_layers}, each of {sorted(LAYER_TYPES)}, got {kinds!r}")
        has_window = [kind == "sliding_attention" for kind in kinds]
    if not any(has_window):
        return None
    if not all(has_window):
        context_len = config.get("max_position_embeddings")
        check_int("max_position_embeddings", context_len)
        check_int("sliding_window", window)
        if window < context_len:
            raise ValueError(
                f"sliding_window {window} in {sum(has_window)} of {n_layers} layers is not supported: "
                "only a window in all layers, or in none, is"
            )
        return None
    return window


def _multipliers(config: Mapping[str, Any], family: Family, args: ModelArgs) -> Multipliers:
    if family is FAMILIES["granite"]:
        given = {field: config.get(key, 1.0) for field, key in GRANITE_KEYS.items()}
        for field, value in given.items():
            check_number(GRANITE_KEYS[field], value)
        return Multipliers(**given | {"scores": given["scores"] * math.sqrt(args.head_dim)})
    if family is FAMILIES["minicpm"]:
        table, depth, base = (required(config, key) for key in ("scale_emb", "scale_depth", "dim_model_base"))
        for key, value in (("scale_emb", table), ("scale_depth", depth), ("dim_model_base", base)):
            check_number(key, value)
        return Multipliers(embedding=table, residual=depth / math.sqrt(args.n_layers), logits=args.dim / base)
    return Multipliers()


def read_block_types(path: Path) -> dict[str, BlockType]:
    """Return the block types of the tensors that are blocks, by the names that they have in a folder's files."""
    settings = read_json_object(path).get("quantization_config")
    if settings is None or read_release(path.parent) is not None:
        return {}
    types = settings.get("types")
    if not isinstance(types, dict):
        raise ValueError(f"{path}: quantization_config must have an object `types`, from tensors to types of blocks")
    for name, type_name in types.items():
        if not isinstance(type_name, str) or type_name not in BLOCK_TYPES:
            raise ValueError(
                f"{path}: quantization_config gives {name} the type {type_name!r}, only {', '.join(BLOCK_TYPES)} work"
            )
    return {name: BLOCK_TYPES[type_name] for name, type_name in types.items()}


def token_ids(value: Any) -> frozenset[int]:
    """Return the ids of an eos_token_id as it is written: an id, a list of ids, or nothing."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return frozenset(ids)
