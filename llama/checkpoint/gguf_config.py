"""Read the architecture from a GGUF file's metadata, under llama.cpp's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.config import FactorScaling, LinearScaling, ModelArgs, RopeScaling, YarnScaling
from llama.tokenizer.gguf_tokens import KNOWN_TOKENIZER_KEYS, TOKENIZER_KEY

# Fields of ModelArgs and the keys that say them: integers that must be there, and those that may.
REQUIRED_GGUF_KEYS = {
    "dim": "llama.embedding_length",
    "n_layers": "llama.block_count",
    "n_heads": "llama.attention.head_count",
    "hidden_dim": "llama.feed_forward_length",
}
OPTIONAL_GGUF_KEYS = {"n_kv_heads": "llama.attention.head_count_kv", "head_dim": "llama.attention.key_length"}
OTHER_FIELD_KEYS = {
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "sliding_window": "llama.attention.sliding_window",
}
FIELD_KEYS = REQUIRED_GGUF_KEYS | OPTIONAL_GGUF_KEYS | OTHER_FIELD_KEYS
# What else is read under the model's own keys, and what says nothing about the computation.
OTHER_GGUF_KEYS = {
    "llama.attention.value_length", "llama.expert_count", "llama.rope.dimension_count", "llama.rope.scale_linear",
    "llama.rope.scaling.attn_factor", "llama.rope.scaling.factor", "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length", "llama.rope.scaling.type", "llama.rope.scaling.yarn_beta_fast",
    "llama.rope.scaling.yarn_beta_slow", "llama.rope.scaling.yarn_log_multiplier", "llama.context_length",
    "llama.expert_used_count", "llama.tensor_data_layout", "llama.vocab_size",
}  # fmt: skip


def ignored_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Return the keys of the model and of its tokenizer that nothing here reads, though they might mean something."""
    known = {*FIELD_KEYS.values(), *OTHER_GGUF_KEYS, *KNOWN_TOKENIZER_KEYS}
    own = (key for key in metadata if key.startswith(("llama.", TOKENIZER_KEY)))
    return sorted(key for key in own if key not in known)


def read_metadata(metadata: Mapping[str, Any], *, tied: bool, rope_factors: tuple[float, ...] | None) -> ModelArgs:
    """Return the ModelArgs of an architecture "llama".

    tied: whether the file has no output projection. rope_factors: its tensor rope_freqs, if it has one.
    Raise ValueError that names the key that is missing, wrong or not supported.
    """
    architecture = _get(metadata, "general.architecture", str)
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r} is not supported, only 'llama'")
    if metadata.get("llama.expert_count", 0):
        raise ValueError("a mixture of experts is not supported, only dense LLaMA models are")
    tokens = metadata.get("tokenizer.ggml.tokens")
    args = ModelArgs(
        **{field: _get(metadata, key, int) for field, key in REQUIRED_GGUF_KEYS.items()},
        **{field: metadata.get(key) for field, key in OPTIONAL_GGUF_KEYS.items()},  # type: ignore[arg-type]
        vocab_size=len(tokens) if isinstance(tokens, list) and tokens else -1,
        norm_eps=_get(metadata, FIELD_KEYS["norm_eps"], float),
        rope_theta=metadata.get(FIELD_KEYS["rope_theta"], 10000.0),
        rope_scaling=_gguf_rope_scaling(metadata, rope_factors),
        tied_embeddings=tied,
        sliding_window=metadata.get(FIELD_KEYS["sliding_window"]) or None,
    )
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.get(key, args.head_dim) != args.head_dim:
            raise ValueError(f"{key} {metadata[key]!r} differs from the {args.head_dim} dimensions of a head")
    return args


def _gguf_rope_scaling(metadata: Mapping[str, Any], factors: tuple[float, ...] | None) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type")
    if kind is None:  # before GGUF had the type, the linear factor had a key of its own
        factor = metadata.get("llama.rope.scale_linear", 1.0)
    else:
        factor = metadata.get("llama.rope.scaling.factor", 1.0)
    if metadata.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError("llama.rope.scaling.attn_factor is not supported")
    if kind == "yarn":
        log_multiplier = metadata.get("llama.rope.scaling.yarn_log_multiplier", 0.0)
        if log_multiplier or factors is not None:
            raise ValueError("RoPE scaling 'yarn' with yarn_log_multiplier or rope_freqs is not supported")
        return YarnScaling(
            factor,
            metadata.get("llama.rope.scaling.original_context_length") or _get(metadata, "llama.context_length", int),
            beta_fast=metadata.get("llama.rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=metadata.get("llama.rope.scaling.yarn_beta_slow", 1.0),
        )
    if kind not in (None, "none", "linear"):
        raise ValueError(f"llama.rope.scaling.type {kind!r} is not supported, only linear and yarn are")
    if factors is not None:
        if factor != 1.0 and kind != "none":
            raise ValueError(f"a RoPE scaling factor {factor!r} beside rope_freqs is not supported")
        return FactorScaling(factors)
    return LinearScaling(factor) if factor != 1.0 and kind != "none" else None


def _get(metadata: Mapping[str, Any], key: str, type_: type) -> Any:
    value = metadata.get(key)
    if type(value) is not type_:
        raise ValueError(f"{key} must be of type {type_.__name__}, found {'nothing' if value is None else repr(value)}")
    return value
