"""Read the architecture from a Hugging Face `config.json`, in the older and the newer spelling of RoPE settings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    ModelArgs,
    RopeScaling,
    YarnScaling,
    check_int,
    check_number,
    read_json_object,
    with_keys_of_file,
)
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType

log = logging.getLogger("llama")

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
BLOCKS_METHOD = "ggml_blocks"  # the quant_method of weights in blocks, where others say gptq or awq: see D22
# The quant_methods whose matrices releases.py finds.
RELEASE_METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes")
MISTRAL_WINDOW = 4096  # transformers' default, where config.json has no sliding_window

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


def read_config(path: Path) -> tuple[ModelArgs, frozenset[int]]:
    """Return the architecture, and the ids that end a generation, of a config.json.

    Raise ValueError that names what is not supported, before any weight is looked at. Ignore keys that are not known,
    as transformers does, and log them: see D17.
    """
    config = read_json_object(path)
    found = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    known = isinstance(found, list) and bool(found) and isinstance(found[0], str) and found[0] in ARCHITECTURES
    described = ", ".join(map(str, found)) if isinstance(found, list) else repr(found)
    if not known and not _is_plain_llama(config):
        raise ValueError(f"{path} describes {described}: only {' and '.join(ARCHITECTURES)} are supported")
    implied = "mistral" if "MistralForCausalLM" in found else "llama"
    model_type = config.get("model_type") or implied
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"{path} has model_type {model_type!r}: only 'llama' and 'mistral' are supported")
    if model_type != implied:
        log.warning("%s: model_type %r is used, not architectures %s", path, model_type, described)
    _check_method(path, config)
    for key, expected in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if config.get(key) not in (None, expected):
            raise ValueError(f"{path} has {key} {config[key]!r}: only {expected!r} is supported")
    unknown = sorted(config.keys() - USED_CONFIG_KEYS - HARMLESS_CONFIG_KEYS)
    if unknown:
        log.warning("%s has keys that are ignored: %s", path, ", ".join(unknown))
    try:
        rope = _rope_parameters(path, config)
        args = ModelArgs(
            **{field: _required(config, key) for field, key in REQUIRED_CONFIG_KEYS.items()},
            **{field: config.get(key) for field, key in OPTIONAL_CONFIG_KEYS.items()},  # type: ignore[arg-type]
            **{field: _true_or_false(config, key) for field, key in CONFIG_FLAGS.items()},
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10000.0),
            rope_scaling=_read_rope_scaling(rope, config),
            # Llama's own code has no window, whatever the key says.
            sliding_window=config.get("sliding_window", MISTRAL_WINDOW) if model_type == "mistral" else None,
        )
        return args, token_ids(config.get("eos_token_id"))
    except ValueError as error:
        keys = {**REQUIRED_CONFIG_KEYS, **OPTIONAL_CONFIG_KEYS, "norm_eps": "rms_norm_eps"}
        raise ValueError(f"{path}: {with_keys_of_file(error, keys)}") from None


def read_block_types(path: Path) -> dict[str, BlockType]:
    """Return the block types of the tensors that are blocks, by the names that they have in a folder's files."""
    config = read_json_object(path)
    _check_method(path, config)
    if _release(config) or config.get("quantization_config") is None:
        return {}
    types = config["quantization_config"].get("types")
    if not isinstance(types, dict):
        raise ValueError(f"{path}: quantization_config must have an object `types`, from tensors to types of blocks")
    for name, type_name in types.items():
        if not isinstance(type_name, str) or type_name not in BLOCK_TYPES:
            raise ValueError(
                f"{path}: quantization_config gives {name} the type {type_name!r}, only {', '.join(BLOCK_TYPES)} work"
            )
    return {name: BLOCK_TYPES[type_name] for name, type_name in types.items()}


def read_release(path: Path) -> Mapping[str, Any] | None:
    """Return what a config.json says of a quantized release of RELEASE_METHODS; None where the weights are none."""
    return _release(read_json_object(path))


def _release(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    settings = config.get("quantization_config")
    is_release = isinstance(settings, dict) and settings.get("quant_method") in RELEASE_METHODS
    return settings if is_release else None


def _check_method(path: Path, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings is not None and _release(config) is None and method != BLOCKS_METHOD:
        raise ValueError(
            f"{path} describes {method!r} quantized weights, which are not supported: only "
            f"{', '.join(RELEASE_METHODS)} are; or use unquantized ones"
        )


def token_ids(value: Any) -> frozenset[int]:
    """Return the ids of an eos_token_id as it is written: an id, a list of ids, or nothing."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return frozenset(ids)


def _is_plain_llama(config: Mapping[str, Any]) -> bool:
    """Recognize old conversions, which leave `architectures` out or name it LLaMAForCausalLM."""
    return config.get("model_type") == "llama" and config.get("architectures") in (None, [], ["LLaMAForCausalLM"])


def _required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{key} is missing")
    return config[key]


def _true_or_false(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def _rope_parameters(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings of either spelling as one dictionary, with every key that may stand beside them.

    Where a file says two things, decide as transformers does, and log it: rope_scaling goes before rope_parameters,
    whose rope_theta is then ignored as well; a rope_theta beside them counts where they have none, an original context
    beside them in any case.
    """
    given = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    if not all(isinstance(settings, dict) for settings in given):
        raise ValueError(f"rope_scaling and rope_parameters must be objects, got {given}")
    spellings = [settings for settings in given if settings] or [{}]
    if spellings[0].get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {spellings[0]['partial_rotary_factor']!r} is not supported")
    used, *others = [_filled_in(settings, config) for settings in spellings]
    beside = [(config.get(key), spellings[0].get(key)) for key in ("rope_theta", "original_max_position_embeddings")]
    if any(other != used for other in others) or any(a != b and None not in (a, b) for a, b in beside):
        log.warning("%s says two things about RoPE: %s is used", path, used)
    return used


def _filled_in(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings under the newer keys, with what they leave to keys beside them."""
    old_context_len = "original_max_position_embeddings"
    thetas = [theta for theta in (settings.get("rope_theta"), config.get("rope_theta")) if theta is not None]
    return {key: value for key, value in settings.items() if key != "type"} | {
        "rope_type": settings.get("rope_type") or settings.get("type") or "default",
        "rope_theta": thetas[0] if thetas else 10000.0,
        old_context_len: config.get(old_context_len) or settings.get(old_context_len),
    }


def _read_rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope["rope_type"]
    context_len = config.get("max_position_embeddings", 2048)
    old_context_len = rope["original_max_position_embeddings"] or context_len
    if kind == "default":
        return None
    check_int("max_position_embeddings", context_len)
    check_int("original_max_position_embeddings", old_context_len)
    if kind == "linear":
        return LinearScaling(_required(rope, "factor"))
    if kind == "dynamic":
        return DynamicScaling(_required(rope, "factor"), context_len)
    if kind == "llama3":
        factors = {key: _required(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return Llama3Scaling(**factors, old_context_len=old_context_len)
    if kind == "yarn":
        factor = rope.get("factor") or context_len / old_context_len
        return YarnScaling(
            factor,
            old_context_len,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=_true_or_false(rope, "truncate", True),
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported: only linear, dynamic, llama3 and yarn are")


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """Return attention_factor as given, else by mscale and mscale_all_dim where both are set, else None."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None or not (mscale and all_dim):
        return rope.get("attention_factor")
    for name, value in (("factor", factor), ("mscale", mscale), ("mscale_all_dim", all_dim)):
        check_number(name, value)
    if factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
