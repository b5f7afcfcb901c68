"""`llama calibrate` against transformers' own linears, over ranks, and in what it does for perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint.imatrix import read_imatrix
from llama.cli import calibrate, perplexity
from llama.engine.build import build_model
from llama.engine.options import BuildOptions
from llama.quantization.gguf_blocks import BLOCK_TYPES, dequantize
from llama.quantization.k_quants import quantize_blocks
from tests.checkpoints import TINY, write_meta
from tests.e2e.processes import LLAMA, torchrun
from tests.hugging_face import NAMES, hugging_face_model
from tests.models import BYTE_BOS, one_pass

GGUF_NAMES = {
    "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate", "w2": "ffn_down",
    "w3": "ffn_up",
}  # fmt: skip
TEXT = "Wörter, no two windows alike: 0123456789 abcdefghijklm".encode()
WINDOW = 20
Q2_K = BLOCK_TYPES["Q2_K"]


def calibrated(folder: Path, output: Path, text: bytes = TEXT, **options: Any) -> dict[str, Tensor]:
    (output.parent / "text").write_bytes(text)
    built = BuildOptions(folder, device="cpu", dtype="float32")
    calibrate.main(built, text=output.parent / "text", output=output, **options)
    return {name: means[0] for name, means in read_imatrix(output).means.items()}


def test_means_equal_those_of_transformers_linears(tiny: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, state = tiny
    found = calibrated(folder, tmp_path / "i.gguf", window=WINDOW)
    inputs: dict[str, list[Tensor]] = {}
    model = hugging_face_model(TINY, state)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            seen = inputs.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].reshape(-1, x[0].shape[-1])))
    for i in range(0, len(TEXT), WINDOW - 1):
        with torch.no_grad():
            model(torch.tensor([[BYTE_BOS, *TEXT[i : i + WINDOW - 1]]]))
    assert len(found) == len(inputs) == 7 * TINY.n_layers
    for layer in range(TINY.n_layers):
        for module, name in GGUF_NAMES.items():
            theirs = next(hf for meta, hf in NAMES.items() if meta.endswith(f".{module}"))
            wanted = torch.cat(inputs[f"model.layers.{layer}.{theirs}"]).double().square().mean(dim=0)
            means = found[f"blk.{layer}.{name}.weight"]
            torch.testing.assert_close(means.double(), wanted, rtol=1e-4, atol=1e-7, msg=f"{layer} {name}")


@pytest.mark.slow
def test_replicas_of_several_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    """Two models share out the windows, and their ranks the columns of wo and w2, of which the last has padding."""
    write_meta(tmp_path / "model")
    alone = calibrated(tmp_path / "model", tmp_path / "alone.gguf", window=WINDOW)
    flags = ("--ckpt_dir", tmp_path / "model", "--text", tmp_path / "text", "--window", WINDOW)
    flags += ("--output", tmp_path / "ranks.gguf", "--device", "cpu", "--dtype", "float32")
    done = torchrun(4, *LLAMA, "calibrate", *flags, "--model_parallel_size", 2)
    assert done.returncode == 0, done.stderr
    ranks = read_imatrix(tmp_path / "ranks.gguf").means
    assert ranks.keys() == alone.keys()
    for name, means in alone.items():
        torch.testing.assert_close(ranks[name][0], means, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_calibration_lowers_the_perplexity_of_a_text_that_was_not_calibrated_on(
    demo_model: Path, tmp_path: Path
) -> None:
    """Calibrated on the beginning of the pinned text, measured at its end, with every other layer's w2 in Q2_K."""
    text = perplexity.TEXT.read_text(encoding="utf-8")
    calibrated(demo_model, tmp_path / "i.gguf", text[:3000].encode(), window=256)
    importance = read_imatrix(tmp_path / "i.gguf")
    model, tokenizer, _ = build_model(BuildOptions(demo_model, device="cpu", dtype="float32"), by_modules=True)
    tokens = torch.tensor([tokenizer.encode(text[-1500:], bos=False, eos=False)])
    matrices = {name: weight for name, weight in model.named_parameters() if name.endswith("w2.weight")}
    exact = {name: weight.clone() for name, weight in list(matrices.items())[::2]}
    figures = []
    for weigh in (False, True):
        for name, weight in exact.items():
            columns = importance.of(name, tuple(weight.shape)) if weigh else None
            matrices[name].copy_(dequantize(quantize_blocks(weight, Q2_K, columns), Q2_K))
        logits = one_pass(model, tokens)[0, :-1]
        figures.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).exp().item())
    plain, with_imatrix = figures
    assert with_imatrix < 0.98 * plain
