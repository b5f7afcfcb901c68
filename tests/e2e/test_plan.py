"""--dry_run on the examples, runs that cannot fit, and plans beside what the operating system says of the run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.config import ModelArgs
from tests.checkpoints import TINY, write_meta
from tests.e2e.processes import CHAT, COMPLETION, ROOT, Finished, python, torchrun
from tests.unit.test_plan import write_hugging_face

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "memory_worker.py"
MB = 10**6

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_meta(folder, TINY, shards=2)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """182 MB in bf16, in one file."""
    folder = tmp_path_factory.mktemp("large")
    write_meta(folder, ModelArgs(dim=1024, n_layers=8, n_heads=16, n_kv_heads=4, vocab_size=512), dtype=torch.bfloat16)
    return folder


def rows(done: Finished) -> dict[str, list[str]]:
    """The cells of the table by its rows' names."""
    lines = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_a_dry_run_prints_the_plan_and_nothing_else(folder: Path) -> None:
    done = python(COMPLETION, "--ckpt_dir", folder, "--dry_run", "--device", "cpu", "--prompt", "abcd")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    table = rows(done)
    assert table["per rank"] == ["these prompts", "at most"]
    assert table["requests x tokens"] == ["1 x 69", "32 x 4096"]  # a begin token and --max_gen_len 64
    assert table["weights"] == ["615.68 KB", "615.68 KB"]
    assert table["KV cache"] == ["20.48 KB", "33.55 MB"]
    assert table["fits"] == ["yes", "yes"]


def test_a_dry_run_that_does_not_fit_says_what_would(large: Path) -> None:
    """And its advice is true: within half of that limit all prompts fit at once, within a larger one some."""
    prompts = json.dumps(["abcd"] * 1000)
    flags: tuple[object, ...] = (
        "--ckpt_dir",
        large,
        "--dry_run",
        "--device",
        "cpu",
        "--prompt",
        prompts,
        "--max_gen_len",
        "None",
    )
    flags = (*flags, "--max_seq_len", 16_000_000)
    done = python(COMPLETION, *flags, "--max_batch_size", 10_000)
    assert rows(done)["fits"][1] == "no"
    # Half of it, as other programs take and leave memory meanwhile.
    advised = re.search(r"Would fit at once: --max_seq_len (\d+)", done.stdout)
    assert advised, done.stdout
    done = python(COMPLETION, *flags[:-1], int(advised[1]) // 2, "--max_batch_size", 10_000)
    assert done.returncode == 0, done.stdout
    assert rows(done)["fits"] == ["yes", "yes"]
    done = python(COMPLETION, *flags[:-1], 100 * int(advised[1]), "--max_batch_size", 10_000)
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"\d+ at once", rows(done)["fits"][0]), done.stdout


def test_under_torchrun_the_first_rank_prints_one_plan(large: Path) -> None:
    """And all of it: torchrun ends a rank that is about to print when another exits with 1."""
    done = torchrun(2, CHAT, "--ckpt_dir", large, "--dry_run", "--device", "cpu", "--max_seq_len", 2**24)
    assert done.returncode == 1
    assert done.stdout.count("KV cache") == 1
    assert done.stdout.count("Would fit at once") == 1
    assert ": 2 ranks, bfloat16, cpu\n" in done.stdout


def test_one_process_plans_for_ranks_that_are_not_there(folder: Path) -> None:
    flags: tuple[object, ...] = ("--ckpt_dir", folder, "--dry_run", "--device", "cpu")
    alone, eight = (python(CHAT, *flags, "--model_parallel_size", size) for size in (1, 8))
    assert ": 8 ranks, float32, cpu\n" in eight.stdout
    assert rows(eight)["KV cache"] == ["262.14 KB"]  # a quarter of it: 8 ranks hold 4 KV heads, each of them twice
    assert rows(alone)["KV cache"] == ["1.05 MB"]
    wrong = python(CHAT, *flags, "--model_parallel_size", 3)
    assert wrong.returncode == 1
    assert wrong.errors == ["error: 16 heads cannot be split over 3 ranks: use one of 1, 2, 4, 8, 16"]


@linux
def test_what_cannot_fit_is_refused_before_loading(tmp_path: Path) -> None:
    """A model of half as much again as this machine's memory, as fp32 copies of a mapped bf16 file of holes."""
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    layer = ModelArgs(dim=8192, n_layers=1, n_heads=64, n_kv_heads=8, vocab_size=512, hidden_dim=28672)
    n_layers = int(1.5 * memory / 4 / (2.25 * layer.dim**2 + 3 * layer.dim * layer.hidden_dim))
    args = ModelArgs(dim=8192, n_layers=n_layers, n_heads=64, n_kv_heads=8, vocab_size=512, hidden_dim=layer.hidden_dim)
    write_hugging_face(tmp_path / "hf", args, list(range(n_layers)))
    flags = ("--ckpt_dir", tmp_path / "hf", "--device", "cpu", "--dtype", "float32")
    done = python(COMPLETION, *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: the model needs [\d.]+ GB of cpu memory per rank, [\d.]+ GB are free: "
        r"use \d+ ranks with as much memory each\n",
        done.stderr,
    )


def measured(ranks: int, *arguments: object) -> list[dict[str, Any]]:
    env = {"PYTHONPATH": str(ROOT)}
    done = torchrun(ranks, WORKER, *arguments, env=env) if ranks else python(WORKER, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
@pytest.mark.parametrize(
    ("ranks", "dtype", "bsz", "prompt_len"),
    [
        (0, "float32", 8, 256),  # all weights are copies
        (0, "bfloat16", 2, 64),  # all weights are pages of the file
        (2, "float32", 4, 64),
    ],
)
def test_a_run_takes_what_was_planned(large: Path, ranks: int, dtype: str, bsz: int, prompt_len: int) -> None:
    """Within 10 %: private memory at its peak, and those pages of the file that are weights."""
    for rank in measured(ranks, large, dtype, bsz, prompt_len, 8):
        planned = rank["planned"]
        assert planned["weights"] == rank["weights"]
        peak = max(rank["loading"]["RssAnon"], rank["running"]["RssAnon"])
        assert planned["needed"] == pytest.approx(peak + planned["mapped"], rel=0.1), rank
        if planned["mapped"] == planned["weights"]:
            # All of them came into memory, with the rest of the file's first and last pages.
            assert 0 <= rank["pages"] - planned["mapped"] < MB


@linux
def test_quantized_weights_are_in_memory_once(large: Path, tmp_path: Path) -> None:
    """The file's pages once stayed beside the packed copy: twice the memory of the weights."""
    checkpoint = open_checkpoint(large)
    made = writer(checkpoint, tokenizer_source(checkpoint), "hf", quantize="int8")
    write_checkpoint(made, tmp_path / "int8", lambda n_bytes: None)
    (rank,) = measured(0, tmp_path / "int8", "float32", 1, 16, 8)
    planned = rank["planned"]
    assert planned["weights"] > 90 * MB
    assert planned["mapped"] == 0 and rank["pages"] < 8 * MB
    # Beside what is planned, libraries' pages come into memory, 30 to 45 MB; the file's would be 97.
    assert max(rank["loading"]["VmHWM"], rank["running"]["VmHWM"]) < planned["needed"] + 2 / 3 * planned["weights"], (
        rank
    )


@linux
def test_loading_on_four_ranks_takes_a_quarter_each(large: Path) -> None:
    """A rank once needed room for the whole checkpoint; now for its part and one tensor, and pages are shared."""
    largest_tensor = 1024 * 2816 * 4
    for rank in measured(4, large, "float32", 1, 1, 0):
        assert rank["weights"] == rank["planned"]["weights"]
        assert rank["weights"] < 92 * MB
        assert rank["loading"]["RssAnon"] < rank["weights"] + largest_tensor + 10 * MB
