"""Names and shapes are checked first, in every format: one line that names what is missing or unexpected, and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.engine.build import plan_run
from llama.engine.options import BuildOptions
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.hugging_face import hugging_face_model, hugging_face_state

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, multiple_of=32)
W2 = "layers.1.feed_forward.w2.weight"
HUGGING_FACE_NAMES = {
    "layers.": "model.layers.",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "feed_forward.w2": "mlp.down_proj",
    "norm": "model.norm",
    "tok_embeddings": "model.embed_tokens",
}
GGUF_NAMES = {
    "layers.": "blk.",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "feed_forward.w2": "ffn_down",
    "norm": "output_norm",
    "tok_embeddings": "token_embd",
}


def write_hugging_face(folder: Path, args: ModelArgs, state: dict[str, Tensor]) -> None:
    hugging_face_model(args, random_state(args)).config.save_pretrained(folder)
    save_file(hugging_face_state(state, args.head_dim), folder / "model.safetensors")
    write_byte_tokenizer(folder)


def write_quantized(folder: Path, args: ModelArgs, state: dict[str, Tensor]) -> None:
    write_gguf_model(folder / "model.gguf", args, state, gguf.GGMLQuantizationType.Q8_0)
    write_byte_tokenizer(folder)


WRITERS: dict[str, Callable[[Path, ModelArgs, dict[str, Tensor]], object]] = {
    "meta": lambda folder, args, state: write_meta(folder, args, state=state),
    "meta, 2 shards": lambda folder, args, state: write_meta(folder, args, 2, state=state),
    "hf": write_hugging_face,
    "gguf": write_quantized,
}


def own_name(format: str, name: str) -> str:
    """What the files of a format call a tensor: errors of Hugging Face's and GGUF files once had Meta's names."""
    theirs = {"hf": HUGGING_FACE_NAMES, "gguf": GGUF_NAMES}.get(format, {})
    return re.sub("|".join(map(re.escape, theirs)), lambda part: theirs[part[0]], name) if theirs else name


def error_of(folder: Path) -> str:
    """What a build and a plan say, which is the same."""
    path = folder / "model.gguf" if (folder / "model.gguf").is_file() else folder
    options = BuildOptions(path, folder / "tokenizer.model", device="cpu")
    with pytest.raises(ValueError) as planned:
        plan_run(options)
    with pytest.raises(ValueError) as built:
        Llama.from_options(options)
    assert str(planned.value) == str(built.value)
    assert str(path) in str(built.value) and "\n" not in str(built.value)
    return str(built.value)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("missing", [W2, "norm.weight", "tok_embeddings.weight", "layers.0.attention.wk.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, format: str, missing: str) -> None:
    """Without a w2, counting its blocks ended in a KeyError before names were checked."""
    state = random_state(ARGS)
    WRITERS[format](tmp_path, ARGS, {name: tensor for name, tensor in state.items() if name != missing})
    assert f"lacks tensors {own_name(format, missing)}: " in error_of(tmp_path)


@pytest.mark.parametrize("format", WRITERS)
def test_a_layer_too_many_names_the_first_that_is_missing(tmp_path: Path, format: str) -> None:
    """Sorted as text, the first of layers 2 to 11 was layer 10."""
    state = random_state(ARGS)
    WRITERS[format](tmp_path, dataclasses.replace(ARGS, n_layers=12), state)
    first = own_name(format, "layers.2.attention.wq.weight, layers.2.attention.wk.weight")
    error = error_of(tmp_path)
    assert f"lacks tensors {first}" in error and "and 87 more" in error


@pytest.mark.parametrize("format", WRITERS)
def test_a_layer_too_few_names_what_is_left_over(tmp_path: Path, format: str) -> None:
    WRITERS[format](tmp_path, dataclasses.replace(ARGS, n_layers=1), random_state(ARGS))
    error = error_of(tmp_path)
    assert f"has unexpected tensors {own_name(format, 'layers.1.')}" in error and "and 6 more" in error


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("name", "shape"),
    [(W2, (64, 128)), ("norm.weight", (32,)), ("layers.0.attention.wv.weight", (64, 64))],
)
def test_a_misshapen_tensor_is_named(tmp_path: Path, format: str, name: str, shape: tuple[int, ...]) -> None:
    WRITERS[format](tmp_path, ARGS, random_state(ARGS) | {name: torch.zeros(shape)})
    assert f" {own_name(format, name)} has shape" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda name: f"module.{name}", "of DistributedDataParallel, .* save the state of model.module"),
        (lambda name: f"_orig_mod.{name}", "of torch.compile, .* save the state of model._orig_mod"),
        (lambda name: name.replace("layers.", "layers._orig_mod."), "of torch.compile"),
        (lambda name: f"base_model.model.{name}", "of a peft adapter, .*model.merge_and_unload"),
        (lambda name: name.replace(".weight", ".lora_A.weight"), "of a peft adapter"),
        (lambda name: f"_orig_mod.module.{name}", "of torch.compile"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "of FullyShardedDataParallel, .* its full state dict"),
    ],
    ids=["DDP", "compile", "compiled layers", "peft", "lora", "both", "FSDP"],
)
@pytest.mark.parametrize("format", ["meta", "hf"])
def test_what_a_wrapper_adds_to_names_is_told(
    tmp_path: Path, format: str, wrap: Callable[[str], str], said: str
) -> None:
    """The error listed what was missing, which is everything, and not what stood in its place."""
    WRITERS[format](tmp_path, ARGS, random_state(ARGS))
    if format == "meta":
        torch.save(
            {wrap(name): tensor for name, tensor in random_state(ARGS).items()}, tmp_path / "consolidated.00.pth"
        )
    else:
        state = hugging_face_state(random_state(ARGS), ARGS.head_dim)
        save_file({wrap(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert re.search(said, error_of(tmp_path))


@pytest.mark.parametrize("format", WRITERS)
def test_whole_checkpoints_have_all_names(tmp_path: Path, format: str) -> None:
    """The writers of these tests are not what the errors come from."""
    WRITERS[format](tmp_path, ARGS, random_state(ARGS))
    assert set(open_checkpoint(tmp_path).names()) == set(global_shapes(ARGS))
