"""What the files of a family of models may call otherwise than Llama's do: the columns of the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama.config import Router

# Which dimensions of a head RoPE rotates as a pair: neighbours, as in Meta's code, or one of each half.
RowOrder = Literal["neighbours", "halves"]

ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")

# Which layers sliding_window counts in, where layer_types does not say it: none; all, whatever that says; all; all but
# the first of four, or the last; those from max_window_layers on, if use_sliding_window says so; those that are not
# rotated, if it says so; by sliding_window_pattern, all but the last of so many, or as its letters L and G repeat.
Window = Literal[
    "none", "all", "listed", "after first of four", "before last of four", "if used", "unrotated if used", "pattern"
]

# A bias of each module: True where it always has one, or the key of config.json that says it.
Biases = Mapping[str, str | bool]
LLAMA_BIASES: Biases = dict.fromkeys(ATTENTION, "attention_bias") | dict.fromkeys(FEED_FORWARD, "mlp_bias")


@dataclass(frozen=True)
class Family:
    """What the files of a family call otherwise than Llama's do.

    keys: keys of config.json by Llama's name for them; defaults: what their absence means, where Llama means another.
    hf_names, gguf_names: parts of tensors' names in files of that format, and Llama's for them, replaced in turn.
    """

    architectures: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Biases = field(default_factory=lambda: LLAMA_BIASES)
    fields: Mapping[str, Any] = field(default_factory=dict)  # of ModelArgs, that are the same in all its models
    refused: Mapping[str, str] = field(default_factory=dict)  # keys that must not say anything, and why
    window: Window = "none"
    # Which layers are not rotated: those that no_rope_layers or no_rope_layer_interval say, or those without a window
    # where others have one.
    unrotated: Literal["none", "listed", "without window"] = "none"
    is_partly_rotated: bool = False  # whether partial_rotary_factor counts
    # Keys of RoPE settings that count here alone: llama_4_scaling_beta, which scales queries; alpha, by which theta
    # grows; sliding_attention, settings of layers with a window, whose RoPE is not scaled where they are missing.
    rope_keys: tuple[str, ...] = ()
    is_scaled: bool = False  # whether it has Multipliers
    hf_rows: RowOrder = "halves"
    hf_names: Mapping[str, str] = field(default_factory=dict)
    hf_norm_offset: float = 0.0  # added to the weights of norms in Hugging Face's folders
    gguf: str = ""  # the architecture in GGUF, where it is not llama's
    gguf_rows: RowOrder = "neighbours"
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    router: Router | None = None  # of experts, where norm_topk_prob does not say otherwise
    hf_transposes_experts: bool = False  # whether tensors of all experts have their matrices transposed
    gguf_gate_in_up: bool = False  # whether ffn_up holds the gate's rows before its own
