"""Whole models, small ones, whose files are to be damaged: a folder for each format."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.config import ModelArgs
from llama.testing.model_presets import Preset, TokenizerKind
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.checkpoints import write_byte_tokenizer
from tests.fuzz.structures import parse_gguf
from tests.fuzz.templates import TEMPLATES
from tests.quantized_releases import (
    AWQ,
    Writer,
    awq,
    bitsandbytes,
    compressed,
    fp4,
    fp8,
    gptq,
    packed,
    write_meta_release,
    write_release,
)

SMALL = ModelArgs(32, 2, 4, n_kv_heads=2, vocab_size=512, multiple_of=32)


def _make(path: Path, format: str, tokenizer: TokenizerKind = "sentencepiece", dtype: str = "float32") -> None:
    checkpoint = RandomCheckpoint("seed", Preset(SMALL, tokenizer, 2048), 1)
    write_checkpoint(
        writer(checkpoint, tokenizer_source(checkpoint), format, dtype=dtype), path, progress=lambda n_bytes: None
    )


def _meta(path: Path) -> None:
    """Two shards and Llama 3's kind of tokenizer, of as many tokens as the other."""
    checkpoint = RandomCheckpoint("seed", Preset(SMALL, "sentencepiece", 2048), 1)
    made = writer(checkpoint, tokenizer_source(checkpoint), "meta", shards=2, dtype="float32")
    write_checkpoint(made, path, progress=lambda n_bytes: None)
    write_byte_tokenizer(path)


def _legacy(path: Path) -> None:
    """As torch before 1.6 saved it, and SentencePiece."""
    _make(path, "meta")
    file = path / "consolidated.00.pth"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)


def _hugging_face(path: Path) -> None:
    _make(path, "hf")
    for name, change in {
        "config.json": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window": None},
        "tokenizer_config.json": {"chat_template": TEMPLATES["llama2"], "model_max_length": 2048, "legacy": True},
    }.items():
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | change, indent=1))


def _split(path: Path) -> None:
    """Two files with an index, and SentencePiece with the older files beside it."""
    _make(path, "hf")
    (path / "tokenizer.json").unlink()
    _into_two_files(path)
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


def _into_two_files(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in files for name in files[file]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _bin(path: Path) -> None:
    """A pickle, and a tokenizer.json of byte-level BPE."""
    _make(path, "hf", tokenizer="smollm")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def _gguf(path: Path) -> None:
    path.mkdir()
    _make(path / "model.gguf", "gguf")


def _gguf_blocks(path: Path) -> None:
    path.mkdir()
    _make(path / "model.gguf", "gguf", tokenizer="smollm", dtype="q8_0")


def _chat(path: Path) -> None:
    """A folder whose chat template alone is damaged."""
    _make(path, "hf")
    (path / "chat_template.jinja").write_text(TEMPLATES["llama3"])


def _unigram(path: Path) -> None:
    """A tokenizer.json of the kind that T5 and its like have, with the same pieces."""
    _make(path, "hf")
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    pieces = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    content |= {"normalizer": None, "pre_tokenizer": space, "decoder": space}
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[text, -float(i)] for text, i in pieces]}
    file.write_text(json.dumps(content))


def _released(writer: Writer, settings: dict[str, object]) -> Callable[[Path], None]:
    """A quantized release, with rows of two blocks."""
    args = replace(SMALL, dim=64, n_layers=1, hidden_dim=64, norm_eps=1e-5)

    def write(path: Path) -> None:
        write_release(path, args, writer, settings)

    return write


def _spinquant(path: Path) -> None:
    """Llama 3.2's quantized release."""
    write_meta_release(path, replace(SMALL, dim=64, n_layers=1, hidden_dim=64, norm_eps=1e-5), spinquant=True)


def _awq_beside(path: Path) -> None:
    """AutoAWQ's own file beside, and weights in two files with an index."""
    _released(awq(), AWQ)(path)
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    beside = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (path / "quant_config.json").write_text(json.dumps(beside))
    _into_two_files(path)


def _family(model_type: str, architecture: str, **settings: Any) -> Callable[[Path], None]:
    """A folder of a family: biases of q, k and v, fused matrices, or multipliers."""

    def write(path: Path) -> None:
        _make(path, "hf")
        state = load_file(path / "model.safetensors")
        for i in range(SMALL.n_layers):
            layer = f"model.layers.{i}"
            attention = [f"{layer}.self_attn.{each}_proj" for each in "qkv"]
            if model_type == "qwen2":
                state |= {f"{name}.bias": torch.arange(len(state[f"{name}.weight"])) / 100 for name in attention}
            if model_type == "phi3":
                gates = [f"{layer}.mlp.{each}_proj" for each in ("gate", "up")]
                for fused, parts in (("self_attn.qkv_proj", attention), ("mlp.gate_up_proj", gates)):
                    state[f"{layer}.{fused}.weight"] = torch.cat([state.pop(f"{part}.weight") for part in parts])
        save_file(state, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        named = {"model_type": model_type, "architectures": [architecture]}
        (path / "config.json").write_text(json.dumps(config | named | settings))

    return write


def _gguf_family(name: str, **scales: float) -> Callable[[Path], None]:
    """A GGUF file under the keys of a family."""

    def write(path: Path) -> None:
        _gguf(path)
        parts = parse_gguf((path / "model.gguf").read_bytes())
        old, new = b"llama.", f"{name}.".encode()
        text = struct.pack("<Q", len(name)) + name.encode()
        named = []
        for key, code, value in parts.values:
            key = new + key[len(old) :] if key.startswith(old) else key
            named.append((key, code, text if key == b"general.architecture" else value))
        parts.values = named
        parts.values += [(f"{name}.{key}".encode(), 6, struct.pack("<f", value)) for key, value in scales.items()]
        (path / "model.gguf").write_bytes(parts.write())

    return write


class Format(NamedTuple):
    """A kind of model: what writes a whole one, its files that are damaged, and the number of mutants in a full run."""

    write: Callable[[Path], None]
    files: tuple[str, ...]  # one that says more about others may stand twice
    mutants: int


RELEASED = ("config.json", "model.safetensors")
META_RELEASED = ("params.json", "consolidated.00.pth", "tokenizer.model", "tokenizer.model")
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
FP8: dict[str, object] = {"quant_method": "fp8", "weight_block_size": [32, 32]}

FORMATS = {
    "meta": Format(
        _meta, ("params.json", "params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"), 1500
    ),
    "legacy": Format(_legacy, ("consolidated.00.pth", "tokenizer.model"), 800),
    "hugging_face": Format(
        _hugging_face,
        ("config.json", "config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"),
        1800,
    ),
    "split": Format(
        _split,
        ("model.safetensors.index.json", "model-00002-of-00002.safetensors", "special_tokens_map.json"),
        900,
    ),
    "bin": Format(_bin, ("pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"), 900),
    "tokenizer_json": Format(_hugging_face, ("tokenizer.json",), 1200),
    "unigram": Format(_unigram, ("tokenizer.json",), 400),
    "gguf": Format(_gguf, ("model.gguf",), 1500),
    "gguf_blocks": Format(_gguf_blocks, ("model.gguf",), 700),
    "gptq": Format(_released(gptq(act=True, sym=False), GPTQ), RELEASED, 50),
    "awq": Format(_released(awq(), AWQ), RELEASED, 50),
    "compressed": Format(_released(packed(sym=False), compressed("pack-quantized", group_size=32)), RELEASED, 50),
    "fp8": Format(_released(fp8((32, 32), "weight_scale_inv"), FP8), RELEASED, 50),
    "bitsandbytes": Format(_released(bitsandbytes(), {"quant_method": "bitsandbytes"}), RELEASED, 50),
    "spinquant": Format(_spinquant, META_RELEASED, 50),
    "mxfp4": Format(_released(fp4("blocks"), {"quant_method": "mxfp4"}), RELEASED, 50),
    "modelopt": Format(_released(fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}), RELEASED, 50),
    "awq_beside": Format(
        _awq_beside,
        ("quant_config.json", "quant_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        50,
    ),
    "qwen2": Format(
        _family("qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        RELEASED,
        50,
    ),
    "phi3": Format(_family("phi3", "Phi3ForCausalLM", partial_rotary_factor=0.5, rope_scaling=None), RELEASED, 50),
    "granite": Format(
        _family(
            "granite",
            "GraniteForCausalLM",
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
            logits_scaling=2.0,
        ),
        RELEASED,
        50,
    ),
    "gguf_qwen2": Format(_gguf_family("qwen2"), ("model.gguf",), 50),
    "gguf_granite": Format(
        _gguf_family(
            "granite", **{"embedding_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.3, "logit_scale": 2.0}
        ),
        ("model.gguf",),
        50,
    ),
    "chat": Format(_chat, ("chat_template.jinja",), 300),
}


def write_seed(format: str, folder: Path) -> None:
    """Write the whole model of a format to a folder that does not exist."""
    FORMATS[format].write(folder)
