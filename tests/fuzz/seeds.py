"""Whole models, small ones, whose files are to be damaged: a folder for each format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.config import ModelArgs
from llama.testing.model_presets import Preset, TokenizerKind
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.checkpoints import write_byte_tokenizer
from tests.fuzz.templates import TEMPLATES
from tests.quantized_releases import AWQ, Writer, awq, bitsandbytes, compressed, fp8, gptq, packed, write_release

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
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in files for name in files[file]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))


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


class Format(NamedTuple):
    """A kind of model: what writes a whole one, its files that are damaged, and the number of mutants in a full run."""

    write: Callable[[Path], None]
    files: tuple[str, ...]  # one that says more about others may stand twice
    mutants: int


RELEASED = ("config.json", "model.safetensors")
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
    "chat": Format(_chat, ("chat_template.jinja",), 300),
}


def write_seed(format: str, folder: Path) -> None:
    """Write the whole model of a format to a folder that does not exist."""
    FORMATS[format].write(folder)
