"""scripts/benchmark.py and scripts/roofline.py: what they print and draw, never how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llama.config import ModelArgs
from llama.tokenizer import Tokenizer
from tests.checkpoints import TINY, random_state, write_byte_tokenizer
from tests.e2e import processes
from tests.e2e.processes import ROOT
from tests.gguf_files import write_gguf_model
from tests.scripts import script

benchmark = script("benchmark")
roofline = script("roofline")
import benchmarking.prompts as prompts  # noqa: E402  (found by the lines above)
import benchmarking.workers as workers  # noqa: E402

pytestmark = pytest.mark.slow

FIGURES = {"prefill_tok_s", "ttft_s", "decode_tok_s", "bandwidth_gb_s", "bytes_per_token", "peak_mib"}
OF_A_SYSTEM = FIGURES | {"system", "weights", "weight_bytes", "read_gb_s", "bandwidth_percent"}
NEEDS_MATPLOTLIB = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install '.[bench]'"
)
NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed: pip install '.[bench]'"
)
# Rows of whole blocks of Q8_0.
BLOCKS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=128)


def run(*arguments: object) -> processes.Finished:
    return processes.python(ROOT / "scripts" / "benchmark.py", "--device", "cpu", *arguments)


def result(**changes: Any) -> dict[str, Any]:
    """What a run prints, with invented figures."""
    figures = {"weight_bytes": 1_000_000, "bytes_per_token": 1_000_000.0, "decode_tok_s": 50.0, "read_gb_s": 10.0}
    job = {"prompts": "random", "prompt_len": 8, "gen_len": 4, "batch_size": 1}
    return {"system": "ours", "weights": "bf16", **figures, **job, "machine": "one", "date": "2026-01-31", **changes}


def test_the_last_line_has_the_figures_of_both_systems_and_their_ratios(tiny_folder: Path) -> None:
    sizes = ("--prompt_len", 160, "--gen_len", 5, "--batch_size", 2, "--runs", 1, "--max_seq_len", 256)
    done = run("--ckpt_dir", tiny_folder, "--peer", "plain", *sizes, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    about_the_run = {"machine", "date", "ckpt_dir", "prompts", "prompt_len", "gen_len", "batch_size"}
    assert found.keys() == OF_A_SYSTEM | about_the_run | {"peer", "decode_ratio", "prefill_ratio"}
    assert found["peer"].keys() == OF_A_SYSTEM
    assert [(each["system"], each["weights"]) for each in (found, found["peer"])] == [
        ("ours", "fp32"),
        ("plain", "fp32"),
    ]
    weights = sum(tensor.nbytes for name, tensor in random_state(TINY).items() if name != "tok_embeddings.weight")
    assert found["weight_bytes"] == weights and found["bytes_per_token"] == weights / 2  # two rows a step
    assert found["decode_ratio"] == found["decode_tok_s"] / found["peer"]["decode_tok_s"]


def test_a_missing_llama_cpp_is_one_line(tmp_path: Path) -> None:
    write_gguf_model(tmp_path / "model.gguf", BLOCKS, random_state(BLOCKS))
    bare = tmp_path / "python"  # has no packages at all
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    done = run("--ckpt_dir", tmp_path / "model.gguf", "--peer", "llama_cpp", "--peer_python", bare)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: llama_cpp: ") and "pip install '.[bench]'" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peer": "lama.cpp"}, "--peer must be one of transformers, llama_cpp, plain or max_seq_len=N, got 'lama.cpp'"),
        ({"peer": "max_seq_len=many"}, "got 'max_seq_len=many'"),
        ({"peer": "llama_cpp"}, "reads GGUF files"),
        ({"peer": "llama_cpp", "batch_size": 2}, "with one prompt"),
        ({"gen_len": 1}, "--gen_len must be at least 2, got 1"),
        ({"prompt_len": 3, "batch_size": 4}, "--prompt_len must be at least 4, got 3"),
        ({"runs": 0}, "--runs must be at least 1, got 0"),
        ({"prompt_len": 2000, "gen_len": 49}, "2000 [+] 49 tokens do not fit: --max_seq_len is 2048"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_says_so(options: dict[str, Any], words: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=words):
        benchmark.main(ckpt_dir=str(tiny_folder), device="cpu", **options)


@NEEDS_LLAMA_CPP
def test_llama_cpp_gives_the_same_figures(demo_model: Path) -> None:
    sizes = ("--prompt_len", 80, "--gen_len", 4, "--runs", 1, "--max_seq_len", 128)
    done = run("--ckpt_dir", demo_model, "--peer", "llama_cpp", *sizes, "--copy", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peer"].keys() == OF_A_SYSTEM | {"copied_percent"}
    assert found["peer"]["weights"] == "Q4_1"


@pytest.mark.parametrize("tied", [True, False])
def test_stored_weights_count_what_a_token_reads(tied: bool, tmp_path: Path) -> None:
    """An embedding table is read whole only where it is the output, too."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=128, tied_embeddings=tied)
    file, kind = tmp_path / "model.gguf", gguf.LlamaFileType.MOSTLY_Q8_0
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    write_gguf_model(file, args, random_state(args), q8_0, general__file_type=int(kind))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    expected = sum(size for name, size in sizes.items() if tied or name != "token_embd.weight")
    assert workers.stored_weights(file) == {"weights": "Q8_0", "weight_bytes": expected}


def test_a_copy_prompt_ends_in_the_passage_that_it_holds(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    lengths, generator = [150, 300], torch.Generator().manual_seed(3)
    made, copies = prompts.copy_prompts(lengths, 20, tokenizer, generator)
    assert [len(prompt) for prompt in made] == lengths and [len(copy) for copy in copies] == [20, 20]
    for prompt, copy in zip(made, copies, strict=True):
        assert prompt[0] == tokenizer.bos_id
        text = tokenizer.decode(prompt[1:])
        begun = text[-prompts.BEGUN :]
        assert text.startswith(prompts.BEFORE + begun + tokenizer.decode(copy))
        assert text.endswith(prompts.BETWEEN + begun)
    other, _ = prompts.copy_prompts(lengths, 20, tokenizer, generator)
    assert other != made


@pytest.mark.parametrize("length", [129, 22_776])
def test_a_passage_that_is_too_short_or_too_long_is_refused(length: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=f"--copy of 20 tokens takes prompts of 130 to 22774 tokens, got {length}"):
        prompts.copy_prompts([length], 20, tokenizer, torch.Generator())


def test_repeated_measurements_are_one_point() -> None:
    peer = {"system": "llama_cpp", "weights": "Q4_0", "weight_bytes": 300_000, "bytes_per_token": 300_000.0}
    runs = [result(decode_tok_s=tok_s, peer={**peer, "decode_tok_s": 3 * tok_s}) for tok_s in (40.0, 60.0, 50.0)]
    found = roofline.roofline.points([*runs, result(weights="int8", weight_bytes=500_000)])
    assert found == [
        ("ours", "bf16", 1.0, 50.0),
        ("llama_cpp", "Q4_0", 0.3, 150.0),
        ("ours", "int8", 1.0, 50.0),
    ]


@NEEDS_MATPLOTLIB
def test_a_roofline_is_drawn_from_all_that_runs_printed(tmp_path: Path) -> None:
    lines = ["     ours bf16: prefill ...", json.dumps(result()), json.dumps(result(weights="int8", decode_tok_s=80.0))]
    (tmp_path / "results").write_text("\n".join(lines))
    roofline.main(str(tmp_path / "results"), str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@NEEDS_MATPLOTLIB
@pytest.mark.parametrize(
    ("lines", "png", "words"),
    [
        (["no result"], "a.png", "holds no result"),
        (['{"a": 1'], "a.png", "line 1: "),
        (['{"a": 1}'], "a.png", "line 1 is not a result"),
        ([json.dumps(result()), json.dumps(result(machine="two"))], "a.png", "one machine, got one and two"),
        ([json.dumps(result())], "a.jpg", "must be a .png in a folder that exists"),
        ([json.dumps(result())], "none/a.png", "must be a .png in a folder that exists"),
    ],
    ids=["none", "cut", "other", "machines", "suffix", "folder"],
)
def test_what_cannot_be_drawn_says_so(lines: list[str], png: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words):
        roofline.main(str(tmp_path / "results"), str(tmp_path / png))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match="a picture needs matplotlib: pip install"):
        benchmark.main(ckpt_dir="/nowhere", plot="picture.png")
