"""Mistral's own folders and GGUF files with biases give the logits and tokens that transformers computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from llama.checkpoint import open_checkpoint
from llama.checkpoint.load import read_part
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer
from tests.gguf_files import write_gguf_model
from tests.hugging_face import hugging_face_model, hugging_face_state, opened
from tests.models import build, one_pass, random_tokens

SMALL = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=160)
WINDOW = 10
TOKENS = random_tokens(2, 30, vocab_size=BYTE_VOCAB_SIZE)

# ---------------------------------------------------------------------------------------------------------- Mistral

FORMS = ["pth", "safetensors", "split safetensors"]


def write_mistral(folder: Path, form: str, window: int | None) -> MistralForCausalLM:
    """A folder as Mistral publishes it, and the same model for transformers."""
    state = random_state(SMALL)
    params: dict[str, Any] = {
        key: getattr(SMALL, key)
        for key in ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    }
    params |= {"rope_theta": 1e6, "moe": None} if window is None else {"sliding_window": window}
    (folder / "params.json").write_text(json.dumps(params))
    write_byte_tokenizer(folder)
    if form == "pth":
        torch.save(state, folder / "consolidated.00.pth")
    elif form == "safetensors":
        save_file(state, folder / "consolidated.safetensors")
    else:
        names = {f"consolidated-0000{i + 1}-of-00002.safetensors": list(state)[i::2] for i in range(2)}
        for file, held in names.items():
            save_file({name: state[name] for name in held}, folder / file)
        index = {"weight_map": {name: file for file, held in names.items() for name in held}}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    config = MistralConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.dim,
        intermediate_size=SMALL.hidden_dim,
        num_hidden_layers=SMALL.n_layers,
        num_attention_heads=SMALL.n_heads,
        num_key_value_heads=SMALL.n_kv_heads,
        rms_norm_eps=SMALL.norm_eps,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
    )
    theirs = MistralForCausalLM(config).eval().requires_grad_(False)
    theirs.load_state_dict(hugging_face_state(state, SMALL.head_dim))
    return theirs


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_mistrals_own_folders_are_what_transformers_runs(tmp_path: Path, form: str, window: int | None) -> None:
    """`sliding_window` was an unknown key, and `consolidated.safetensors` no checkpoint."""
    theirs = write_mistral(tmp_path, form, window)
    torch.testing.assert_close(one_pass(opened(tmp_path), TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


def test_tokens_of_mistrals_own_folders_are_those_of_transformers(tmp_path: Path) -> None:
    """Beyond the window, by the kernels."""
    theirs: Any = write_mistral(tmp_path, "safetensors", WINDOW)
    assert_same_tokens(tmp_path, tmp_path / "tokenizer.model", theirs)


def test_the_newest_tokenizer_of_a_mistral_folder_is_found_by_its_name(tmp_path: Path) -> None:
    write_mistral(tmp_path, "safetensors", None)
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.model.v3")
    (tmp_path / "tokenizer.model.v1").write_bytes(b"an older one")
    assert open_checkpoint(tmp_path).tokenizer().n_words == BYTE_VOCAB_SIZE


def test_two_sets_of_weights_are_told(tmp_path: Path) -> None:
    write_mistral(tmp_path, "pth", None)
    write_mistral(tmp_path, "safetensors", None)
    with pytest.raises(ValueError, match=r"consolidated\.\*\.pth and consolidated\.safetensors: remove one"):
        open_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------- GGUF's biases

BIASED = dataclasses.replace(SMALL, attention_bias=True, mlp_bias=True)
BIASES = {
    "all": ("attention", "feed_forward"),
    "attention": ("attention",),
    "mlp": ("feed_forward",),
    "only q, k and v": ("wq", "wk", "wv"),
}


def write_biased(path: Path, kept: tuple[str, ...], kind: gguf.GGMLQuantizationType) -> Any:
    """A GGUF file with the biases of some modules; those that it lacks are zeros for transformers."""
    state = random_state(BIASED)
    absent = [name for name in state if name.endswith(".bias") and not any(part in name for part in kept)]
    stored = write_gguf_model(path, BIASED, {name: state[name] for name in state if name not in absent}, kind)
    zeros: dict[str, Tensor] = {name: torch.zeros_like(state[name]) for name in absent}
    return hugging_face_model(BIASED, stored | zeros)


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@torch.inference_mode()
def test_biases_of_gguf_files_are_added(tmp_path: Path, biases: str, kind: str) -> None:
    """They were unexpected tensors; llama.cpp adds those that are there."""
    theirs = write_biased(tmp_path / "m.gguf", BIASES[biases], gguf.GGMLQuantizationType[kind])
    torch.testing.assert_close(one_pass(opened(tmp_path), TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


def test_tokens_of_a_gguf_file_with_biases_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = write_biased(tmp_path / "m.gguf", BIASES["all"], gguf.GGMLQuantizationType.Q8_0)
    assert_same_tokens(tmp_path / "m.gguf", write_byte_tokenizer(tmp_path), theirs)


def test_ranks_share_the_biases_of_a_gguf_file(tmp_path: Path) -> None:
    write_biased(tmp_path / "m.gguf", BIASES["only q, k and v"], gguf.GGMLQuantizationType.F32)
    checkpoint, state = open_checkpoint(tmp_path), random_state(BIASED)
    for name, whole in {"wq": False, "wk": False, "wo": True}.items():
        name = f"layers.1.attention.{name}.bias"
        expected = torch.zeros(64) if whole else state[name]
        parts = [read_part(checkpoint, name, checkpoint.args, ModelParallel(rank, 2)) for rank in range(2)]
        torch.testing.assert_close(parts[0] if whole else torch.cat(parts), expected, rtol=0, atol=0)


def test_a_layer_without_the_biases_of_the_others_is_told(tmp_path: Path) -> None:
    state = random_state(BIASED)
    del state["layers.1.attention.wv.bias"]
    write_gguf_model(tmp_path / "m.gguf", BIASED, state)
    with pytest.raises(ValueError, match=r"lacks tensors blk\.1\.attn_v\.bias"):
        opened(tmp_path)


def assert_same_tokens(path: Path, tokenizer: Path, theirs: Any) -> None:
    llm = build(path, tokenizer_path=tokenizer)
    llm.tokenizer.stop_tokens = frozenset()
    expected = theirs.generate(TOKENS, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
    assert llm.generate(TOKENS.tolist(), 20, temperature=0)[0] == expected[:, TOKENS.shape[1] :].tolist()
