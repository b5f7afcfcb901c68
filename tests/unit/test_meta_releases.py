"""Llama 3.2's quantized releases: SpinQuant's rotation is undone, QLoRA's adapters are added, and damage is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.load import WeightFormat
from llama.checkpoint.lora_files import with_adapters
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.verify.verify import verify
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.model import Transformer
from llama.quantization.gguf_blocks import dequantize
from llama.quantization.weights import BlockWeight
from tests.checkpoints import BYTE_VOCAB_SIZE
from tests.models import build, one_pass
from tests.quantized_releases import write_meta_release
from tests.reference import reference_logits
from tests.unit.test_hugging_face_damage import edit, set_to

# Rows of w2 are a power of two, and are split over two ranks between blocks; six heads for three ranks.
ARGS = ModelArgs(
    dim=96, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=16, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=128, norm_eps=1e-5
)
DOWN = "layers.0.feed_forward.w2.weight"
FORMS: dict[str, dict[str, Any]] = {"spinquant": {"spinquant": True}, "qlora": {"rank": 4}, "plain": {"zeros": True}}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    top = tmp_path_factory.mktemp("releases")
    return {form: (top / form, write_meta_release(top / form, ARGS, **options)) for form, options in FORMS.items()}


Written = dict[str, tuple[Path, dict[str, Tensor]]]


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_formula(written: Written, form: str) -> None:
    """Rotated back, with adapters: whole, by rows, and by columns that begin anywhere."""
    folder, expected = written[form]
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == set(expected)
    for name, values in expected.items():
        found = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(values.shape) == tuple(found.shape)
        torch.testing.assert_close(found.double(), values, rtol=1e-6, atol=1e-6)
        if found.dim() == 2:
            torch.testing.assert_close(checkpoint.read(name, 0, 5, 31), found[5:31])
            torch.testing.assert_close(checkpoint.read(name, 1, 33, 70), found[:, 33:70])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_rotated_is_held_in_its_own_codes(written: Written, form: str) -> None:
    """Q4_0 and Q8_0, whose scales are fp16; SpinQuant's w2 is floats."""
    folder, expected = written[form]
    checkpoint = with_adapters(open_checkpoint(folder), [])
    for name, shape in global_shapes(ARGS).items():
        if len(shape) < 2:
            continue
        block_type = checkpoint.block_type(name)
        if form == "spinquant" and name == DOWN:
            assert block_type is None
            continue
        assert block_type is not None and block_type.name == ("Q4_0" if "layers" in name else "Q8_0")
        if form != "qlora":
            held = dequantize(checkpoint.read_blocks(name), block_type).double()
            assert (held - expected[name]).abs().max() <= 5e-4 * 2 * expected[name].abs().max()
    assert 0 < checkpoint.rounding <= 5e-4 or form == "qlora"


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMS)
def test_a_release_answers_as_the_floats_that_it_stands_for(written: Written, form: str, caplog: Any) -> None:
    """By an independent forward pass; the log says what is otherwise than in the release."""
    folder, expected = written[form]
    tokens = [5, 300, 17, 80, 9]
    with caplog.at_level("INFO", logger="llama"):
        llm = build(folder)
    found = one_pass(llm.model, torch.tensor([tokens]))[0].double()
    reference = reference_logits(expected, tokens, n_heads=6, n_kv_heads=2)
    torch.testing.assert_close(found, reference, rtol=0, atol=3e-3 * float(reference.abs().max()))
    assert "the release rounds activations to 8 bits, here they are not rounded" in caplog.text
    rotated = "int4 in groups of 32, rotated loaded as float32: 1 matrices"
    assert (rotated in caplog.text) == (form == "spinquant")
    assert (f"lora {folder} of rank 4, times 1: 7 matrices" in caplog.text) == (form == "qlora")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_ranks_hold_parts_of_the_same_matrices(written: Written, form: str, size: int) -> None:
    checkpoint = with_adapters(open_checkpoint(written[form][0]), [], requantizes=True)
    weight_format = WeightFormat(torch.float32, None, BlockWeight, False)
    whole, parts = checkpoint.read(DOWN), []
    for rank in range(size):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        with torch.device("meta"):
            model = Transformer(ARGS, parallel)
        load_weights(model, checkpoint, torch.device("cpu"), weight_format)
        parts.append(model.get_submodule("layers.0.feed_forward.w2").weight)
    joined = torch.cat([torch.as_tensor(part) for part in parts], dim=1)[:, : whole.shape[1]]
    torch.testing.assert_close(joined, whole, rtol=1e-6, atol=1e-6)


def test_a_converted_release_has_its_adapters(written: Written, tmp_path: Path) -> None:
    """They lie in the release's own file, and nobody names them."""
    folder, expected = written["qlora"]
    source = open_checkpoint(folder)
    write_checkpoint(writer(source, tokenizer_source(source), "hf", dtype="float32"), tmp_path / "hf", lambda n: None)
    converted = open_checkpoint(tmp_path / "hf")
    for name, values in expected.items():
        torch.testing.assert_close(converted.read(name).double(), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_release_is_found_whole(written: Written, form: str) -> None:
    assert not [finding for finding in verify(written[form][0], True, lambda n_bytes: None) if finding.problem]


def quantization(**settings: Any) -> Callable[[dict[str, Any]], object]:
    return lambda params: params["quantization_args"].update(settings)


@pytest.mark.parametrize(
    ("form", "how", "said"),
    [
        ("plain", quantization(scheme="int8"), "quantization_args: scheme 'int8' is not supported: only 'int4_weight"),
        ("plain", quantization(group_size=None), "group_size must be a whole number, got None"),
        ("plain", quantization(group_size=0), "group_size must be at least 1, got 0"),
        ("plain", quantization(group_size=64), "which groups of 64 do not give"),
        ("plain", quantization(spinquant="no"), "spinquant must be true or false, got 'no'"),
        ("plain", set_to(quantization_args=[4]), "quantization_args must be an object, got [4]"),
        ("plain", set_to(quantization_args=None), "tok_embeddings.weight has dtype torch.int8"),
        ("plain", set_to(lora_args={"rank": 4, "scale": 1.0}), "has no adaptors, though params.json has lora_args"),
        ("qlora", set_to(lora_args=None), "has unexpected tensors"),
        ("qlora", set_to(lora_args={"rank": 8, "scale": 1.0}), "adaptor.A.weight is bfloat16 (4, 96), not"),
        ("qlora", set_to(lora_args={"rank": "4", "scale": 1.0}), "lora_args: rank must be"),
        ("qlora", set_to(lora_args={"rank": 4, "scale": None}), "lora_args: scale must be"),
        ("qlora", quantization(spinquant=True), "spinquant beside lora_args is not supported"),
    ],
)
def test_settings_that_do_not_fit_are_told(
    written: Written, tmp_path: Path, form: str, how: Callable[[dict[str, Any]], object], said: str
) -> None:
    folder = Path(shutil.copytree(written[form][0], tmp_path / "changed"))
    edit(folder / "params.json", how)
    refused(folder, said)


DAMAGE: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    ("plain", f"{DOWN[:-7]}.scales", lambda scales: None, f"{DOWN} has dtype torch.int8"),
    ("plain", f"{DOWN[:-7]}.scales", lambda scales: scales[:, 1:], "has 3 groups in rows of 128 values"),
    ("plain", f"{DOWN[:-7]}.scales", lambda scales: scales[:, :1], "group_size 32 is not that of"),
    ("plain", f"{DOWN[:-7]}.scales", lambda scales: scales * 0, "has scales of 0, whose codes are not"),
    ("plain", f"{DOWN[:-7]}.scales", lambda scales: scales * float("nan"), "has scales that are not finite"),
    ("plain", f"{DOWN[:-7]}.zeros", lambda zeros: zeros + 1, "zeros are not all 0: zero points are not supported"),
    ("plain", f"{DOWN[:-7]}.zeros", lambda zeros: zeros[1:], "zeros is float32 (95, 4), not"),
    ("plain", DOWN, lambda codes: codes + 8, "has codes of more than 4 bits"),
    ("plain", DOWN, lambda codes: codes.float(), "weight is float32 (96, 128), not int8"),
    ("plain", DOWN, lambda codes: None, "weight is missing: weights and quantization_args do not belong together"),
    ("spinquant", DOWN, lambda codes: codes[:, :64], "has 4 groups in rows of 64 values"),
    ("qlora", f"{DOWN[:-7]}.adaptor.B.weight", lambda b: None, "adaptor.B.weight is missing"),
    ("qlora", f"{DOWN[:-7]}.adaptor.B.weight", lambda b: b[1:], "adaptor.B.weight is bfloat16 (95, 4), not"),
    ("qlora", DOWN, lambda codes: None, "has an adaptor, but no matrix"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "name", "how", "said"), DAMAGE)
def test_damage_is_told_in_one_line(
    written: Written, tmp_path: Path, form: str, name: str, how: Callable[[Tensor], Tensor | None], said: str
) -> None:
    folder = Path(shutil.copytree(written[form][0], tmp_path / "damaged"))
    state = torch.load(folder / "consolidated.00.pth")
    changed = how(state.pop(name))
    torch.save(state if changed is None else state | {name: changed}, folder / "consolidated.00.pth")
    refused(folder, said)


def test_spinquant_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """No Hadamard matrix of a power of two has rows of 96 values."""
    write_meta_release(tmp_path, ModelArgs(32, 1, 2, vocab_size=512, hidden_dim=96))
    edit(tmp_path / "params.json", quantization(spinquant=True))
    refused(tmp_path, "has rows of 96 values, which no Hadamard matrix of a power of two rotates")


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        checkpoint = with_adapters(open_checkpoint(folder), [])
        with torch.device("meta"):
            model = Transformer(ARGS, ModelParallel())
        weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
        load_weights(model, checkpoint, torch.device("cpu"), weight_format)
    assert said in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
