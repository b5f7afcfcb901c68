"""What other loaders were reported to stumble over, each as a small folder that loads with the reference's answer.

| report | what is loaded |
| --- | --- |
| AutoGPTQ/AutoGPTQ#22 | quantize_config.json beside gptq_model-4bit-128g.safetensors |
| AutoGPTQ/AutoGPTQ#462 | quantization_config.json, as optimum calls it |
| vllm-project/vllm#1419 | AutoAWQ's quant_config.json, with keys of its own |
| vllm-project/vllm#38966 | GPTQ whose zero points are of the second version, and said to be of the first |
| intel/neural-compressor#2204 | GPTQ whose g_idx was never filled in |
| intel/auto-round#267 | GPTQ without g_idx |
| casper-hansen/AutoAWQ#589 | AWQ that leaves some modules as they are |
| vllm-project/vllm#1258 | AWQ whose groups ranks do not divide |
| vllm-project/vllm#6081 | one scale of the cache for keys and values |
| vllm-project/compressed-tensors#135 | a release whose cache alone is quantized |
| vllm-project/vllm#15784 | NVIDIA's FP8, with scales of keys inside projections |
| vllm-project/vllm#45102 | NVIDIA's NVFP4, with an output that is quantized |
| dphnAI/sonar#561 | EXL2, refused by name, whatever its files are called |
| ml-explore/mlx-lm#1298 | Granite whose tied table is stored twice |
| ggml-org/llama.cpp#9114 | a GGUF adapter of Llama 3.1, with RoPE's factors in it |
| vllm-project/vllm#336 | heads of 100 dimensions (open_llama 3B) |
| HabanaAI/vllm-fork#1294 | head_dim of null |
| openvinotoolkit/openvino.genai#1355 | no num_key_value_heads |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.checkpoint import open_checkpoint, with_adapters
from llama.checkpoint.load import WeightFormat, load_weights
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.model import Transformer
from llama.quantization.gguf_blocks import dequantize
from llama.quantization.weights import BlockWeight
from tests.adapters import random_halves, write_gguf_adapter
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer
from tests.hugging_face import hugging_face_model
from tests.models import build, one_pass
from tests.parity.test_relatives import made
from tests.quantized_releases import AWQ, Writer, awq, compressed, fp4, fp8, gptq, write_release
from tests.reference import reference_logits
from tests.unit.test_hugging_face_damage import edit, load, set_to

ARGS = ModelArgs(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=192, norm_eps=1e-5
)
GPTQ = {"bits": 4, "group_size": 32, "desc_act": False}
DOWN = "model.layers.0.mlp.down_proj"


def release(folder: Path, writer: Writer, settings: dict[str, Any], beside: str = "", **options: Any) -> dict[str, Any]:
    """Write a release whose settings are in config.json or in a file beside it; return its values."""
    values = write_release(folder, ARGS, writer, settings, **options)
    if beside:
        edit(folder / "config.json", lambda config: config.pop("quantization_config"))
        (folder / beside).write_text(json.dumps(settings))
    return values


def change_tensors(folder: Path, **more: Tensor | None) -> None:
    """Add tensors of down_proj, replace them, or, where None, remove them; "__" stands for a point."""
    state = load_file(folder / "model.safetensors")
    for end, tensor in more.items():
        state[f"{DOWN}.{end}"] = tensor  # type: ignore[assignment]
    save_file({name: each for name, each in state.items() if each is not None}, folder / "model.safetensors")


def assert_values(folder: Path, expected: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    load(folder)
    for name, values in expected.items():
        torch.testing.assert_close(checkpoint.read(name).double(), values, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("file", ["gptq_model-4bit-128g.safetensors", "model.safetensors"])
def test_autogptqs_own_files_are_read(tmp_path: Path, file: str) -> None:
    """Its file names the model's file, too, and may lack `sym`."""
    settings = {**GPTQ, "damp_percent": 0.01, "model_file_base_name": "gptq_model-4bit-128g"}
    expected = release(tmp_path, gptq(sym=False), settings, "quantize_config.json")
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert_values(tmp_path, expected)


def test_optimums_name_of_that_file_is_read(tmp_path: Path) -> None:
    settings = {**GPTQ, "sym": True, "quant_method": "gptq", "dataset": "c4"}
    assert_values(tmp_path, release(tmp_path, gptq(), settings, "quantization_config.json"))


def test_autoawqs_own_file_is_read(tmp_path: Path) -> None:
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    assert_values(tmp_path, release(tmp_path, awq(), settings, "quant_config.json"))


def test_what_is_wrong_in_a_file_beside_is_told_with_its_name(tmp_path: Path) -> None:
    release(tmp_path, awq(), {"zero_point": True, "q_group_size": 0, "w_bit": 4}, "quant_config.json")
    with pytest.raises(ValueError, match=r"quant_config\.json: group_size must be -1 or at least 1, got 0"):
        load(tmp_path)
    edit(tmp_path / "quant_config.json", set_to(q_group_size=64))
    with pytest.raises(ValueError, match=r"scales is float16 .*: weights and quant_config\.json do not belong"):
        load(tmp_path)


def test_configuration_counts_before_a_file_beside(tmp_path: Path) -> None:
    """Who saves with transformers has it in config.json, and an older file may stay."""
    expected = release(tmp_path, gptq(), {"quant_method": "gptq", "sym": True, **GPTQ})
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 3}))
    assert_values(tmp_path, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_tell_their_version(tmp_path: Path, bits: int) -> None:
    """Every weight was off by a scale."""
    settings = {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True, **GPTQ, "bits": bits}
    assert_values(tmp_path, release(tmp_path, gptq(bits, version=2), settings))


def test_an_order_of_zeros_is_none(tmp_path: Path) -> None:
    """Unless columns are in an order: then it was never filled in, and is told."""
    settings = {"quant_method": "gptq", "sym": True, **GPTQ}
    expected = release(tmp_path, gptq(), settings)
    change_tensors(tmp_path, g_idx=torch.zeros(192, dtype=torch.int32))
    assert_values(tmp_path, expected)
    edit(tmp_path / "config.json", lambda config: config["quantization_config"].update(desc_act=True))
    with pytest.raises(ValueError, match=r"down_proj\.g_idx has all columns in one of 6 groups"):
        load(tmp_path)


def test_no_order_is_the_files(tmp_path: Path) -> None:
    expected = release(tmp_path, gptq(), {"quant_method": "gptq", "sym": True, **GPTQ})
    change_tensors(tmp_path, g_idx=None)
    assert_values(tmp_path, expected)


def test_modules_that_are_not_converted_stay_floats(tmp_path: Path) -> None:
    """They were initialized anew, which made no sense of the rest."""
    settings = {**AWQ, "modules_to_not_convert": ["down_proj"]}
    expected = release(tmp_path, awq(), settings)
    plain = torch.randn(64, 192).half()
    change_tensors(tmp_path, qweight=None, qzeros=None, scales=None, weight=plain)
    assert_values(tmp_path, expected | {"layers.0.feed_forward.w2.weight": plain.double()})


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_need_not_divide_groups(tmp_path: Path, size: int) -> None:
    """192 features in groups of 64: 96 and 48 a rank, which others refuse. Between blocks they stay blocks."""
    release(tmp_path, awq(64), AWQ | {"group_size": 64})
    checkpoint, name = open_checkpoint(tmp_path), "layers.0.feed_forward.w2.weight"
    weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
    parts = []
    for rank in range(size):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        with torch.device("meta"):
            model = Transformer(ARGS, parallel)
        load_weights(model, checkpoint, torch.device("cpu"), weight_format)
        part = model.get_submodule("layers.0.feed_forward.w2").weight
        assert isinstance(part, BlockWeight)
        parts.append(dequantize(part.blocks, part.block_type))
    block_type = checkpoint.block_type(name)
    assert block_type is not None
    assert torch.equal(torch.cat(parts, 1)[:, :192], dequantize(checkpoint.read_blocks(name), block_type))


@pytest.mark.parametrize("name", ["kv_scale", "k_scale", "k_proj.output_scale"])
def test_scales_of_the_cache_are_left_out_and_told(tmp_path: Path, caplog: Any, name: str) -> None:
    expected = release(tmp_path, fp8(None), {"quant_method": "fp8", "activation_scheme": "static"})
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {f"model.layers.0.self_attn.{name}": torch.tensor(0.5)}, tmp_path / "model.safetensors")
    with caplog.at_level("INFO", logger="llama"):
        assert_values(tmp_path, expected)
    assert f"not rounded here: model.layers.0.self_attn.{name}" in caplog.text


@torch.inference_mode()
def test_a_release_of_the_cache_alone_is_plain_weights(tmp_path: Path, caplog: Any) -> None:
    state = {name: tensor.half().float() for name, tensor in random_state(ARGS).items()}
    hugging_face_model(ARGS, state).save_pretrained(tmp_path)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    settings = {**compressed("float-quantized", 8), "config_groups": {}, "kv_cache_scheme": scheme}
    edit(tmp_path / "config.json", set_to(quantization_config=settings))
    saved = load_file(tmp_path / "model.safetensors")
    save_file(saved | {"model.layers.0.self_attn.k_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    with caplog.at_level("INFO", logger="llama"):
        load(tmp_path)
    assert "rounds keys and values in its cache, here they are not rounded" in caplog.text
    assert "says compressed-tensors, but no matrix is quantized" in caplog.text
    assert all(torch.equal(open_checkpoint(tmp_path).read(name), values) for name, values in state.items())


@pytest.mark.parametrize("beside", ["", "hf_quant_config.json"])
def test_nvidias_fp8_is_read(tmp_path: Path, beside: str) -> None:
    settings = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    expected = release(tmp_path, fp8(None), {"quant_method": "modelopt", **settings})
    if beside:
        edit(tmp_path / "config.json", lambda config: config.pop("quantization_config"))
        said = {"producer": {"name": "modelopt"}, "quantization": settings}
        (tmp_path / beside).write_text(json.dumps(said))
    state = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}": torch.tensor(0.5) for name in ("k_proj.k_scale", "v_proj.v_scale")}
    scales[f"{DOWN}.input_scale"] = torch.tensor(0.5)
    save_file(state | scales, tmp_path / "model.safetensors")
    assert_values(tmp_path, expected)


def test_an_output_in_nvfp4_is_read(tmp_path: Path) -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert_values(tmp_path, release(tmp_path, fp4("modelopt"), settings, lm_head=True))


@pytest.mark.parametrize("file", ["output.safetensors", "model.safetensors"])
def test_exl2_is_refused_by_name(tmp_path: Path, file: str) -> None:
    """Some brought the index of other files, whose absence was all that was told."""
    release(tmp_path, gptq(), {"quant_method": "exl2", "bits": 4.0})
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    index = {"weight_map": {f"{DOWN}.q_weight": "model-00004-of-00004.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'exl2' quantized weights, which are not supported, as the bits of its rows"):
        load(tmp_path)


@torch.inference_mode()
def test_a_granite_whose_table_is_stored_twice_is_tied(tmp_path: Path) -> None:
    """The copy of the table is no tensor too many; nor is it scaled twice."""
    theirs = made("granite, tied", vocab_size=BYTE_VOCAB_SIZE)
    theirs.save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    tokens = torch.arange(20)[None] * 7 % BYTE_VOCAB_SIZE
    found = one_pass(build(tmp_path).model, tokens)
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-4)
    assert open_checkpoint(tmp_path).args.tied_embeddings


def test_factors_of_rope_in_an_adapter_are_not_its_own(tmp_path: Path) -> None:
    """llama.cpp's converter has written the model's own into adapters."""
    state, halves = random_state(ARGS), random_halves(ARGS, random_state(ARGS))
    hugging_face_model(ARGS, state).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", set_to(architectures=["LlamaForCausalLM"]))
    write_gguf_adapter(tmp_path / "plain.gguf", halves)
    write_gguf_adapter(tmp_path / "a.gguf", halves, {"rope_freqs.weight": torch.ones(8)})
    plain, adapted = (
        with_adapters(open_checkpoint(tmp_path / "model"), [str(tmp_path / file)]) for file in ("plain.gguf", "a.gguf")
    )
    for name in global_shapes(ARGS):
        assert torch.equal(adapted.read(name), plain.read(name))


def written(folder: Path, args: ModelArgs) -> dict[str, Tensor]:
    state = random_state(args)
    hugging_face_model(args, state).save_pretrained(folder)
    edit(folder / "config.json", set_to(architectures=["LlamaForCausalLM"]))
    write_byte_tokenizer(folder)
    return state


@torch.inference_mode()
@pytest.mark.parametrize("head_dim", [100, 50])
def test_heads_of_any_even_size_are_computed(tmp_path: Path, head_dim: int) -> None:
    """No multiple of 8, 16 or 32: open_llama 3B's."""
    args = ModelArgs(dim=3 * head_dim, n_layers=1, n_heads=3, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=96)
    state, tokens = written(tmp_path, args), [5, 300, 17, 80, 9]
    found = one_pass(build(tmp_path).model, torch.tensor([tokens]))[0]
    expected = reference_logits(state, tokens, n_heads=3, n_kv_heads=3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("change", [{"head_dim": None}, {"num_key_value_heads": None}, "num_key_value_heads"], ids=str)
def test_keys_that_follow_from_others_may_be_null_or_absent(tmp_path: Path, change: Any) -> None:
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=96)
    state, tokens = written(tmp_path, args), [5, 300, 17]
    edit(tmp_path / "config.json", (lambda c: c.pop(change)) if isinstance(change, str) else set_to(**change))
    found = one_pass(build(tmp_path).model, torch.tensor([tokens]))[0]
    expected = reference_logits(state, tokens, n_heads=4, n_kv_heads=4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
