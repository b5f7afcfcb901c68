"""Damaged or unsupported Hugging Face folders end in our own one-line error, or load: nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.load import WeightFormat
from llama.config import ModelArgs
from llama.model import Transformer
from tests.checkpoints import random_state
from tests.hugging_face import hugging_face_model, hugging_face_state

ARGS = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=31, multiple_of=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    hugging_face_model(ARGS, random_state(ARGS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    hugging_face_model(ARGS, random_state(ARGS)).save_pretrained(folder, max_shard_size="2KB")
    return folder


def load(folder: Path) -> Transformer:
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    return model


def test_weights_behind_a_header_of_odd_length_are_copied(whole: Path, tmp_path: Path) -> None:
    """Views of such a file lie between the addresses that a processor reads floats from."""
    folder = shutil.copytree(whole, tmp_path / "odd")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    file.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    expected = load(whole).state_dict()
    for name, weight in load(folder).state_dict().items():
        assert weight.data_ptr() % weight.element_size() == 0 and torch.equal(weight, expected[name]), name


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_to(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_to(architectures=["PhiForCausalLM"], model_type="phi"), "PhiForCausalLM, which has layer norms"),
        (set_to(architectures=["OtherForCausalLM"], model_type="other"), "of model_type 'other': only llama, mistral"),
        (set_to(architectures=["MllamaForConditionalGeneration"], model_type="mllama"), "MllamaForConditional"),
        (set_to(architectures=["Llama4ForConditionalGeneration"], model_type="llama4"), "Llama4ForConditional"),
        (set_to(quantization_config={"quant_method": "hqq", "bits": 4}), "'hqq' quantized weights"),
        (set_to(hidden_act="gelu"), "hidden_act 'gelu'"),
        (set_to(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (set_to(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "short_factor is missing"),
        (set_to(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}), "RoPE scaling 'proportional'"),
        (set_to(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor is missing"),
        (set_to(rope_parameters=[1]), "rope_parameters must be objects"),
        (set_to(rope_parameters=[]), "rope_parameters must be objects"),
        (set_to(rope_parameters=None, rope_theta=[]), "rope_theta must be a positive number"),
        (set_to(rope_parameters=None, rope_theta=0), "rope_theta must be a positive number"),
        (set_to(num_key_value_heads=3), "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        (set_to(hidden_size="big"), "config.json: hidden_size must be an integer"),
        (set_to(tie_word_embeddings="no"), "tie_word_embeddings must be true or false"),
        (set_to(eos_token_id="</s>"), "eos_token_id must be a token id or a list"),
        (set_to(intermediate_size=56), ": model.layers.0.mlp.gate_proj.weight has shape"),
        (set_to(num_hidden_layers=0), "config.json: num_hidden_layers must be an integer from 1"),
        (set_to(rms_norm_eps=-1), "config.json: rms_norm_eps must be a positive number"),
        (lambda config: config.pop("num_hidden_layers"), "num_hidden_layers is missing"),
        (set_to(num_hidden_layers=2), "lacks tensors model.layers.1.self_attn.q_proj.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configurations_that_do_not_fit_are_named(
    tmp_path: Path, whole: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "edited"))
    edit(folder / "config.json", change)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert said in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_that_names_a_missing_file_is_told(tmp_path: Path, split: Path) -> None:
    folder = Path(shutil.copytree(split, tmp_path / "edited"))
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {gone.name}.*not in the folder"):
        load(folder)


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, split: Path) -> None:
    """An index from a stranger once made its reader open any file of the machine."""
    folder = Path(shutil.copytree(split, tmp_path / "edited"))
    edit(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../../secret.safetensors")
    )
    with pytest.raises(ValueError, match="only files beside it"):
        load(folder)


@pytest.mark.parametrize("length", [0, 3, 8, 1 << 20, 1 << 62])
def test_a_wrong_header_length_is_told(tmp_path: Path, whole: Path, length: int) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "edited"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a usable safetensors file"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_not_supported_are_named(tmp_path: Path, whole: Path, dtype: torch.dtype) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "edited"))
    state = hugging_face_state(random_state(ARGS), ARGS.head_dim)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight has dtype \w+, only F32, F16, BF16 are supported"):
        load(folder)


def test_a_file_cut_at_any_place_is_told(tmp_path: Path, whole: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "edited"))
    data = (folder / "model.safetensors").read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(data), 997)]:
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is"):
            load(folder)
