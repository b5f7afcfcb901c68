"""Tensors have the names that transformers and llama.cpp give them, and no other name passes for one of the model's."""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llama.checkpoint.names import NamingScheme, meta_name, stored_name
from llama.checkpoint.shapes import global_shapes
from llama.model import Transformer
from tests.checkpoints import TINY

ARGS = dataclasses.replace(TINY, n_layers=11, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "all heads", "output_norms": True},
        {"activation": "relu2", "layer_norms": True},
        {"activation": "xielu", "qk_norm": "head"},
    ],
    ids=str,
)
def test_names_and_shapes_are_the_models_own(changes: dict[str, Any]) -> None:
    args = dataclasses.replace(ARGS, **changes)
    assert global_shapes(args) == {name: tuple(each.shape) for name, each in Transformer(args).named_parameters()}


def test_hugging_faces_names_are_those_of_transformers() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=11, num_attention_heads=4, vocab_size=64,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    assert {stored_name(name, "hf") for name in global_shapes(ARGS)} == set(LlamaForCausalLM(config).state_dict())


def test_ggufs_names_are_those_of_llama_cpp() -> None:
    """The library maps Hugging Face's names, by a table of its own."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 11)
    for name in global_shapes(ARGS):
        theirs = mapping.get_name(stored_name(name, "hf"), try_suffixes=(".weight", ".bias"))
        assert stored_name(name, "gguf") == theirs


@pytest.mark.parametrize("scheme", ["hf", "gguf"])
def test_every_name_comes_back(scheme: NamingScheme) -> None:
    assert [meta_name(stored_name(name, scheme), scheme) for name in global_shapes(ARGS)] == list(global_shapes(ARGS))


@pytest.mark.parametrize("scheme", ["hf", "gguf"])
@pytest.mark.parametrize(
    "name", ["layers.0.attention.wq.weight", "tok_embeddings.weight", "rope_freqs.weight", "weight", "blk.0.", ""]
)
def test_a_name_that_is_not_known_is_none_of_the_models(name: str, scheme: NamingScheme) -> None:
    """A folder of tensors under Meta's names would otherwise pass, with the rows of Q and K out of order."""
    assert meta_name(name, scheme) not in global_shapes(ARGS) and name in meta_name(name, scheme)
