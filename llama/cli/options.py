"""How a model's and a sampler's options become flags: what every command has in common of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama.cli.flags import Fields, Late
from llama.hub.demo import demo_model

# What chooses, proposes or words tokens: no flags of commands that only read them, or take any.
CHAT = ("chat_format", "chat_template", "template_kwargs")
GENERATION = ("seed", *CHAT, "speculate", "draft_ckpt_dir", "draft_quantize")
SIZES = ("max_seq_len", "max_batch_size")

# What most people never touch, for whom a long help is a bad one.
RARE = (
    *("typical_p", "presence_penalty", "frequency_penalty", "penalty_last_n"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_last_n", "dry_breakers"),
    *("xtc_probability", "xtc_threshold", "logit_bias", "banned_tokens", "min_tokens", "ignore_eos"),
    *("stop_token_ids", "best_of", "regex", "grammar"),
)

DEMO_MODEL = Late("the demo model", demo_model)


def build_flags(*hidden: str, words: Sequence[str] = (), **defaults: Any) -> Fields:
    """Flags of BuildOptions but for `hidden`; the demo model is the default of --ckpt_dir.

    Whoever takes no chat_format takes no template either.
    """
    hidden = (*hidden, *(CHAT if "chat_format" in hidden else ()))
    return Fields("the model", hidden, words, {"ckpt_dir": DEMO_MODEL, **defaults})


def sampling_flags(*hidden: str, **defaults: Any) -> Fields:
    """Flags of SamplingParams but for `hidden` and stop_token, an id; --seed is that of BuildOptions."""
    return Fields("sampling", ("seed", "stop_token", *hidden), (), defaults, RARE)
