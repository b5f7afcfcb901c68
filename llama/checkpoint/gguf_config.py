"""Read the architecture from a GGUF file's metadata, under llama.cpp's keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama.checkpoint.families import FAMILIES, GGUF_FAMILIES
from llama.checkpoint.family import Family
from llama.checkpoint.gguf_experts import COUNT, EXPERTS_KEYS, USED_COUNT, gguf_llama4_fields, read_gguf_experts
from llama.checkpoint.multipliers import Multipliers
from llama.checkpoint.names import XIELU_PARTS
from llama.checkpoint.refused import REFUSED
from llama.checks import check_number
from llama.config import ModelArgs
from llama.rope_scaling import FactorScaling, LinearScaling, LongRopeScaling, QueryScaling, RopeScaling, YarnScaling
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
    "n_experts": COUNT,
    "n_active": USED_COUNT,
}
LAYER_NORM_EPS = "llama.attention.layer_norm_epsilon"
ROTARY_DIM = "llama.rope.dimension_count"
# Of layers with a window: which they are, and their theta; of queries beyond the original context.
WINDOW_PATTERN, WINDOW_THETA = "llama.attention.sliding_window_pattern", "llama.rope.freq_base_swa"
TEMPERATURE_SCALE = "llama.attention.temperature_scale"
YARN_LOG_MULTIPLIER = "llama.rope.scaling.yarn_log_multiplier"
# Tensors of wavelength factors, one for each rotated pair: of every text, or of short ones and of long ones.
ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ALL_ROPE_FACTORS = {ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS}
FIELD_KEYS = REQUIRED_GGUF_KEYS | OPTIONAL_GGUF_KEYS | OTHER_FIELD_KEYS
# What else is read under the model's own keys, and what says nothing about the computation.
OTHER_GGUF_KEYS = {
    LAYER_NORM_EPS, "llama.use_parallel_residual", "llama.attention.value_length",
    "llama.rope.dimension_count", "llama.rope.scale_linear", "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.factor", "llama.rope.scaling.finetuned", "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type", "llama.rope.scaling.yarn_beta_fast", "llama.rope.scaling.yarn_beta_slow",
    YARN_LOG_MULTIPLIER, "llama.context_length",
    "llama.tensor_data_layout", "llama.vocab_size",
}  # fmt: skip


# Keys of multipliers, of families that have some: by the fields of Multipliers.
SCALE_KEYS = {
    "embedding": "llama.embedding_scale",
    "residual": "llama.residual_scale",
    "scores": "llama.attention.scale",
    "logits": "llama.logit_scale",
}


def family_of(metadata: Mapping[str, Any]) -> Family:
    """Return the row of the table that a file is of; raise ValueError that says why where there is none."""
    architecture = _get(metadata, "general.architecture", str)
    if architecture in GGUF_FAMILIES:
        return GGUF_FAMILIES[architecture]
    reason = f", as it {REFUSED[architecture]}" if architecture in REFUSED else ""
    raise ValueError(f"architecture {architecture!r} is not supported{reason}; {', '.join(GGUF_FAMILIES)} are")


def under_llamas_keys(metadata: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Return metadata with the family's own keys, such as qwen2.block_count, called as an architecture "llama" does."""
    if not family.gguf:
        return metadata
    own = f"{family.gguf}."
    others = {key: value for key, value in metadata.items() if not key.startswith((own, "llama."))}
    return others | {f"llama.{key.removeprefix(own)}": value for key, value in metadata.items() if key.startswith(own)}


def with_own_keys(message: str, family: Family) -> str:
    """Return a message about keys of an architecture "llama" with those that a file of the family has."""
    return re.sub(r"(?<![\w.])llama\.(?=\w)", f"{family.gguf}.", message) if family.gguf else message


def ignored_keys(metadata: Mapping[str, Any], family: Family) -> list[str]:
    """Return the keys of the model and of its tokenizer that nothing here reads, though they might mean something."""
    known = {*FIELD_KEYS.values(), *OTHER_GGUF_KEYS, *KNOWN_TOKENIZER_KEYS}
    known |= {WINDOW_PATTERN} if family.window in ("before last of four", "pattern") else set()
    known |= {WINDOW_THETA} if "sliding_attention" in family.rope_keys else set()
    known |= {TEMPERATURE_SCALE} if "llama_4_scaling_beta" in family.rope_keys else set()
    known |= set(SCALE_KEYS.values()) if family.is_scaled else set()
    known |= EXPERTS_KEYS if metadata.get("llama.expert_count") else set()
    own = (key for key in metadata if key.startswith(("llama.", TOKENIZER_KEY)))
    return sorted(key for key in own if key not in known)


def read_metadata(
    metadata: Mapping[str, Any], family: Family, *, tied: bool, rope_factors: Mapping[str, tuple[float, ...]]
) -> ModelArgs:
    """Return the ModelArgs of a file, whose metadata is under llama's keys.

    tied: whether the file has no output projection. rope_factors: its tensors of such, by the names of ROPE_FACTORS.
    Raise ValueError that names the key that is missing, wrong or not supported.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    args = ModelArgs(
        **{field: _get(metadata, key, int) for field, key in REQUIRED_GGUF_KEYS.items()},
        **{field: metadata.get(key) for field, key in OPTIONAL_GGUF_KEYS.items()},  # type: ignore[arg-type]
        vocab_size=len(tokens) if isinstance(tokens, list) and tokens else -1,
        norm_eps=_get(metadata, LAYER_NORM_EPS if family.fields.get("layer_norms") else FIELD_KEYS["norm_eps"], float),
        rope_theta=metadata.get(FIELD_KEYS["rope_theta"], 10000.0),
        rope_scaling=_gguf_rope_scaling(metadata, rope_factors),
        rotary_dim=metadata.get(ROTARY_DIM) if family.is_partly_rotated else None,
        tied_embeddings=tied,
        experts=read_gguf_experts(metadata, family),
        **family.fields,
    )
    args = replace(args, **_layers(metadata, family, args))
    if family is FAMILIES["llama4_text"]:
        args = replace(args, **gguf_llama4_fields(metadata, args))
    for key in ("llama.attention.value_length", *(() if family.is_partly_rotated else (ROTARY_DIM,))):
        if metadata.get(key, args.head_dim) != args.head_dim:
            raise ValueError(f"{key} {metadata[key]!r} differs from the {args.head_dim} dimensions of a head")
    return args


def _layers(metadata: Mapping[str, Any], family: Family, args: ModelArgs) -> dict[str, Any]:
    """Return the fields of ModelArgs that say what layers do otherwise than each other, as llama.cpp has it."""
    fields: dict[str, Any] = {}
    beta = metadata.get(TEMPERATURE_SCALE)
    if beta and "llama_4_scaling_beta" in family.rope_keys:
        check_number(TEMPERATURE_SCALE, beta)
        period = _get(metadata, "llama.rope.scaling.original_context_length", int)
        fields["query_scaling"] = QueryScaling(beta, period)
    if family.unrotated == "listed":  # no key says it
        fields["unrotated_layers"] = tuple(range(3, args.n_layers, 4))
    window = metadata.get(FIELD_KEYS["sliding_window"]) or None
    if window is None or (family.gguf and family.window not in ("all", "before last of four", "pattern")):
        return fields
    pattern = metadata.get(WINDOW_PATTERN, 4)
    if type(pattern) is int and pattern > 0:
        pattern = [i % pattern != pattern - 1 for i in range(args.n_layers)]
    if not isinstance(pattern, list) or len(pattern) != args.n_layers or any(each not in (0, 1) for each in pattern):
        raise ValueError(f"{WINDOW_PATTERN} must be a number of layers, or 0 or 1 of each, got {pattern!r}")
    full = () if not family.gguf or family.window == "all" else tuple(i for i, has in enumerate(pattern) if not has)
    if len(full) < args.n_layers:
        fields |= {"sliding_window": window, "full_layers": full}
    if family.unrotated == "without window":
        fields["unrotated_layers"] = full
    theta = metadata.get(WINDOW_THETA, args.rope_theta)
    check_number(WINDOW_THETA, theta)
    if "sliding_attention" in family.rope_keys and len(full) < args.n_layers:
        fields["window_rope_theta"] = theta if args.rope_scaling is not None or theta != args.rope_theta else None
    return fields


def read_multipliers(metadata: Mapping[str, Any], family: Family, args: ModelArgs) -> Multipliers:
    """Return what a family of Granite's kind multiplies by; raise ValueError where a file leaves out what counts."""
    if not family.is_scaled:
        return Multipliers()
    values = {field: metadata.get(key) for field, key in SCALE_KEYS.items()}
    for field in ("embedding", "residual", "logits"):
        _get(metadata, SCALE_KEYS[field], float)
    scores = values.pop("scores")
    given = {field: float(value) for field, value in values.items()}  # type: ignore[arg-type]
    if scores:  # as llama.cpp reads 0
        check_number(SCALE_KEYS["scores"], scores)
        given["scores"] = scores * math.sqrt(args.head_dim)
    return Multipliers(**given)


def read_xielu(metadata: Mapping[str, Any], n_layers: int) -> list[tuple[float, ...]]:
    """Return the numbers of each layer's activation, in the order of XIELU_PARTS: a key has one, or one a layer."""
    columns = []
    for part in XIELU_PARTS:
        values = metadata.get(f"xielu.{part}")
        values = values if isinstance(values, list) else [values] * n_layers
        if len(values) != n_layers or not all(type(value) is float and math.isfinite(value) for value in values):
            raise ValueError(f"xielu.{part} must be a number, or {n_layers} numbers, found {values!r:.80}")
        columns.append(values)
    return list(zip(*columns, strict=True))


def _gguf_rope_scaling(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[float, ...]]) -> RopeScaling | None:
    kind, factors = metadata.get("llama.rope.scaling.type"), tensors.get(ROPE_FACTORS)
    if LONG_FACTORS in tensors and kind in (None, "none", "longrope"):
        if SHORT_FACTORS not in tensors:
            raise ValueError(f"{LONG_FACTORS} is there without {SHORT_FACTORS}")
        return LongRopeScaling(
            tensors[SHORT_FACTORS],
            tensors[LONG_FACTORS],
            metadata.get("llama.rope.scaling.original_context_length") or _get(metadata, "llama.context_length", int),
            metadata.get("llama.rope.scaling.attn_factor", 1.0),
        )
    if kind is None:  # before GGUF had the type, the linear factor had a key of its own
        factor = metadata.get("llama.rope.scale_linear", 1.0)
    else:
        factor = metadata.get("llama.rope.scaling.factor", 1.0)
    if metadata.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError("llama.rope.scaling.attn_factor is not supported")
    if kind == "yarn":
        if factors is not None:
            raise ValueError("RoPE scaling 'yarn' with rope_freqs is not supported")
        check_number("llama.rope.scaling.factor", factor)
        magnitude = None
        log_multiplier = metadata.get(YARN_LOG_MULTIPLIER, 0.0)
        if log_multiplier:  # what other formats call mscale_all_dim, beside an mscale of 1
            check_number(YARN_LOG_MULTIPLIER, log_multiplier)
            growth = 0.1 * math.log(max(factor, 1.0))
            magnitude = (growth + 1) / (growth * log_multiplier + 1)
        return YarnScaling(
            factor,
            metadata.get("llama.rope.scaling.original_context_length") or _get(metadata, "llama.context_length", int),
            beta_fast=metadata.get("llama.rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=metadata.get("llama.rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=magnitude,
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
