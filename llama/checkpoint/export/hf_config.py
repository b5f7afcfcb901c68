"""Say in a Hugging Face `config.json` what a model is: a Llama or, where that computes something else, another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from llama.checkpoint.base import dtype_name
from llama.checkpoint.context import recognised
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.families import FAMILIES
from llama.checkpoint.family import ATTENTION, FEED_FORWARD, Family
from llama.checkpoint.hf_config import (
    CONFIG_FLAGS,
    GRANITE_KEYS,
    OPTIONAL_CONFIG_KEYS,
    REQUIRED_CONFIG_KEYS,
    interpret,
)
from llama.checkpoint.multipliers import folded
from llama.checkpoint.names import module_name
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.rope_scaling import (
    DynamicScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

# What a model may be written as, the plainest first.
WRITTEN = (
    "llama", "mistral", "granite", "ministral", "qwen3", "olmo2", "olmo3", "exaone4", "hunyuan_v1_dense", "ministral3",
    "smollm3", "arcee", "nemotron", "apertus", "stablelm", "mixtral", "qwen3_moe", "olmoe",
)  # fmt: skip
ROPE_TYPES = {
    LinearScaling: "linear",
    DynamicScaling: "dynamic",
    Llama3Scaling: "llama3",
    YarnScaling: "yarn",
    LongRopeScaling: "longrope",
}
_EXPERTS_KEYS = {"n_experts": "num_experts", "n_active": "num_experts_per_tok", "hidden_dim": "moe_intermediate_size"}
# Fields of ModelArgs that not all families have, beside what their layers compute otherwise.
_BESIDE_LAYERS = ("attention_bias", "mlp_bias", "sliding_window", "rotary_dim", "score_factor")
# Those that say nothing about the computation, or say it once more.
_OTHER_FIELDS = ("max_batch_size", "max_seq_len", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope")


def hf_config(plan: ExportPlan) -> tuple[dict[str, Any], Family, frozenset[str]]:
    """Return the content of config.json, and the family that it is of: the first by whose rules it means the model.

    Return also the modules whose biases the family has not, which are zeros.
    Raise ValueError where it means that by none.
    """
    args, tokenizer = plan.args, plan.tokenizer.tokenizer
    scaling = recognised(args)
    if isinstance(scaling, FactorScaling):
        raise ValueError("RoPE factors for each pair that follow no rule cannot be written to config.json")
    wanted = dataclasses.replace(args, rope_scaling=scaling)
    biased = {*(ATTENTION if args.attention_bias else ()), *(FEED_FORWARD if args.mlp_bias else ())}
    found = None
    for name in WRITTEN:
        family = FAMILIES[name]
        config = _config(wanted, name, family, plan.context_len)
        try:
            said = interpret(plan.checkpoint.path, config, family)
        except ValueError:  # a rule of the family's that the model does not keep
            continue
        read, factors = folded(said.args, said.multipliers)
        if math.isclose(read.score_factor, wanted.score_factor, rel_tol=1e-12):
            read = dataclasses.replace(read, score_factor=wanted.score_factor)
        lost = frozenset(biased - said.biased)
        if _computed(read) == _computed(wanted) and not factors and _have_no_biases(plan, lost):
            found = config, family, lost
            break
    if found is None:
        plain = ModelArgs()
        beside = {name: getattr(args, name) for name in _BESIDE_LAYERS if getattr(args, name) != getattr(plain, name)}
        kept = beside | args.beyond_llama
        both = " and ".join(f"{name} {value!r}" for name, value in kept.items())
        raise ValueError(f"config.json cannot express {both}: {', '.join(WRITTEN)} can be written, and none has that")
    config, family, lost = found
    config["torch_dtype"] = dtype_name(plan.dtype)
    if tokenizer.bos_id >= 0:
        config["bos_token_id"] = tokenizer.bos_id
    stops = sorted(tokenizer.stop_tokens | plan.checkpoint.stop_tokens)
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    return config, family, lost


def _have_no_biases(plan: ExportPlan, modules: Collection[str]) -> bool:
    """Tell whether all biases of modules are zeros."""
    names = (name for name in global_shapes(plan.args) if name.endswith(".bias") and module_name(name) in modules)
    return not any(bool(plan.checkpoint.read(name).any()) for name in names)


def _computed(args: ModelArgs) -> dict[str, Any]:
    """Return the fields of an architecture that say what it computes."""
    return {name: getattr(args, name) for name in ModelArgs.__dataclass_fields__ if name not in _OTHER_FIELDS}


def _config(args: ModelArgs, model_type: str, family: Family, context_len: int) -> dict[str, Any]:
    """Return a config.json of a family that means a model, if one does.

    RoPE settings are spelled in the older way, which every version of transformers reads that knows the family.
    """
    fields = REQUIRED_CONFIG_KEYS | OPTIONAL_CONFIG_KEYS | CONFIG_FLAGS
    config: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": model_type,
        **{key: getattr(args, field) for field, key in fields.items()},
        "max_position_embeddings": context_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": None,
        "hidden_act": family.fields.get("activation", "silu"),
        "use_cache": True,
        "pad_token_id": None,  # the default of some families is beyond a small vocabulary
    }
    if args.rope_scaling is not None:
        config["rope_scaling"] = _rope_settings(args.rope_scaling)
        if isinstance(args.rope_scaling, DynamicScaling):
            config["max_position_embeddings"] = args.rope_scaling.old_context_len
    elif "rope_parameters" in family.defaults:
        config["rope_scaling"] = {"rope_type": "default"}
    if family is FAMILIES["granite"]:
        config |= dict.fromkeys(GRANITE_KEYS.values(), 1.0)
        config[GRANITE_KEYS["scores"]] = args.score_factor / math.sqrt(args.head_dim)
    if args.experts is not None:
        config |= {key: getattr(args.experts, field) for field, key in _EXPERTS_KEYS.items()}
        config["num_local_experts"] = args.experts.n_experts
        if "norm_topk_prob" in family.defaults:
            config["norm_topk_prob"] = args.experts.router == "softmax of chosen"
        if family is FAMILIES["qwen3_moe"]:
            config["mlp_only_layers"] = list(args.experts.dense_layers)
    layers = range(args.n_layers)
    has_window = [args.sight(layer).window is not None for layer in layers]
    if family.window != "none":
        config["sliding_window"] = args.sliding_window
    if family.window not in ("none", "all"):
        config["layer_types"] = ["sliding_attention" if has else "full_attention" for has in has_window]
    if family.window in ("if used", "unrotated if used"):
        config["use_sliding_window"] = any(has_window)
    if family.unrotated == "listed":
        config["no_rope_layers"] = [int(layer not in args.unrotated_layers) for layer in layers]
    if "sliding_attention" in family.rope_keys:
        settings = {"rope_theta": config.pop("rope_theta"), **(config.pop("rope_scaling") or {"rope_type": "default"})}
        of_windows = {"rope_type": "default", "rope_theta": args.window_rope_theta}
        windowed = settings if args.window_rope_theta is None else of_windows
        config["rope_parameters"] = {"full_attention": settings, "sliding_attention": windowed}
    if "llama_4_scaling_beta" in family.rope_keys:
        settings = {"rope_theta": config.pop("rope_theta"), **(config.pop("rope_scaling") or {"rope_type": "default"})}
        if args.query_scaling is not None:
            settings.setdefault("original_max_position_embeddings", args.query_scaling.period)
            settings["llama_4_scaling_beta"] = args.query_scaling.beta
        config["rope_parameters"] = settings
    if family.is_partly_rotated:
        config["partial_rotary_factor"] = (args.rotary_dim or args.head_dim) / args.head_dim
    return {family.keys.get(key, key): value for key, value in config.items()}


def _rope_settings(scaling: RopeScaling) -> dict[str, Any]:
    """Return the rope_scaling of config.json, whose keys but one are the fields of the scaling."""
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    if isinstance(scaling, LongRopeScaling):
        for length in ("short", "long"):
            fields[f"{length}_factor"] = list(fields.pop(f"{length}_factors"))
        fields["attention_factor"] = fields.pop("magnitude")
    old_context_len = fields.pop("old_context_len", None)
    if old_context_len is not None and not isinstance(scaling, DynamicScaling):
        fields["original_max_position_embeddings"] = old_context_len
    return {"rope_type": ROPE_TYPES[type(scaling)], **fields}
