"""GGUF files that are written: types as llama.cpp's quantize gives them, blocks that stay, adapters that are merged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.gguf_types import GGUF_FILE_TYPES, type_of
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.names import module_name
from llama.checkpoint.shapes import global_shapes
from llama.cli.convert import main as convert
from llama.config import ModelArgs
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.adapters import random_halves, write_peft

# Types of every matrix by llama_model_quantize of llama-cpp-python 0.3.36, in the order of layers.
MIXTURES = json.loads((Path(__file__).parent / "llama_cpp_mixtures.json").read_text())
WHOLE = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 512}


def random_checkpoint(**changes: Any) -> RandomCheckpoint:
    preset = PRESETS["tiny"]
    return RandomCheckpoint("tiny", preset._replace(args=dataclasses.replace(preset.args, **changes)), 1)


def written(path: Path, checkpoint: Any, **options: Any) -> Path:
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), "gguf", **options), path, lambda n_bytes: None)
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures_are_llama_cpps(case: str) -> None:
    args = ModelArgs(vocab_size=512, **MIXTURES[case]["args"])
    for dtype, expected in MIXTURES[case]["types"].items():
        found: dict[str, list[str]] = {}
        for name, shape in global_shapes(args).items():
            if len(shape) > 1:
                found.setdefault(module_name(name), []).append(type_of(GGUF_FILE_TYPES[dtype], name, shape, args))
        runs = {module: " ".join(types) for module, types in found.items()}
        assert runs == {module: " ".join(expand(text)) for module, text in expected.items()}, dtype


def expand(text: str) -> list[str]:
    """Types of all layers, of "Q6_K*3 Q4_K*2"."""
    runs = (run.split("*") for run in text.split())
    return [name for name, count in runs for _ in range(int(count))]


def test_a_file_has_the_types_of_its_mixture(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", random_checkpoint(**WHOLE), dtype="q4_k_m")
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == 15
    types = {name: tensor.tensor_type.name for name, tensor in tensors(path).items()}
    assert types["output.weight"] == types["blk.1.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_norm.weight"] == "F32"
    pure = tensors(written(tmp_path / "b.gguf", random_checkpoint(**WHOLE), dtype="Q4_K_M", is_pure=True))
    assert {tensor.tensor_type.name for tensor in pure.values()} == {"F32", "Q4_K"}


def test_blocks_stay_to_the_bit_where_their_type_stays(tmp_path: Path) -> None:
    """Quantizing the values of blocks again would lose a little each time."""
    first = written(tmp_path / "a.gguf", random_checkpoint(**WHOLE), dtype="q4_k_m")
    convert(first, tmp_path / "same.gguf", format="gguf")
    convert(first, tmp_path / "finer.gguf", format="gguf", dtype="q6_k")
    before, same, finer = (tensors(tmp_path / name) for name in ("a.gguf", "same.gguf", "finer.gguf"))
    for name, tensor in before.items():
        assert same[name].tensor_type == tensor.tensor_type and (same[name].data == tensor.data).all(), name
    assert (finer["blk.1.ffn_down.weight"].data == before["blk.1.ffn_down.weight"].data).all()
    assert finer["blk.0.attn_q.weight"].tensor_type.name == "Q6_K"


def test_blocks_of_a_hugging_face_folder_stay(tmp_path: Path) -> None:
    """Their rows of Q and K are put into Meta's order, block by block."""
    source = random_checkpoint()
    made = writer(source, tokenizer_source(source), "hf", quantize="int4")
    write_checkpoint(made, tmp_path / "int4", lambda n_bytes: None)
    convert(tmp_path / "int4", tmp_path / "a.gguf", format="gguf")
    folder, file = open_checkpoint(tmp_path / "int4"), open_checkpoint(tmp_path / "a.gguf")
    for name in folder.names():
        assert file.stored_as(name) == (folder.stored_as(name) if file.block_type(name) else "float32"), name
        assert torch.equal(file.read(name), folder.read(name).float()), name
    assert file.stored_as("layers.0.attention.wq.weight") == "Q4_1"


def test_adapters_are_merged_and_the_other_blocks_stay(tmp_path: Path) -> None:
    """Blocks are read without what adapters add: those of adapted matrices are not to be kept."""
    source = random_checkpoint(n_layers=2)
    written(tmp_path / "a.gguf", source, dtype="q8_0", is_pure=True)
    state = {name: source.read(name) for name in source.names()}
    halves = random_halves(source.args, state, modules=("self_attn.q_proj", "mlp.down_proj"))
    adapter = write_peft(tmp_path / "lora", source.args, halves)
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", format="gguf", lora=(str(adapter),))
    before, after = open_checkpoint(tmp_path / "a.gguf"), open_checkpoint(tmp_path / "b.gguf")
    for name in before.names():
        expected = before.read(name)
        for module, meta in (("self_attn.q_proj", "attention.wq"), ("mlp.down_proj", "feed_forward.w2")):
            if meta in name:
                a, b = halves[f"{name.split('.')[1]}.{module}"]
                expected = expected + 2 * b @ a
                assert (after.read(name) - expected).abs().max() < expected.abs().max() / 200
                break
        else:
            assert torch.equal(after.read(name), expected), name
        assert after.stored_as(name) == before.stored_as(name)


def test_rows_that_fit_no_block_are_fp16(tmp_path: Path) -> None:
    found = tensors(written(tmp_path / "a.gguf", random_checkpoint(hidden_dim=200), dtype="q4_0"))
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.bin", {"format": "gguf"}, "must end in .gguf"),
        ("a.gguf", {"format": "gguf", "dtype": "q4_k_xl"}, "--dtype must be one of .*q4_k_m"),
        ("a", {"format": "hf", "pure": True}, "--pure is for --format gguf alone"),
        ("a.gguf", {"format": "gguf", "pure": True}, "--pure has nothing to do without --dtype"),
        ("a.gguf", {"format": "hf"}, r"a\.gguf ends in \.gguf, and --format hf makes a folder"),
        ("a.gguf", {"format": "gguf", "quantize": "int4"}, "--quantize int4 is for --format hf alone"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path: Path, name: str, options: Any, words: str) -> None:
    source = written(tmp_path / "source.gguf", random_checkpoint())
    with pytest.raises(ValueError, match=words):
        convert(source, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["q3_k_m", "q4_k_m"])
def test_the_demo_model_knows_paris_in_every_type(demo_model: Path, tmp_path: Path, dtype: str) -> None:
    from llama import Llama

    convert(demo_model, tmp_path / "a.gguf", format="gguf", dtype=dtype)
    llm = Llama.build(tmp_path / "a.gguf", max_seq_len=32, device="cpu")
    (answer,) = llm.text_completion(["The capital of France is"], temperature=0, max_gen_len=3)
    assert "Paris" in answer["generation"]
