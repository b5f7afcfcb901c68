"""Read the architecture from a Hugging Face `config.json`, in the older and the newer spelling of RoPE settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama.checkpoint.families import FAMILIES, supported
from llama.checkpoint.family import ATTENTION, FEED_FORWARD, Family
from llama.checkpoint.hf_experts import (
    EXPERTS_CONFIG_KEYS,
    LLAMA4_KEYS,
    OTHER_EXPERTS_KEYS,
    llama4_fields,
    read_experts,
)
from llama.checkpoint.hf_layers import read_layers
from llama.checkpoint.hf_rope import read_rope, required, true_or_false
from llama.checkpoint.multipliers import Multipliers
from llama.checkpoint.refused import REFUSED
from llama.checkpoint.release_config import read_release
from llama.checks import check_number
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
# Keys beside the text_config of a model that sees pictures, too, which count for its model of text.
BESIDE_TEXT = {"_name_or_path", "eos_token_id", "quantization_config", "tie_word_embeddings"}
# Granite's multipliers, and the other keys that some families have.
GRANITE_KEYS = {
    "embedding": "embedding_multiplier",
    "residual": "residual_multiplier",
    "scores": "attention_multiplier",
    "logits": "logits_scaling",
}
FAMILY_CONFIG_KEYS = {
    *GRANITE_KEYS.values(), "scale_emb", "scale_depth", "dim_model_base", "attention_out_bias", "use_sliding_window",
    "layer_types", "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval", "qk_norm",
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
    "hidden_dropout", "bos_token_id", "dtype", "initializer_range", "max_sequence_length", "max_window_layers",
    "pad_token_id", "pretraining_tp", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id",
    "use_cache", "is_llama_config", "rope_interleaved", "neftune_noise_alpha", "id2label", "label2id", "return_dict",
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
    config = read_text_config(path)
    family = _family(path, config)
    read_release(path.parent)  # which refuses other quantized ones
    known = USED_CONFIG_KEYS | HARMLESS_CONFIG_KEYS | {*family.keys.values(), *family.refused}
    known |= set() if family.router is None else {*EXPERTS_CONFIG_KEYS.values(), *OTHER_EXPERTS_KEYS}
    known |= LLAMA4_KEYS if family is FAMILIES["llama4_text"] else set()
    unknown = sorted(config.keys() - known - (set() if family is FAMILIES["llama"] else FAMILY_CONFIG_KEYS))
    if unknown:
        log.warning("%s has keys that are ignored: %s", path, ", ".join(unknown))
    return interpret(path, config, family)


def interpret(path: Path, said: Mapping[str, Any], family: Family) -> Config:
    """Return what the object of a family's config.json says; raise ValueError, which names the path."""
    own_keys = family.keys
    config = {**family.defaults, **said, **{key: said[own] for key, own in own_keys.items() if own in said}}
    activation = family.fields.get("activation", "silu")
    if config.get("hidden_act") not in (None, activation):
        key = own_keys.get("hidden_act", "hidden_act")
        raise ValueError(f"{path} has {key} {config['hidden_act']!r}: only {activation!r} is supported")
    try:
        for key, why in family.refused.items():
            if config.get(key):
                raise ValueError(f"{key} {config[key]!r} is not supported: {why}")
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
            experts=read_experts(config, family),
            **family.fields,
        )
        args = replace(args, **read_layers(config, family, args.n_layers))
        if family is FAMILIES["llama4_text"]:
            args = replace(args, **llama4_fields(config, args))
        args = replace(args, **read_rope(path, said, config, family, args))
        return Config(args, token_ids(config.get("eos_token_id")), family, biased, _multipliers(config, family, args))
    except ValueError as error:
        keys = {**REQUIRED_CONFIG_KEYS, **OPTIONAL_CONFIG_KEYS, "norm_eps": "rms_norm_eps"}
        keys |= EXPERTS_CONFIG_KEYS
        keys |= {**{field: own_keys[key] for field, key in keys.items() if key in own_keys}, **own_keys}
        raise ValueError(f"{path}: {with_keys_of_file(error, keys)}") from None


def read_text_config(path: Path) -> dict[str, Any]:
    """Read the object of a config.json; of a model that sees pictures, too, what it says of the model of text."""
    config = read_json_object(path)
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    beside = {key: value for key, value in config.items() if key in BESIDE_TEXT}
    if config.get("model_type") == "llama4":
        return {"model_type": "llama4_text", "tie_word_embeddings": False, **beside, **text}
    if config.get("model_type") != "mistral3":
        return config
    return {"model_type": "mistral", "tie_word_embeddings": True, **text, **beside}


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


def _multipliers(config: Mapping[str, Any], family: Family, args: ModelArgs) -> Multipliers:
    if family in (FAMILIES["granite"], FAMILIES["granitemoe"]):
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
