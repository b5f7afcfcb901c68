"""Read RoPE settings from a Hugging Face `config.json`, in the older and the newer spelling."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.family import Family
from llama.checks import check_int, check_number
from llama.config import ModelArgs
from llama.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    QueryScaling,
    RopeScaling,
    YarnScaling,
)

log = logging.getLogger("llama")


def required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{key} is missing")
    return config[key]


def true_or_false(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def read_rope(
    path: Path, said: Mapping[str, Any], config: Mapping[str, Any], family: Family, args: ModelArgs
) -> dict[str, Any]:
    """Return the fields of ModelArgs that say how heads are rotated, of an architecture that has the others.

    said: what a config.json has; config: the same with the family's defaults.
    """
    rope, of_windows = _rope_parameters(path, said, family)
    part, theta, alpha = rope["partial_rotary_factor"], rope["rope_theta"], rope.get("alpha")
    check_number("partial_rotary_factor", part)
    check_number("rope_theta", theta)
    if "alpha" in family.rope_keys and rope["rope_type"] == "dynamic" and alpha:
        check_number("alpha", alpha)
        if args.head_dim <= 2:
            raise ValueError(f"alpha {alpha} of RoPE settings needs a head_dim above 2, got {args.head_dim}")
        theta, rope["rope_type"] = theta * alpha ** (args.head_dim / (args.head_dim - 2)), "default"
    fields: dict[str, Any] = {
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(rope, config),
        "rotary_dim": None if part == 1.0 else int(args.head_dim * part),
    }
    beta = rope.get("llama_4_scaling_beta")
    if "llama_4_scaling_beta" in family.rope_keys and beta:
        check_number("llama_4_scaling_beta", beta)
        fields["query_scaling"] = QueryScaling(beta, required(rope, "original_max_position_embeddings"))
    if args.sliding_window is not None and of_windows != rope:
        if _rope_scaling(of_windows, config) is not None:
            raise ValueError(f"scaled RoPE in layers with a window is not supported, got {of_windows}")
        fields["window_rope_theta"] = of_windows["rope_theta"]
    return fields


def _rope_parameters(path: Path, config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the RoPE settings of either spelling, with every key that may stand beside them, of a file's content.

    They are two dictionaries, of layers without a window and of those with one, mostly the same.

    Where a file says two things, decide as transformers does, and log it: rope_scaling goes before rope_parameters,
    whose rope_theta is then ignored as well; a rope_theta beside them counts where they have none, an original context
    beside them in any case.
    """
    given = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    if not all(isinstance(settings, dict) for settings in given):
        raise ValueError(f"rope_scaling and rope_parameters must be objects, got {given}")
    spellings = [settings for settings in given if settings] or [family.defaults.get("rope_parameters", {})]
    used, of_windows = _by_window(spellings[0], family)
    read = _filled_in(used, config, family)
    others = [_filled_in(_by_window(settings, family)[0], config, family) for settings in spellings[1:]]
    beside = [(config.get(key), used.get(key)) for key in ("rope_theta", "original_max_position_embeddings")]
    if any(other != read for other in others) or any(a != b and None not in (a, b) for a, b in beside):
        log.warning("%s says two things about RoPE: %s is used", path, read)
    return read, _filled_in(of_windows, config, family)


def _by_window(settings: Mapping[str, Any], family: Family) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the settings of layers without a window, and of those with one."""
    if "sliding_attention" not in family.rope_keys:
        return settings, settings
    full, windowed = (settings.get(f"{kind}_attention") for kind in ("full", "sliding"))
    if full is None and windowed is None:
        return settings, {"rope_theta": settings.get("rope_theta")}
    full, windowed = full or {}, windowed or {}
    if not isinstance(full, dict) or not isinstance(windowed, dict):
        raise ValueError(f"full_attention and sliding_attention of RoPE settings must be objects, got {settings!r}")
    return full, windowed


def _filled_in(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return RoPE settings under the newer keys, with what they leave to keys beside them."""
    old_context_len = "original_max_position_embeddings"
    thetas = (settings.get("rope_theta"), config.get("rope_theta"), family.defaults.get("rope_theta"))
    parts = (each.get("partial_rotary_factor") for each in (settings, config, family.defaults))
    filled = {key: value for key, value in settings.items() if key != "type"} | {
        "rope_type": settings.get("rope_type") or settings.get("type") or "default",
        "rope_theta": next((theta for theta in thetas if theta is not None), 10000.0),
        old_context_len: config.get(old_context_len)
        or family.defaults.get(old_context_len)
        or settings.get(old_context_len),
        "partial_rotary_factor": next((part for part in parts if part is not None), 1.0),
    }
    if filled["partial_rotary_factor"] != 1.0 and not family.is_partly_rotated:
        raise ValueError(f"partial_rotary_factor {filled['partial_rotary_factor']!r} is not supported")
    if "short_factor" in filled and filled["rope_type"] in ("su", "yarn"):  # as Phi-3 once called it
        filled["rope_type"] = "longrope"
    return filled


def _rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope["rope_type"]
    context_len = config.get("max_position_embeddings", 2048)
    old_context_len = rope["original_max_position_embeddings"] or context_len
    if kind == "default":
        return None
    check_int("max_position_embeddings", context_len)
    check_int("original_max_position_embeddings", old_context_len)
    if kind == "linear":
        return LinearScaling(required(rope, "factor"))
    if kind == "dynamic":
        return DynamicScaling(required(rope, "factor"), context_len)
    if kind == "llama3":
        factors = {key: required(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return Llama3Scaling(**factors, old_context_len=old_context_len)
    if kind == "yarn":
        factor = rope.get("factor") or context_len / old_context_len
        return YarnScaling(
            factor,
            old_context_len,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            attention_factor=_yarn_attention_factor(rope, factor),
            truncate=true_or_false(rope, "truncate", True),
        )
    if kind == "longrope":
        factor = rope.get("factor") or context_len / old_context_len
        check_number("factor", factor)
        magnitude = rope.get("attention_factor")
        if magnitude is None:
            magnitude = (
                math.sqrt(1 + math.log(factor) / math.log(old_context_len)) if min(factor, old_context_len) > 1 else 1.0
            )
        return LongRopeScaling(
            _factors(rope, "short_factor"), _factors(rope, "long_factor"), old_context_len, magnitude
        )
    raise ValueError(f"RoPE scaling {kind!r} is not supported: only linear, dynamic, llama3, yarn and longrope are")


def _factors(rope: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = required(rope, key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of numbers, got {value!r}")
    return tuple(value)


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
