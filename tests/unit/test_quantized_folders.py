"""Hugging Face folders whose weights are blocks: what is written is what is read, and damage is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.checkpoint import Checkpoint, open_checkpoint
from llama.checkpoint.export.huggingface import HuggingFaceWriter
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.huggingface import HuggingFaceCheckpoint
from llama.checkpoint.names import module_name
from llama.checkpoint.verify.verify import verify
from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES, dequantize, quantize
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.checkpoints import write_meta
from tests.models import build
from tests.unit.test_hugging_face_damage import edit, load, set_to

TABLES = ("tok_embeddings", "output")
QUERY, DOWN = "layers.1.attention.wq.weight", "layers.0.feed_forward.w2.weight"


def random_checkpoint(**changes: Any) -> RandomCheckpoint:
    preset = PRESETS["tiny"]
    return RandomCheckpoint("tiny", preset._replace(args=dataclasses.replace(preset.args, **changes)), 1)


def convert(source: Checkpoint, target: Path, format: str = "hf", **options: Any) -> HuggingFaceCheckpoint:
    write_checkpoint(writer(source, tokenizer_source(source), format, **options), target, lambda n_bytes: None)
    return open_checkpoint(target)  # type: ignore[return-value]


def expected_type(name: str, mode: str) -> str | None:
    if "norm" in name:
        return None
    return "Q4_1" if mode == "int4" and module_name(name) not in TABLES else "Q8_0"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    convert(random_checkpoint(), folder, quantize="int4")
    return folder


@pytest.fixture
def copied(tmp_path: Path, int4: Path) -> Path:
    return Path(shutil.copytree(int4, tmp_path / "copied"))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"head_dim": 16}], ids=str)
def test_a_quantized_folder_holds_the_blocks_of_every_linear_weight(
    tmp_path: Path, mode: str, changes: dict[str, Any]
) -> None:
    """Rows of Q and K lie in Hugging Face's order in the file, and come back in Meta's."""
    source = random_checkpoint(**changes)
    checkpoint = convert(source, tmp_path / "hf", quantize=mode)
    assert set(checkpoint.names()) == set(source.names()) and checkpoint.is_quantized
    for name in source.names():
        values, found = source.read(name), checkpoint.read(name)
        type_name, block_type = expected_type(name, mode), checkpoint.block_type(name)
        assert (block_type and block_type.name) == type_name, name
        assert checkpoint.shape(name) == source.shape(name) == found.shape
        if block_type is None:
            assert torch.equal(found, values)
        else:
            assert torch.equal(checkpoint.read_blocks(name), quantize(values, block_type)), name
            assert torch.equal(found, dequantize(quantize(values, block_type), block_type))


def test_the_files_bytes_are_under_the_usual_names_in_the_usual_order(int4: Path) -> None:
    state = load_file(int4 / "model.safetensors")
    rows = state["model.layers.1.self_attn.q_proj.weight"]
    args = open_checkpoint(int4).args
    expected = quantize(random_checkpoint().read(QUERY), BLOCK_TYPES["Q4_1"])
    pairs = expected.view(args.n_heads, args.head_dim // 2, 2, -1)
    halves = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).flatten(0, 1)
    assert rows.dtype == torch.uint8 and torch.equal(rows, halves)
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], open_checkpoint(int4).read_blocks(DOWN))
    config = json.loads((int4 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ggml_blocks"
    assert config["quantization_config"]["types"]["lm_head.weight"] == "Q8_0"


@pytest.mark.parametrize("name", [QUERY, DOWN, "tok_embeddings.weight"])
def test_rows_and_columns_of_blocks_are_read_alone(int4: Path, name: str) -> None:
    """A rank reads its part; columns begin inside a block where ranks do not split them evenly."""
    checkpoint = open_checkpoint(int4)
    whole, (rows, columns), block_type = checkpoint.read(name), checkpoint.shape(name), checkpoint.block_type(name)
    assert block_type is not None
    for start, stop in [(0, rows), (3, 17), (5, 5), (rows - 1, rows)]:
        assert torch.equal(checkpoint.read(name, 0, start, stop), whole[start:stop])
        assert torch.equal(dequantize(checkpoint.read_blocks(name, 0, start, stop), block_type), whole[start:stop])
    for start, stop in [(0, columns), (7, 33), (31, 33), (32, 32), (5, 5), (columns - 1, columns)]:
        assert torch.equal(checkpoint.read(name, 1, start, stop), whole[:, start:stop])
    for start, stop in [(0, columns), (0, 32), (32, 64), (32, 32)]:
        assert torch.equal(dequantize(checkpoint.read_blocks(name, 1, start, stop), block_type), whole[:, start:stop])
    assert checkpoint.reads_as(name) == (torch.float32, "copy")


def test_blocks_are_not_copied_out_of_the_mapped_file(int4: Path) -> None:
    checkpoint = open_checkpoint(int4)
    first, again = checkpoint.read_blocks(DOWN), checkpoint.read_blocks(DOWN, 0, 1)
    assert first.is_contiguous() and again.data_ptr() == first.data_ptr() + first.shape[1]


def test_rows_that_are_not_whole_blocks_stay_floats(tmp_path: Path) -> None:
    source = random_checkpoint(hidden_dim=200)
    checkpoint = convert(source, tmp_path / "hf", quantize="int4")
    assert checkpoint.block_type(DOWN) is None and torch.equal(checkpoint.read(DOWN), source.read(DOWN))
    assert checkpoint.block_type("layers.0.feed_forward.w1.weight") == BLOCK_TYPES["Q4_1"]


def test_a_split_folder_holds_the_same(tmp_path: Path, int4: Path) -> None:
    source = random_checkpoint()
    made = writer(source, tokenizer_source(source), "hf", quantize="int4")
    assert isinstance(made, HuggingFaceWriter)
    made.max_file_bytes = 60_000
    written: list[int] = []
    write_checkpoint(made, tmp_path / "many", written.append)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    assert (
        sum(written) == made.nbytes == sum(tensor.nbytes for tensor in load_file(int4 / "model.safetensors").values())
    )
    one, many = open_checkpoint(int4), open_checkpoint(tmp_path / "many")
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    assert not [finding for finding in verify(tmp_path / "many", True, lambda n_bytes: None) if finding.problem]


def test_other_formats_get_the_decoded_values(tmp_path: Path, int4: Path) -> None:
    one = open_checkpoint(int4)
    for format, dtype in (("meta", "float32"), ("hf", "float32"), ("hf", None)):
        dense = convert(one, tmp_path / f"{format}-{dtype}", format, dtype=dtype)
        for name in one.names():
            expected = one.read(name) if dtype else one.read(name).bfloat16()
            assert dense.block_type(name) is None and torch.equal(dense.read(name), expected)


def test_gguf_files_are_quantized_from_their_decoded_values(tmp_path: Path) -> None:
    source = random_checkpoint()
    write_checkpoint(
        writer(source, tokenizer_source(source), "gguf", dtype="q5_1"), tmp_path / "a.gguf", lambda n_bytes: None
    )
    decoded = open_checkpoint(tmp_path / "a.gguf")
    checkpoint = convert(decoded, tmp_path / "hf", quantize="int4")
    for name in (QUERY, DOWN):
        assert torch.equal(checkpoint.read_blocks(name), quantize(decoded.read(name), BLOCK_TYPES["Q4_1"]))


def test_a_model_runs_on_the_decoded_weights(tmp_path: Path, int4: Path) -> None:
    dense = tmp_path / "dense"
    convert(open_checkpoint(int4), dense, dtype="float32")
    prompts = [[5, 6, 7, 8], [300, 20]]
    assert build(int4).generate(prompts, 6, temperature=0) == build(dense).generate(prompts, 6, temperature=0)


@pytest.mark.parametrize(
    ("format", "mode", "words"),
    [
        ("meta", "int4", "--quantize int4 is for --format hf alone"),
        ("gguf", "int8", "--quantize int8 is for --format hf alone"),
        ("hf", "int2", "--quantize must be one of int8, int4, got 'int2'"),
    ],
)
def test_what_cannot_be_quantized_is_told_before_anything_is_written(
    tmp_path: Path, format: str, mode: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(random_checkpoint(), tmp_path / "out", format, quantize=mode)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), 3e7])
def test_weights_that_no_scale_can_hold_are_named(tmp_path: Path, value: float) -> None:
    state = write_meta(tmp_path / "meta", ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=512, multiple_of=32))
    state["layers.0.attention.wo.weight"][3, 4] = value
    torch.save(state, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wo\.weight: values up to .* leave --quantize out"):
        convert(open_checkpoint(tmp_path / "meta"), tmp_path / "hf", quantize="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def set_types(**types: Any) -> Callable[[dict[str, Any]], object]:
    names = {"down": "model.layers.0.mlp.down_proj.weight", "norm": "model.norm.weight", "other": "model.other.weight"}
    renamed = {names[name]: type_name for name, type_name in types.items()}
    return lambda config: config["quantization_config"]["types"].update(renamed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.pop("quantization_config"), "has dtype torch.uint8, only F32, F16, BF16 work"),
        (set_to(quantization_config={"quant_method": "hqq"}), "'hqq' quantized weights, which are not supported"),
        (set_to(quantization_config=["ggml_blocks"]), "quantized weights, which are not supported"),
        (set_to(quantization_config={"quant_method": "ggml_blocks"}), "must have an object `types`"),
        (set_to(quantization_config={"quant_method": "ggml_blocks", "types": ["Q4_1"]}), "must have an object `types`"),
        (set_types(down="Q9_9"), "gives model.layers.0.mlp.down_proj.weight the type 'Q9_9', only Q4_0, Q4_1"),
        (set_types(down=["Q4_1"]), "the type ['Q4_1'], only"),
        (set_types(down="Q8_0"), "down_proj.weight is to be rows of Q8_0 blocks of 34 bytes, but is uint8 ("),
        (set_types(norm="Q8_0"), "model.norm.weight is to be rows of Q8_0 blocks of 34 bytes, but is bfloat16 (64,)"),
        (set_types(other="Q8_0"), "model.other.weight is to be rows of Q8_0 blocks of 34 bytes, but is missing"),
        (lambda config: config["quantization_config"]["types"].pop("lm_head.weight"), "has dtype torch.uint8"),
    ],
)
def test_configurations_that_do_not_fit_are_named(
    copied: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(copied / "config.json", change)
    with pytest.raises(ValueError) as caught:
        load(copied)
    assert said in str(caught.value) and str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)
    # All checks are made, whatever is wrong.
    assert any(finding.problem for finding in verify(copied, True, lambda n_bytes: None))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, name: change(state[name]).contiguous()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:, :-1], "is to be rows of Q4_1 blocks of 20 bytes, but is uint8 (64, "),
        (lambda rows: rows[:, :-20], "has shape (64, "),
        (lambda rows: rows[:-1], "has shape (63, "),
        (lambda rows: rows.flatten(), "is to be rows of Q4_1"),
        (lambda rows: rows.view(torch.int8), "has dtype I8"),
        (lambda rows: rows.float(), "is to be rows of Q4_1 blocks of 20 bytes, but is float32"),
    ],
)
def test_tensors_of_other_sizes_than_their_blocks_are_named(
    copied: Path, change: Callable[[Tensor], Tensor], said: str
) -> None:
    change_tensor(copied, "model.layers.0.mlp.down_proj.weight", change)
    with pytest.raises(ValueError) as caught:
        load(copied)
    assert said in str(caught.value) and str(copied) in str(caught.value)
    assert any(finding.problem for finding in verify(copied, True, lambda n_bytes: None))


def test_verifying_finds_nan_in_scales(copied: Path) -> None:
    def damage(rows: Tensor) -> Tensor:
        rows[2, :2] = torch.tensor([float("nan")]).half().view(torch.uint8)
        return rows

    assert not [finding for finding in verify(copied, True, lambda n_bytes: None) if finding.problem]
    change_tensor(copied, "model.layers.0.mlp.down_proj.weight", damage)
    problems = [finding.problem for finding in verify(copied, True, lambda n_bytes: None) if finding.problem]
    assert len(problems) == 1 and "model.layers.0.mlp.down_proj.weight has 32 NaN" in problems[0]


def test_blocks_that_are_no_larger_stay_to_the_bit(tmp_path: Path) -> None:
    """int8 made 143 MB of the demo model's 97: Q4_1 became Q8_0, which holds the same values at 8.5 bits."""
    source = convert(random_checkpoint(), tmp_path / "q4_1.gguf", "gguf", dtype="q4_1")
    again = convert(source, tmp_path / "hf", quantize="int8")
    for name in source.names():
        assert again.block_type(name) == source.block_type(name), name
        if source.block_type(name):
            assert torch.equal(again.read_blocks(name), source.read_blocks(name)), name
    larger = convert(source, tmp_path / "q8_0.gguf", "gguf", dtype="q8_0")
    smaller = convert(larger, tmp_path / "int4", quantize="int4")
    assert {name: smaller.block_type(name) for name in source.names()} == {
        name: type_name and BLOCK_TYPES[type_name]
        for name in source.names()
        for type_name in [expected_type(name, "int4")]
    }
