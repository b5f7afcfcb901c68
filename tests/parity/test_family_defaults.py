"""What a config.json of a family leaves out means what it does to transformers, or to the family's own code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from llama.checkpoint.families import FAMILIES
from llama.checkpoint.hf_config import interpret

# Sizes that every default fits, such as 20 and 32 heads of keys.
REQUIRED = {
    "hidden_size": 20480,
    "num_hidden_layers": 8,
    "num_attention_heads": 160,
    "vocab_size": 300000,
    "intermediate_size": 512,
}
# Of mixtures of experts, whose sizes nothing here guesses.
OF_EXPERTS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size_mlp",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_a_key_that_is_left_out_means_what_it_does_to_transformers(name: str) -> None:
    """A Llama 4 without attention_chunk_size attended to everything, and Mistral had as many heads of keys as all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole: dict[str, Any] = CONFIG_MAPPING[name](**REQUIRED).to_dict()
    short = REQUIRED | {key: whole[key] for key in OF_EXPERTS if key in whole}
    theirs, ours = (interpret(Path("config.json"), config, FAMILIES[name]) for config in (whole, short))
    assert ours.args == theirs.args
    assert (ours.biased, ours.multipliers) == (theirs.biased, theirs.multipliers)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("minicpm", REQUIRED | {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}),
        ("exaone", REQUIRED | {"num_layers": 8}),
    ],
)
def test_a_table_is_the_output_where_a_family_means_that_by_nothing(name: str, config: dict[str, Any]) -> None:
    """MiniCPM 2B, which has no lm_head and does not say so, was said to lack it."""
    assert interpret(Path("config.json"), config, FAMILIES[name]).args.tied_embeddings


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "granitemoe"])
def test_how_experts_are_weighed_is_a_familys_own_where_it_has_no_choice(name: str) -> None:
    """A stray norm_topk_prob made a softmax of Llama 4's sigmoids."""
    config = REQUIRED | {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}
    experts = interpret(Path("config.json"), config, FAMILIES[name]).args.experts
    assert experts is not None and experts.router == FAMILIES[name].router
