"""Quantized releases: what GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes store is what is read and held."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as ggml_dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.backends.eager import EagerBackend
from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.base import StoredCheckpoint
from llama.checkpoint.load import WeightFormat
from llama.checkpoint.releases import find_matrices
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.verify.verify import verify
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.memory.plan import Planner
from llama.model import Transformer
from llama.quantization.gguf_blocks import dequantize
from llama.quantization.weights import BlockWeight
from tests.checkpoints import BYTE_VOCAB_SIZE
from tests.models import build, one_pass
from tests.quantized_releases import (
    AWQ,
    Writer,
    awq,
    bitsandbytes,
    compressed,
    fp4,
    fp8,
    gptq,
    int8,
    llm_int8,
    packed,
    write_release,
)
from tests.unit.test_hugging_face_damage import edit, load, set_to
from tests.unit.test_quantized_loading import held_bytes

# Six heads for two and three ranks; rows of three blocks (96), and of six (192).
ARGS = ModelArgs(
    dim=96, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=16, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=192, norm_eps=1e-5
)
LINEARS = [name for name in global_shapes(ARGS) if "attention.w" in name or "feed_forward.w" in name]
QUERY, KEY, DOWN = (
    f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w2")
)  # fmt: skip

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8"}

# The writer, the configuration, the block type that linears become (None: floats), and the most that blocks are off by.
FORMS: dict[str, tuple[Writer, dict[str, Any], str | None, float]] = {
    "gptq": (gptq(), GPTQ, "Q4_0", 0),
    "gptq v2": (gptq(version=2), GPTQ | {"checkpoint_format": "gptq_v2"}, "Q4_0", 0),
    "gptq groups of 96": (gptq(group=96), GPTQ | {"group_size": 96}, "Q4_0", 0),
    "gptq rows": (gptq(group=-1), GPTQ | {"group_size": -1}, "Q4_0", 0),
    "gptq bf16 scales": (gptq(dtype=torch.bfloat16), GPTQ, "Q4_0", 0),
    "gptq fp32 scales": (gptq(dtype=torch.float32), GPTQ, "Q4_0", 5e-4),
    "gptq asymmetric": (gptq(sym=False), GPTQ | {"sym": False}, "Q4_1", 2.3e-4),
    "gptq v2 asymmetric": (
        gptq(sym=False, version=2), GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, "Q4_1", 2.3e-4,
    ),
    "gptq act-order": (gptq(act=True), GPTQ | {"desc_act": True}, None, 0),
    "gptq act-order asymmetric": (gptq(act=True, sym=False), GPTQ | {"desc_act": True, "sym": False}, None, 0),
    "gptq groups of 16": (gptq(group=16), GPTQ | {"group_size": 16}, None, 0),
    "gptq groups that do not divide": (gptq(group=64), GPTQ | {"group_size": 64}, "Q4_0", 0),
    "gptq 8 bits": (gptq(bits=8), GPTQ | {"bits": 8}, "Q8_0", 0),
    "gptq 8 bits asymmetric": (gptq(bits=8, sym=False), GPTQ | {"bits": 8, "sym": False}, None, 0),
    "awq": (awq(), AWQ, "Q4_1", 2.3e-4),
    "awq groups of 96": (awq(96), AWQ | {"group_size": 96}, "Q4_1", 2.3e-4),
    "int4": (packed(), compressed("pack-quantized", group_size=32), "Q4_0", 0),
    "int4 rows": (packed(group=-1), compressed("pack-quantized", strategy="channel"), "Q4_0", 0),
    "int4 asymmetric": (packed(sym=False), compressed("pack-quantized", group_size=32), "Q4_1", 0),
    "int4 act-order": (packed(act=True), compressed("pack-quantized", group_size=32), None, 0),
    "int8 packed": (packed(bits=8), compressed("pack-quantized", 8, group_size=32), "Q8_0", 0),
    "int8": (int8(), compressed("int-quantized", 8, strategy="channel"), "Q8_0", 0),
    "int8 one scale": (int8(rows=False), compressed("int-quantized", 8, strategy="tensor"), "Q8_0", 0),
    "int8 asymmetric": (int8(sym=False), compressed("int-quantized", 8, strategy="channel"), None, 0),
    "fp8 compressed": (fp8((1, 0)), compressed("float-quantized", 8, strategy="channel"), None, 0),
    "fp8 compressed tiles": (
        fp8((64, 64)), compressed("float-quantized", 8, strategy="block", block_structure=[64, 64]), None, 0,
    ),
    "fp8 one scale": (fp8(None), FP8 | {"activation_scheme": "static"}, None, 0),
    "fp8 tiles": (fp8((64, 128), "weight_scale_inv"), FP8 | {"weight_block_size": [64, 128]}, None, 0),
    "fp8 rows": (fp8((1, 0)), {"quant_method": "fbgemm_fp8"}, None, 0),
    "fp8 flat rows": (fp8((1, 0), flat=True), {"quant_method": "fbgemm_fp8"}, None, 0),
    "nf4": (bitsandbytes(), BNB, None, 0),
    "nf4 plain": (bitsandbytes(nested=False), BNB, None, 0),
    "nf4 blocks beyond rows": (bitsandbytes(block=512), BNB, None, 0),
    "fp4": (bitsandbytes("fp4", nested=False), BNB, None, 0),
    "llm.int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "Q8_0", 5e-4),
    "mxfp4": (fp4(), compressed("mxfp4-pack-quantized", group_size=32), "Q5_0", 0),
    "mxfp4 blocks": (fp4("blocks"), {"quant_method": "mxfp4"}, "Q5_0", 0),
    "modelopt nvfp4": (fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, None, 0),
    "modelopt fp8": (fp8(None), {"quant_method": "modelopt", "quant_algo": "FP8"}, None, 0),
    "nvfp4": (fp4("nvfp4"), compressed("nvfp4-pack-quantized", group_size=16), None, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    top = tmp_path_factory.mktemp("releases")
    return {
        name: (top / name.replace(" ", "-"), write_release(top / name.replace(" ", "-"), ARGS, writer, settings))
        for name, (writer, settings, _, _) in FORMS.items()
    }


Written = dict[str, tuple[Path, dict[str, Tensor]]]


def largest(values: Tensor) -> float:
    return float(values.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_formula(written: Written, form: str) -> None:
    """In fp32, within a rounding or two; rows of Q and K in Meta's order, and what is not quantized as it was."""
    folder, expected = written[form]
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(expected)
    for name, values in expected.items():
        found = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(values.shape) == tuple(found.shape)
        if name in LINEARS:
            assert found.dtype == torch.float32 and checkpoint.reads_as(name) == (torch.float32, "copy")
        torch.testing.assert_close(found.double(), values, rtol=3e-7, atol=1e-7)
    assert checkpoint.rounding == 0


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_the_releases_codes(written: Written, form: str) -> None:
    """Bit for bit where scales are fp16 and there is no zero point, as ggml's own decoder has it."""
    folder, expected = written[form]
    checkpoint, (_, _, type_name, most) = open_checkpoint(folder), FORMS[form]
    assert checkpoint.is_quantized == (type_name is not None)
    for name in LINEARS:
        block_type = checkpoint.block_type(name)
        assert (block_type and block_type.name) == type_name, name
        if block_type is None:
            continue
        blocks = checkpoint.read_blocks(name)
        decoded = ggml_dequantize(blocks.numpy(), GGMLQuantizationType[block_type.name]).astype(np.float64)
        error = largest(torch.from_numpy(decoded) - expected[name])
        if most == 0:
            torch.testing.assert_close(torch.from_numpy(decoded), expected[name], rtol=3e-7, atol=0)
        else:
            assert 0 < error <= most * 2 * largest(expected[name])  # a group may use but half of its range
    assert (checkpoint.rounding == 0) == (most == 0) and checkpoint.rounding <= most


@pytest.mark.parametrize("form", FORMS)
def test_slices_are_those_of_the_whole(written: Written, form: str) -> None:
    """Ranks read rows, and columns that begin inside words and groups."""
    checkpoint = open_checkpoint(written[form][0])
    for name in (QUERY, KEY, DOWN):
        whole, (rows, columns) = checkpoint.read(name), checkpoint.shape(name)
        for start, stop in [(0, rows), (3, 17), (5, 5), (rows - 1, rows)]:
            assert torch.equal(checkpoint.read(name, 0, start, stop), whole[start:stop])
        for start, stop in [(0, columns), (7, 33), (32, 64), (31, 32), (columns - 1, columns)]:
            assert torch.equal(checkpoint.read(name, 1, start, stop), whole[:, start:stop])
        if (block_type := checkpoint.block_type(name)) is not None:
            held = dequantize(checkpoint.read_blocks(name), block_type)
            for dim, start, stop in [(0, 3, 17), (1, 32, 96), (1, 64, 64)]:
                part = dequantize(checkpoint.read_blocks(name, dim, start, stop), block_type)
                assert torch.equal(part, held.narrow(dim, start, stop - start))


@pytest.mark.parametrize("form", ["gptq", "awq", "int4 asymmetric", "int8", "fp8 tiles", "nf4", "mxfp4"])
def test_rows_of_a_matrix_are_a_matrix(form: str) -> None:
    """Where q, k and v are one matrix, each is rows of it, which ranks share."""
    writer, settings, _, _ = FORMS[form]
    tensors, values = writer(128, 96, np.random.default_rng(3))
    (fused,) = find_matrices(
        Path("folder"), {f"qkv_proj.{end}": part for end, part in tensors.items()}, settings
    ).values()
    rows = fused[64:][16:40]
    assert rows.shape == (24, 96)
    expected = torch.from_numpy(values[80:104])
    torch.testing.assert_close(rows.values(0, 0, 24).double(), expected, rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(rows.values(1, 33, 70).double(), expected[:, 33:70], rtol=3e-7, atol=1e-7)
    if rows.block_type is not None:
        assert torch.equal(rows.blocks(0, 3, 9)[0], fused.blocks(0, 83, 89)[0])


def held(checkpoint: StoredCheckpoint, size: int) -> list[dict[str, Any]]:
    """What ranks hold of each matrix."""
    weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
    ranks = []
    for rank in range(size):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        with torch.device("meta"):
            model = Transformer(checkpoint.args, parallel)
        load_weights(model, checkpoint, torch.device("cpu"), weight_format)
        ranks.append({name: model.get_submodule(name.removesuffix(".weight")).weight for name in LINEARS})
    return ranks


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "form", ["gptq", "gptq act-order", "awq", "int4 asymmetric", "int8", "fp8 tiles", "nf4", "mxfp4"]
)
def test_ranks_hold_their_parts_in_the_same_blocks(written: Written, form: str, size: int) -> None:
    checkpoint = open_checkpoint(written[form][0])
    ranks = held(checkpoint, size)
    for name in LINEARS:
        if name.endswith(("wk.weight", "wv.weight")):
            continue  # heads of which repeat
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        parts = [each[name] for each in ranks]
        values = [part if isinstance(part, Tensor) else dequantize(part.blocks, part.block_type) for part in parts]
        joined = torch.cat(values, dim).narrow(dim, 0, checkpoint.shape(name)[dim])
        types = {None if isinstance(part, Tensor) else part.block_type for part in parts}
        assert len(types) == 1
        block_type = types.pop()
        assert block_type == checkpoint.block_type(name) or (size > 1 and dim == 1 and block_type is None)
        if block_type is None:
            assert torch.equal(joined, checkpoint.read(name))
        else:
            assert torch.equal(joined, dequantize(checkpoint.read_blocks(name), block_type))


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8 tiles"])
def test_an_output_that_is_quantized_is_read_too(tmp_path: Path, form: str) -> None:
    """`lm_head` may be among a release's matrices; where it is not, its own floats are read (as in all the others)."""
    writer, settings, type_name, _ = FORMS[form]
    expected = write_release(tmp_path, ARGS, writer, settings, lm_head=True)
    checkpoint = open_checkpoint(tmp_path)
    block_type = checkpoint.block_type("output.weight")
    assert (block_type and block_type.name) == type_name
    torch.testing.assert_close(
        checkpoint.read("output.weight").double(), expected["output.weight"], rtol=3e-7, atol=1e-7
    )


def test_an_output_that_is_quantized_is_used_where_it_is_tied(tmp_path: Path) -> None:
    """It differs from the table, so that it is no copy of it."""
    expected = write_release(tmp_path, ARGS, gptq(), GPTQ, lm_head=True)
    edit(tmp_path / "config.json", set_to(tie_word_embeddings=True))
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.args.tied_embeddings
    torch.testing.assert_close(
        checkpoint.read("output.weight").double(), expected["output.weight"], rtol=3e-7, atol=1e-7
    )


@pytest.mark.parametrize("form", ["gptq", "awq", "nf4"])
def test_a_release_answers_as_the_floats_that_it_stands_for(written: Written, form: str, caplog: Any) -> None:
    """And the log says what became what, and how far blocks are from it."""
    folder, expected = written[form]
    with caplog.at_level("INFO", logger="llama"):
        llm = build(folder)
    floats = Transformer(dataclasses.replace(ARGS, vocab_size=BYTE_VOCAB_SIZE))
    floats.load_state_dict({name: values.float() for name, values in expected.items()}, assign=True)
    tokens = torch.arange(40).view(2, 20) * 7 % BYTE_VOCAB_SIZE
    with torch.inference_mode():
        torch.testing.assert_close(one_pass(llm.model, tokens), one_pass(floats, tokens), rtol=0, atol=2e-3)
    kind = {"gptq": "GPTQ int4 in groups of 32 loaded as Q4_0", "awq": "AWQ int4 in groups of 32 loaded as Q4_1"}
    assert f"{kind.get(form, 'nf4 in groups of 64 loaded as float32')}: 7 matrices" in caplog.text
    assert ("blocks differ from what the files have by at most" in caplog.text) == (form == "awq")


def change(folder: Path, end: str, how: Callable[[Tensor], Tensor | None]) -> None:
    """Change one module's tensor, or remove it."""
    name = f"model.layers.0.mlp.down_proj.{end}"
    state = load_file(folder / "model.safetensors")
    changed = how(state.pop(name))
    state = {each: tensor.clone() for each, tensor in state.items()} | ({} if changed is None else {name: changed})
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def with_value(value: float, *place: int) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return how


REMOVED: Callable[[Tensor], None] = lambda tensor: None  # noqa: E731

# The form, what is damaged and how, and what is said, before weights are read (or, of scales, while they are).
DAMAGE: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    ("gptq", "scales", REMOVED, "down_proj.scales is missing"),
    ("gptq", "qzeros", REMOVED, "down_proj.qzeros is missing"),
    ("gptq", "qweight", REMOVED, "is int32, but no quantized matrix of gptq has it"),
    ("gptq", "qweight", lambda words: words[:-4], "down_proj.scales is float16 (6, 96), not float32 or float16 or"),
    ("gptq", "qweight", lambda words: words[:, :-8].contiguous(), "down_proj.scales is float16 (6, 96), not"),
    ("gptq", "qweight", lambda words: words.flatten(), "down_proj.qweight is int32 (2304,), not int32 a matrix"),
    ("gptq", "qweight", lambda words: words.float(), "down_proj.qweight is float32 (24, 96), not int32"),
    ("gptq", "qzeros", lambda words: words[:, 1:].contiguous(), "down_proj.qzeros is int32 (6, 11), not int32 (6, 12)"),
    ("gptq", "qzeros", with_value(0, 2, 3), "has zero points beside 8, its quantization_config says that it is sym"),
    ("gptq", "scales", with_value(0, 2, 3), "mlp.down_proj has scales of 0, whose codes are not"),
    ("gptq", "scales", with_value(float("nan"), 2, 3), "mlp.down_proj has scales that are not finite"),
    ("gptq act-order", "g_idx", REMOVED, "down_proj.g_idx is missing"),
    ("gptq act-order", "g_idx", with_value(6, 5), "down_proj.g_idx has groups 0 to 6, there are 6"),
    ("gptq act-order", "g_idx", with_value(-1, 5), "down_proj.g_idx has groups -1 to 5, there are 6"),
    ("gptq act-order", "g_idx", lambda order: order[1:].clone(), "down_proj.g_idx is int32 (191,), not"),
    ("awq", "scales", with_value(float("inf"), 1, 1), "mlp.down_proj has scales that are not finite"),
    ("awq", "qzeros", REMOVED, "down_proj.qzeros is missing"),
    ("awq", "qweight", lambda words: words[:-1], "has rows of 191 values, which groups of 32 do not divide"),
    ("int4", "weight_scale", REMOVED, "down_proj.weight_scale is missing"),
    ("int4", "weight_shape", REMOVED, "down_proj.weight_shape is missing"),
    (
        "int4",
        "weight_shape",
        lambda shape: shape + 8,
        "weight_packed is of 96 rows of 24 words, which are no",
    ),
    ("int4", "weight_scale", lambda scales: scales[:, :5].contiguous(), "has 5 groups in rows of 192 values"),
    ("int4", "weight_scale", lambda scales: scales[:, :3].contiguous(), "3 groups in rows of 192 values, which groups"),
    ("int4 asymmetric", "weight_zero_point", lambda words: words[:-1], "weight_zero_point is int32 (11, 6), not int32"),
    ("int8", "weight_scale", REMOVED, "down_proj.weight is int8, but no quantized matrix of compressed-tensors has it"),
    ("int8", "weight", lambda codes: codes.half(), "down_proj.weight is float16 (96, 192), not float8_e4m3fn"),
    ("fp8 tiles", "weight_scale_inv", REMOVED, "down_proj.weight is float8_e4m3fn, but no quantized matrix of fp8 has"),
    ("fp8 tiles", "weight_scale_inv", with_value(0, 1, 1), "weight_scale_inv has scales that are 0 or not finite"),
    ("fp8 tiles", "weight_scale_inv", lambda scales: scales[1:], "weight_scale_inv is float32 (1, 2), not"),
    ("fp8 tiles", "weight", with_value(float("nan"), 1, 1), "mlp.down_proj has values or scales that are not finite"),
    ("nf4", "weight", lambda pairs: pairs[1:], "down_proj.weight is uint8 (9215,), not uint8 (9216,)"),
    ("nf4", "weight.absmax", lambda blocks: blocks[1:], "down_proj.weight.absmax is uint8 (287,), not uint8 (288,)"),
    ("nf4", "weight.nested_absmax", REMOVED, "down_proj.weight.absmax is uint8 (288,), not float32"),
    ("nf4", "weight.nested_absmax", with_value(float("nan"), 1), "has values or scales that are not finite"),
    ("nf4", "weight.quant_map", REMOVED, "down_proj.weight.quant_map is missing"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda said: said[1:], "is no description of a matrix"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4", REMOVED, "but no quantized matrix of bitsandbytes has it"),
    ("llm.int8", "SCB", REMOVED, "down_proj.weight is int8, but no quantized matrix of bitsandbytes has it"),
    ("mxfp4", "weight_scale", with_value(255, 1, 1), "mlp.down_proj has scales that are not finite"),
    ("mxfp4", "weight_scale", lambda scales: scales[:, 1:].contiguous(), "has 5 groups in rows of 192 values"),
    ("mxfp4 blocks", "weight_blocks", lambda blocks: blocks[..., 1:].contiguous(), "is uint8 (96, 6, 15), not"),
    ("mxfp4 blocks", "weight_blocks", lambda blocks: blocks.flatten(1), "weight_blocks is uint8 (96, 96), not"),
    ("mxfp4 blocks", "weight_scales", lambda scales: scales[:, 1:].contiguous(), "weight_scales is uint8 (96, 5), not"),
    ("mxfp4 blocks", "weight_scales", REMOVED, "down_proj.weight_scales is missing"),
    ("modelopt nvfp4", "weight_scale", REMOVED, "down_proj.weight_scale is missing"),
    ("modelopt nvfp4", "weight_scale_2", REMOVED, "down_proj.weight is uint8 (96, 96), not float8_e4m3fn"),
    ("modelopt fp8", "weight_scale", REMOVED, "is float8_e4m3fn, but no quantized matrix of modelopt has it"),
]


@pytest.mark.parametrize(("form", "end", "how", "said"), DAMAGE)
def test_damage_is_told_in_one_line(
    written: Written, tmp_path: Path, form: str, end: str, how: Callable[[Tensor], Tensor | None], said: str
) -> None:
    """It names the tensor; none loads as another model."""
    folder = Path(shutil.copytree(written[form][0], tmp_path / "damaged"))
    change(folder, end, how)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert said in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "settings", "said"),
    [
        ("gptq", {"bits": 3}, "bits must be 4 or 8, got 3"),
        ("gptq", {"bits": True}, "bits must be 4 or 8, got True"),
        ("gptq", {"bits": 8}, "down_proj.scales is float16 (6, 96), not"),
        ("gptq", {"group_size": 0}, "group_size must be -1 or at least 1, got 0"),
        ("gptq", {"group_size": "32"}, "group_size must be a whole number, got '32'"),
        ("gptq", {"group_size": 64}, "scales is float16"),
        ("gptq", {"desc_act": "no"}, "desc_act must be true or false, got 'no'"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic, other bits for some modules, is not supported"),
        ("gptq asymmetric", {"sym": True}, "has zero points beside 8"),
        ("gptq", {"quant_method": "awq"}, "has rows of 24 values, which groups of 32 do not divide"),
        ("awq", {"version": "gemv"}, "version 'gemv' is not supported: only gemm is"),
        ("awq", {"bits": 8}, "bits must be 4, got 8"),
        ("int4", {"format": "marlin-24"}, "format 'marlin-24' is not supported: only pack-quantized"),
        ("int4", {"config_groups": None}, "config_groups must be an object of objects"),
        (
            "int4",
            {"transform_config": {"config_groups": {"R1": {}}}},
            "rotations while the model runs",
        ),
        ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not supported"),
        ("fp8 tiles", {"weight_block_size": [64]}, "weight_block_size must be two whole numbers from 1, got [64]"),
        ("fp8 tiles", {"weight_block_size": [64, 0]}, "weight_block_size must be two whole numbers from 1"),
        ("fp8 tiles", {"weight_block_size": [32, 128]}, "weight_scale_inv is float32"),
        ("modelopt fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not supported: only FP8 and NVFP4 are"),
        ("nf4", {"quant_method": "aqlm"}, "as its weights are sums of vectors in learned codebooks: only gptq, awq"),
        ("nf4", {"quant_method": "new"}, "describes 'new' quantized weights, which are not supported: only gptq"),
        ("nf4", {"quant_method": ["exl2"]}, "describes ['exl2'] quantized weights, which are not supported: only"),
        ("nf4", {"quant_method": "hqq"}, "describes 'hqq' quantized weights, which are not supported, as its zero"),
    ],
)
def test_what_is_not_supported_is_named(
    written: Written, tmp_path: Path, form: str, settings: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(written[form][0], tmp_path / "changed"))
    edit(folder / "config.json", lambda config: config["quantization_config"].update(settings))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert said in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


# Keys that a quantization_config may have, at any depth, and what is there where a file is damaged.
SETTINGS = (
    "bits", "group_size", "desc_act", "sym", "checkpoint_format", "is_marlin_format", "dynamic", "version",
    "zero_point", "config_groups", "format", "transform_config", "sparsity_config", "kv_cache_scheme",
    "weight_block_size", "num_bits", "strategy", "block_structure", "weights", "targets", "quant_algo",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    3,
    2**70,
    0.5,
    float("nan"),
    "",
    "x",
    [],
    [1],
    [[]],
    {},
    {"a": {"b": []}},
    {"a": 1},
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    ["gptq asymmetric", "gptq rows", "awq", "int4 asymmetric", "fp8 tiles", "nf4", "mxfp4 blocks", "modelopt fp8"],
)
def test_settings_of_any_value_load_or_are_told_in_one_line(form: str, caplog: Any) -> None:
    """`dynamic` of a number, and num_bits of a list, ended in tracebacks. What loads has the values that it had."""
    writer, settings, _, _ = FORMS[form]
    tensors, _ = writer(96, 192, np.random.default_rng(3))
    named = {f"down_proj.{end}": part for end, part in tensors.items()}
    (whole,) = find_matrices(Path("folder"), dict(named), settings).values()
    expected, loaded = whole.values(0, 0, 96), 0
    for key, value in itertools.product(SETTINGS, ODD):
        changed = copy.deepcopy(settings)
        schemes = list(changed.get("config_groups", {}).values())
        for place in [changed, *schemes, *(scheme["weights"] for scheme in schemes)]:
            if key in place or place is changed:
                place[key] = copy.deepcopy(value)
        try:
            found = list(find_matrices(Path("folder"), dict(named), changed).values())
            if found and value is not None:  # which means the first version of GPTQ's files
                torch.testing.assert_close(found[0].values(0, 0, 96), expected, rtol=0, atol=0)
            loaded += 1
        except ValueError as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 1000, (key, value)
    assert loaded > 50  # keys that the form does not have


def test_biases_of_zeros_are_left_out(written: Written, tmp_path: Path) -> None:
    """AutoGPTQ writes them beside every matrix, also of models that have none; others are refused."""
    folder = Path(shutil.copytree(written["gptq"][0], tmp_path / "biased"))
    state = load_file(folder / "model.safetensors")
    for bias in (torch.zeros(96), torch.ones(96)):
        save_file({**state, "model.layers.0.mlp.down_proj.bias": bias.half()}, folder / "model.safetensors")
        if bias.any():
            with pytest.raises(ValueError, match="unexpected tensors"):
                load(folder)
        else:
            load(folder)


@torch.inference_mode()
def test_a_release_of_a_family_is_the_llama_inside(written: Written, tmp_path: Path) -> None:
    """GPTQ's Qwen2, with biases of q, k and v and AutoGPTQ's zeros beside o; and its Phi-3, with fused matrices."""
    plain = written["gptq"][0]
    state, tokens = load_file(plain / "model.safetensors"), torch.arange(12)[None]
    attention = "model.layers.0.self_attn"

    def logits(name: str, model_type: str, architecture: str, tensors: dict[str, Tensor]) -> Tensor:
        folder = Path(shutil.copytree(plain, tmp_path / name))
        save_file(tensors, folder / "model.safetensors")
        edit(folder / "config.json", lambda c: c.update(model_type=model_type, architectures=[architecture]))
        return one_pass(build(folder).model, tokens)

    expected = logits("llama", "llama", "LlamaForCausalLM", state)
    biases = {f"{attention}.{name}_proj.bias": torch.zeros(n).half() for name, n in (("q", 96), ("k", 32), ("v", 32))}
    zeros = {**state, **biases, f"{attention}.o_proj.bias": torch.zeros(96).half()}
    assert torch.equal(logits("zeros", "qwen2", "Qwen2ForCausalLM", zeros), expected)
    ones = zeros | {f"{attention}.v_proj.bias": torch.ones(32).half()}
    assert not torch.allclose(logits("ones", "qwen2", "Qwen2ForCausalLM", ones), expected)

    fused = dict(state)
    for whole, parts in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
        room = whole.partition(".")[0]
        for kind in ("qweight", "qzeros", "scales", "g_idx"):
            found = [fused.pop(f"model.layers.0.{room}.{part}_proj.{kind}") for part in parts]
            joined = found[0] if kind == "g_idx" else torch.cat(found, dim=1)
            fused[f"model.layers.0.{whole}.{kind}"] = joined.contiguous()
    assert torch.equal(logits("fused", "phi3", "Phi3ForCausalLM", fused), expected)


@pytest.mark.parametrize(
    ("model_type", "architecture", "changes"),
    [
        ("stablelm", "StableLmForCausalLM", {"layer_norms": True}),
        ("arcee", "ArceeForCausalLM", {"activation": "relu2"}),
    ],
)
@torch.inference_mode()
def test_a_release_with_layer_norms_or_without_a_gate_answers_as_its_floats(
    written: Written, tmp_path: Path, model_type: str, architecture: str, changes: dict[str, Any]
) -> None:
    """Biases of norms that are zeros were once left out, as those that AutoGPTQ writes beside matrices are."""
    plain, values = written["gptq"][:2]
    folder, args = Path(shutil.copytree(plain, tmp_path / "own")), dataclasses.replace(ARGS, **changes)
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    state = load_file(plain / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if args.is_gated or "gate_proj" not in name}
    state |= {f"{norm}.bias": torch.zeros(96).half() for norm in norms if args.layer_norms}
    save_file(state, folder / "model.safetensors")
    said = {"model_type": model_type, "architectures": [architecture], "partial_rotary_factor": 1.0}
    said |= {"hidden_act": args.activation, "layer_norm_eps": 1e-5}
    edit(folder / "config.json", lambda config: config.update(said))
    floats = Transformer(args)
    own = {name: values.get(name, torch.zeros(shape)) for name, shape in global_shapes(args).items()}
    floats.load_state_dict(own)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(one_pass(build(folder).model, tokens), one_pass(floats, tokens), rtol=1e-4, atol=1e-4)


def test_scales_of_activations_and_caches_are_not_used(written: Written, tmp_path: Path, caplog: Any) -> None:
    folder = Path(shutil.copytree(written["fp8 one scale"][0], tmp_path / "static"))
    state, prefix = load_file(folder / "model.safetensors"), "model.layers.0.self_attn"
    scales = {f"{prefix}.q_proj.input_scale": torch.ones(1), f"{prefix}.k_scale": torch.ones(1)}
    save_file(state | scales, folder / "model.safetensors")
    with caplog.at_level("INFO", logger="llama"):
        load(folder)
    assert "scales of activations, which are not rounded here: model.layers.0.self_attn.k_scale" in caplog.text


@pytest.mark.parametrize("form", ["gptq", "gptq act-order", "awq", "nf4"])
def test_planned_weights_are_the_bytes_of_what_is_held(written: Written, form: str) -> None:
    checkpoint = open_checkpoint(written[form][0])
    weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
    for rank, size in ((0, 1), (1, 2), (2, 3)):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        planner = Planner(
            checkpoint, checkpoint.args, parallel, weight_format, EagerBackend(torch.device("cpu")), free=10**9
        )
        with torch.device("meta"):
            model = Transformer(checkpoint.args, parallel)
        load_weights(model, checkpoint, torch.device("cpu"), weight_format)
        assert planner.weights.total == held_bytes(model), (rank, size)


@pytest.mark.parametrize("form", ["gptq act-order", "int8", "fp8 tiles", "nf4", "mxfp4"])
def test_a_whole_release_is_found_whole(written: Written, form: str) -> None:
    """Codes of any dtype are checked, and are neither NaN nor wrong where they are zeros."""
    assert not [finding for finding in verify(written[form][0], True, lambda n_bytes: None) if finding.problem]
