"""Llama.build: what it chooses, what it refuses, and what it leaves as it was."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama import Llama
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.distributed.device import choose_device, choose_dtype
from llama.distributed.groups import ModelParallel
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.models import build

CPU = torch.device("cpu")


def test_building_twice_gives_two_models_that_both_work(tiny_folder: Path) -> None:
    first, second = build(tiny_folder), build(tiny_folder)
    for llm in (first, second, first):
        assert llm.generate([[256, 5]], 3, temperature=0) == second.generate([[256, 5]], 3, temperature=0)


def test_without_torchrun_the_process_is_a_job_of_one_rank(tiny_folder: Path) -> None:
    llm = build(tiny_folder)
    assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    assert (llm.model.parallel.rank, llm.model.parallel.size) == (0, 1)


def test_building_changes_no_default_of_the_process(tiny_folder: Path) -> None:
    """Meta's build set the default dtype, the global seed and sys.stdout."""
    torch.manual_seed(3)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    build(tiny_folder, dtype="bfloat16").generate([[256]], 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.empty(0).device == CPU


def test_building_and_generating_print_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """fairscale prints three lines, and stdout is for completions."""
    build(tiny_folder).generate([[256]], 4)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("size", [2, 0, -1, 1.0, "1", True])
def test_a_model_parallel_size_that_does_not_divide_the_job_is_told(tiny_folder: Path, size: object) -> None:
    with pytest.raises(ValueError, match="model_parallel_size must divide the 1 ranks"):
        build(tiny_folder, model_parallel_size=size)


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_impossible_limits_are_told(tiny_folder: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer from 1"):
        build(tiny_folder, **{name: value})


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "", "meta"])
def test_an_unknown_device_is_told(name: str) -> None:
    with pytest.raises(ValueError, match=f"device must be cuda, mps or cpu, got '{name}'"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent_is_told() -> None:
    with pytest.raises(ValueError, match="cuda was asked for, but torch finds no CUDA device: use --device cpu"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="cuda was asked for"):
        choose_device("cuda:1")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_mps_asked_for_and_absent_is_told() -> None:
    with pytest.raises(ValueError, match=r"mps was asked for, .* use --device cpu"):
        choose_device("mps")


@pytest.mark.parametrize("name", ["int8", "fp32", "", torch.int8, torch.float64])
def test_an_unknown_dtype_is_told(name: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        choose_dtype(name, CPU, torch.float32)


def test_a_dtype_can_be_named_or_given() -> None:
    assert choose_dtype("bfloat16", CPU, torch.float32) == torch.bfloat16
    assert choose_dtype(torch.float16, CPU, torch.float32) == torch.float16


def test_a_cpu_never_chooses_fp16(tiny_folder: Path) -> None:
    """Most CPUs compute fp16 in software."""
    assert choose_dtype(None, CPU, torch.float16) == torch.float32
    assert choose_dtype(None, CPU, torch.float32) == torch.float32
    assert choose_dtype(None, CPU, torch.bfloat16) in (torch.bfloat16, torch.float32)
    assert choose_dtype(None, CPU, torch.bfloat16, quantized=True) == torch.float32


@pytest.mark.parametrize("heads", [5, 6, 7])
def test_heads_that_ranks_cannot_share_say_which_ranks_could(heads: int) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads cannot be split over 4 ranks: use one of 1, "):
        ModelParallel(0, 4).heads(heads)


def test_a_path_may_be_text_or_begin_with_a_tilde(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    tokenizer_path = f"~/{tiny_folder.name}/tokenizer.model"
    assert isinstance(Llama.build(f"~/{tiny_folder.name}", tokenizer_path, device="cpu"), Llama)
    assert isinstance(Llama.build(str(tiny_folder), str(tiny_folder / "tokenizer.model"), 32, 2, device="cpu"), Llama)


def test_a_limit_beyond_the_trained_context_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts lost their sense there, and nothing was said."""
    source = RandomCheckpoint("tiny", PRESETS["tiny"], seed=1)
    folder = tmp_path / "model"
    write_checkpoint(writer(source, tokenizer_source(source), "hf", context_len=64), folder, lambda n_bytes: None)
    with caplog.at_level(logging.WARNING, "llama"):
        build(folder, max_seq_len=64)
        assert caplog.messages == []
        llm = build(folder, max_seq_len=65)
        llm.text_completion(["a", "b"], max_gen_len=2)
    assert caplog.messages == [
        f"max_seq_len is 65, and {folder} was trained for 64 tokens: what goes beyond may make no sense"
    ]
