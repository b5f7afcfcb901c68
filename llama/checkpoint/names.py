"""Translate the names of tensors between formats. Readers, writers and checks use this table alone.

Inside this package a tensor has Meta's name, which is also its parameter's in `llama.model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

StoredT = TypeVar("StoredT")
NamingScheme = Literal["meta", "hf", "gguf"]

# Modules by Meta's name, Hugging Face's and GGUF's; those of a layer follow its prefix and number.
MODULE_NAMES = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
    ("attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "self_attn.o_proj", "attn_output"),
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("feed_forward.xielu", "mlp.act_fn", "xielu"),
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
)
# What files have in place of the weight of an xIELU, each in a tensor or in a key of its own.
XIELU_PARTS = ("alpha_p", "alpha_n", "beta", "eps")
# Names in files of tensors that inference does not use: what is computed here, heads of training, what sees pictures.
DERIVED = re.compile(r"rope\.freqs|([\w.]+\.)?rotary_emb\.inv_freq")
UNNEEDED = re.compile(
    rf"{DERIVED.pattern}|([\w.]+\.)?(rotary_emb\.\w+|attn_rot_embd\.weight|position_ids|_extra_state)"
    r"|(v_head|value_head)\.[\w.]+|(model\.)?(vision_tower|multi_modal_projector)\.[\w.]+"
)
# Modules whose outputs RoPE rotates, so that the order of their rows is the format's.
ROTATED = {"wq", "wk", "q_norm", "k_norm"}

META_LAYERS = "layers."
LAYER_PREFIXES: dict[NamingScheme, str] = {"meta": META_LAYERS, "hf": "model.layers.", "gguf": "blk."}

_FROM_META: dict[NamingScheme, dict[str, str]] = {
    "meta": {meta: meta for meta, _, _ in MODULE_NAMES},
    "hf": {meta: hf for meta, hf, _ in MODULE_NAMES},
    "gguf": {meta: gguf for meta, _, gguf in MODULE_NAMES},
}
_TO_META = {scheme: {name: meta for meta, name in names.items()} for scheme, names in _FROM_META.items()}


def meta_name(name: str, scheme: NamingScheme) -> str:
    """Translate a name of a file: "blk.3.attn_q.weight" -> "layers.3.attention.wq.weight".

    Quote a name that the table lacks, so that it equals none of the model's: a Hugging Face folder whose tensors have
    Meta's names would otherwise pass, and have the rows of its Q and K put out of order.
    """
    return _translate(name, LAYER_PREFIXES[scheme], META_LAYERS, _TO_META[scheme]) or repr(name)


def stored_name(name: str, scheme: NamingScheme) -> str:
    """Translate a name of the model: "layers.3.attention.wq.weight" -> "model.layers.3.self_attn.q_proj.weight".

    A name that the table lacks, or that `meta_name` has quoted, stays.
    """
    return _translate(name, META_LAYERS, LAYER_PREFIXES[scheme], _FROM_META[scheme]) or name


def with_parts(name: str, parts: Mapping[str, str]) -> str:
    """Return a name with parts of it replaced, one after the other."""
    for part, other in parts.items():
        name = name.replace(part, other)
    return name


def with_own_parts(name: str, parts: Mapping[str, str]) -> str:
    """Return the name that `with_parts` makes this one of; what it leaves out stays out."""
    return with_parts(name, {other: part for part, other in reversed(list(parts.items())) if other})


def renamed(path: Path, tensors: Mapping[str, StoredT], parts: Mapping[str, str]) -> dict[str, StoredT]:
    """Return a file's tensors with parts of their names replaced; raise ValueError where two get one name."""
    new: dict[str, StoredT] = {}
    for name, tensor in tensors.items():
        if with_parts(name, parts) in new:
            raise ValueError(f"{path} has an unexpected tensor {name}, beside one that is called otherwise here")
        new[with_parts(name, parts)] = tensor
    return new


def module_name(name: str) -> str:
    """Return the last module that a tensor's name leads to: "layers.3.attention.wq.weight" -> "wq"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _translate(name: str, prefix: str, new_prefix: str, modules: Mapping[str, str]) -> str | None:
    module, _, parameter = name.rpartition(".")
    layer = ""
    if module.startswith(prefix):
        number, _, module = module.removeprefix(prefix).partition(".")
        layer = f"{new_prefix}{number}."
    return f"{layer}{modules[module]}.{parameter}" if module in modules else None
