"""Folders that transformers wrote, of every family, give transformers' logits and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.checkpoints import BYTE_VOCAB_SIZE
from tests.hugging_face import check_greedy_tokens, opened
from tests.models import one_pass, random_tokens

VOCAB_SIZE = 101
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_attention_heads": 6, "num_key_value_heads": 2}
ALL_HEADS = {**SMALL, "num_attention_heads": 6}
# Contexts are short, so that scaling matters within few tokens.
CONTEXT = {"max_position_embeddings": 32}


def rope(kind: str, theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Name: settings of the model, and how many tokens are compared.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama 1": ({**ALL_HEADS, "rms_norm_eps": 1e-6}, 40),
    "llama 2": ({**GROUPED, "rms_norm_eps": 1e-5}, 40),
    "llama 3": ({**GROUPED, **rope("default", 500000.0)}, 40),
    "llama 3.1": ({**GROUPED, **rope("llama3", 5000.0, factor=8.0, **LLAMA3)}, 150),
    "llama 3.2": ({**GROUPED, "tie_word_embeddings": True, **rope("llama3", 5000.0, factor=32.0, **LLAMA3)}, 150),
    "llama 3.3": ({**GROUPED, "head_dim": 32, **rope("llama3", 5000.0, factor=8.0, **LLAMA3)}, 150),
    "code llama": ({**ALL_HEADS, **rope("default", 1000000.0)}, 40),
    "open_llama": ({**ALL_HEADS, "rms_norm_eps": 1e-6}, 40),
    "tinyllama": ({**GROUPED, "rms_norm_eps": 1e-5}, 40),
    "vicuna 16k, linear": ({**ALL_HEADS, **CONTEXT, **rope("linear", factor=4.0)}, 100),
    "smollm2": ({**SMALL, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True}, 40),
    "yi": ({**GROUPED, **rope("default", 5000000.0)}, 40),
    "dynamic, within": ({**GROUPED, **CONTEXT, **rope("dynamic", factor=4.0)}, 32),
    "dynamic, beyond": ({**GROUPED, **CONTEXT, **rope("dynamic", factor=4.0)}, 100),
    "yarn": ({**GROUPED, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}, 100),
    "yarn, given": (
        {
            **GROUPED,
            **rope("yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0),
            "max_position_embeddings": 128,
        },
        100,
    ),
    "yarn, mscale": (
        {**GROUPED, **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.3)},
        100,
    ),
    "biases": ({**GROUPED, "attention_bias": True, "mlp_bias": True}, 40),
    "wide heads": ({**GROUPED, "head_dim": 24}, 40),
}
MISTRALS: dict[str, tuple[dict[str, Any], int]] = {
    "mistral, beyond its window": ({**GROUPED, "sliding_window": 10}, 60),
    "mistral, within its window": ({**GROUPED, "sliding_window": 64}, 40),
    "mistral 0.3, no window": ({**GROUPED, "sliding_window": None}, 40),
}


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, of which no two parts are alike; norms and biases too."""
    torch.manual_seed(7)
    if name in MISTRALS:
        model: Any = MistralForCausalLM(MistralConfig(**MISTRALS[name][0] | changes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**FAMILIES[name][0] | changes))
    for key, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data.normal_(std=weight.shape[1] ** -0.5 if "embed" not in key else 1.0)
        else:
            weight.data.normal_(mean=0.0 if key.endswith("bias") else 1.0, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", [*FAMILIES, *MISTRALS])
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    """RoPE settings were once read in one of their two spellings only."""
    theirs, seqlen = made(name), (FAMILIES | MISTRALS)[name][1]
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, seqlen, vocab_size=VOCAB_SIZE)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # else a wrong model would be close, too
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama 3.1", "vicuna 16k, linear", "yarn", "yi"])
@torch.inference_mode()
def test_the_older_spelling_of_rope_settings_means_the_same(tmp_path: Path, name: str) -> None:
    theirs, seqlen = made(name), FAMILIES[name][1]
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("rope_parameters")
    config["rope_theta"] = settings.pop("rope_theta")
    kind = settings.pop("rope_type")
    if kind != "default":
        config["rope_scaling"] = {"type": kind, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(2, seqlen, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["one .bin", "several .bin", "several safetensors"])
@torch.inference_mode()
def test_every_layout_of_the_files_gives_the_same(tmp_path: Path, layout: str) -> None:
    theirs = made("llama 2")
    if layout == "several safetensors":
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        write_bins(theirs, tmp_path, 1 if layout == "one .bin" else 3)
    tokens = random_tokens(2, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def write_bins(model: PreTrainedModel, folder: Path, count: int) -> None:
    """What transformers wrote before safetensors: pickles, with an index where there are several."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if count == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    index: dict[str, str] = {}
    for i in range(count):
        names = list(state)[i::count]
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        torch.save({name: state[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.slow
@torch.inference_mode()
def test_a_sliding_window_holds_while_decoding(tmp_path: Path) -> None:
    """One token at a time, beyond the window: a mask of the prefill alone would not show it."""
    theirs = made("mistral, beyond its window")
    theirs.save_pretrained(tmp_path)
    model, tokens = opened(tmp_path), random_tokens(2, 40, vocab_size=VOCAB_SIZE)
    cache = model.new_cache(2, 40)
    step = [model(tokens[:, i : i + 1], torch.full((2,), i), cache) for i in range(40)]
    torch.testing.assert_close(torch.cat(step, dim=1), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama 2", "llama 3.1", "smollm2", "yarn", "biases", "mistral, beyond its window"])
def test_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    """From the folder to the tokens, beyond the window and the original context."""
    check_greedy_tokens(made(name, vocab_size=BYTE_VOCAB_SIZE), tmp_path)
