"""Say an architecture in GGUF's keys, under the architecture of its own family or another that computes the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.families import GGUF_FAMILIES
from llama.checkpoint.family import Family
from llama.checkpoint.gguf_config import (
    LONG_FACTORS,
    OPTIONAL_GGUF_KEYS,
    REQUIRED_GGUF_KEYS,
    ROPE_FACTORS,
    ROTARY_DIM,
    SCALE_KEYS,
    SHORT_FACTORS,
    TEMPERATURE_SCALE,
    WINDOW_PATTERN,
    WINDOW_THETA,
    YARN_LOG_MULTIPLIER,
    read_metadata,
    read_multipliers,
    with_own_keys,
)
from llama.checkpoint.gguf_experts import COUNT, HIDDEN, USED_COUNT
from llama.checkpoint.multipliers import folded
from llama.checkpoint.names import XIELU_PARTS
from llama.checkpoint.tensors import xielu_parts
from llama.config import ModelArgs
from llama.rope import scaled_frequencies
from llama.rope_scaling import FactorScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling

# Architectures in which llama.cpp reads biases of every linear; others have some of q, k and v, or none.
ANY_BIASES = ("llama", "granite")
QKV = {"wq", "wk", "wv"}
# Fields that GGUF says by which tensors there are, or not at all.
_BY_TENSORS = {
    "attention_bias", "mlp_bias", "vocab_size", "rope_scaling", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope",
    "max_batch_size", "max_seq_len",
}  # fmt: skip


class Description(NamedTuple):
    """What a GGUF file says of an architecture: its family, its keys, and its tensors of wavelength factors."""

    family: Family
    metadata: Mapping[str, Any]
    factors: Mapping[str, np.ndarray]

    @property
    def architecture(self) -> str:
        return self.family.gguf or "llama"


def describe(plan: ExportPlan, biased: Collection[str]) -> Description:
    """Return the checkpoint's architecture under its family's name in GGUF, else as the first that says the same.

    biased: modules that have biases. Whether it says the same is told by reading it back.
    Raise ValueError where nothing does.
    """
    differences: dict[str, Any] = {}
    own = plan.checkpoint.family.gguf or "llama"
    for name in dict.fromkeys((own, *ANY_BIASES) if QKV.issuperset(biased) else (*ANY_BIASES, own)):
        row = GGUF_FAMILIES[name]
        keys, factors = _metadata(plan.args, plan.context_len, row)
        different = _differences(plan.args, keys, factors, row)
        if not different:
            keys |= _xielu_keys(plan)
            return Description(row, {with_own_keys(key, row): value for key, value in keys.items()}, factors)
        differences = differences or different
    said = ", ".join(f"{name} {value}" for name, value in differences.items())
    raise ValueError(f"GGUF cannot express {said}: use --format hf")


def _differences(
    args: ModelArgs, metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray], family: Family
) -> dict[str, Any]:
    """Return the fields of an architecture that are others where its keys are read again."""
    try:
        read = read_metadata(
            metadata,
            family,
            tied=args.tied_embeddings,
            rope_factors={name: tuple(values.tolist()) for name, values in factors.items()},
        )
        read, _ = folded(read, read_multipliers(metadata, family, read))
    except ValueError as error:
        return {"that": error}
    different = {}
    for field in dataclasses.fields(ModelArgs):
        value, found = getattr(args, field.name), getattr(read, field.name)
        close = isinstance(value, float) and isinstance(found, float) and math.isclose(value, found, rel_tol=1e-6)
        if field.name not in _BY_TENSORS and value != found and not close:
            different[field.name] = value
    if (args.rope_scaling is None) != (read.rope_scaling is None):
        different["rope_scaling"] = args.rope_scaling
    return different


def _metadata(args: ModelArgs, context_len: int, family: Family) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the architecture under the keys of an architecture "llama", and tensors of wavelength factors."""
    metadata: dict[str, Any] = {
        "llama.vocab_size": args.vocab_size,
        "llama.context_length": context_len,
        **{key: getattr(args, field) for field, key in {**REQUIRED_GGUF_KEYS, **OPTIONAL_GGUF_KEYS}.items()},
        "llama.attention.value_length": args.head_dim,
        f"llama.attention.layer_norm_{'' if args.layer_norms else 'rms_'}epsilon": float(args.norm_eps),
        ROTARY_DIM: args.rotary_dim or args.head_dim,
        "llama.rope.freq_base": float(args.rope_theta),
    }
    if args.sliding_window is not None:
        metadata["llama.attention.sliding_window"] = args.sliding_window
        if args.full_layers and family.window in ("before last of four", "pattern"):
            metadata[WINDOW_PATTERN] = [layer not in args.full_layers for layer in range(args.n_layers)]
        if args.window_rope_theta is not None and "sliding_attention" in family.rope_keys:
            metadata[WINDOW_THETA] = float(args.window_rope_theta)
    if args.experts is not None:
        metadata |= {COUNT: args.experts.n_experts, USED_COUNT: args.experts.n_active, HIDDEN: args.experts.hidden_dim}
    if family.is_scaled:  # by 1, as multipliers are folded
        metadata |= {SCALE_KEYS[field]: 1.0 for field in ("embedding", "residual", "logits")}
        if args.score_factor != 1.0:
            metadata[SCALE_KEYS["scores"]] = args.score_factor / math.sqrt(args.head_dim)
    scaling, by_position = args.rope_scaling, "llama_4_scaling_beta" in family.rope_keys
    if isinstance(scaling, LinearScaling):
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling.factor)}
    elif isinstance(scaling, YarnScaling) and scaling.truncate and (scaling.attention_factor is None or by_position):
        metadata |= {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": float(scaling.factor),
            "llama.rope.scaling.original_context_length": scaling.old_context_len,
            "llama.rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "llama.rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
        if scaling.attention_factor is not None and scaling.factor > 1:
            growth = 0.1 * math.log(scaling.factor)
            metadata[YARN_LOG_MULTIPLIER] = ((growth + 1) / scaling.attention_factor - 1) / growth
        if args.query_scaling is not None and by_position:
            metadata[TEMPERATURE_SCALE] = float(args.query_scaling.beta)
    elif isinstance(scaling, LongRopeScaling):
        metadata["llama.rope.scaling.original_context_length"] = scaling.old_context_len
        metadata["llama.rope.scaling.attn_factor"] = float(scaling.magnitude)
    return metadata, _rope_factors(args)


def _xielu_keys(plan: ExportPlan) -> dict[str, list[float]]:
    """Return keys with the numbers of each layer's xIELU, where that is computed; they name no architecture."""
    if plan.args.activation != "xielu":
        return {}
    names = (f"layers.{layer}.feed_forward.xielu.weight" for layer in range(plan.args.n_layers))
    layers = [xielu_parts(plan.checkpoint.read(name)) for name in names]
    return {f"xielu.{part}": [float(parts[part]) for parts in layers] for part in XIELU_PARTS}


def _rope_factors(args: ModelArgs) -> dict[str, np.ndarray]:
    """Return wavelength factors, one for each rotated pair, by the names of their tensors; Llama 3.1's rule is some."""
    scaling = args.rope_scaling
    if isinstance(scaling, LongRopeScaling):
        both = {SHORT_FACTORS: scaling.short_factors, LONG_FACTORS: scaling.long_factors}
        return {name: np.array(factors, np.float32) for name, factors in both.items()}
    if isinstance(scaling, FactorScaling):
        return {ROPE_FACTORS: np.array(scaling.factors, np.float32)}
    if not isinstance(scaling, Llama3Scaling):
        return {}
    plain = scaled_frequencies(args.head_dim, args.rope_theta, None).double()
    factors = plain / scaled_frequencies(args.head_dim, args.rope_theta, scaling)
    return {ROPE_FACTORS: factors.to(torch.float32).numpy()}
