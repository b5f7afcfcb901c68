"""The subcommands that make, convert and check checkpoints, run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama import Llama
from llama.checkpoint import open_checkpoint
from tests.e2e import processes
from tests.e2e.processes import LLAMA, TIMEOUT, Finished, llama

pytestmark = pytest.mark.slow


def succeed(*arguments: object) -> Finished:
    done = llama(*arguments)
    assert done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def making(target: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`llama make` in the middle of writing weights."""
    command = [sys.executable, *LLAMA, "make", target, "--preset", "smollm2-135m", *arguments]
    with processes.started(command) as process:
        end = time.monotonic() + TIMEOUT
        while sum(file.stat().st_size for file in partial_files(target)) < 10_000_000:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        yield process


def partial_files(target: Path) -> list[Path]:
    return [
        file
        for partial in target.parent.glob(f"{target.name}.partial-*")
        for file in (partial.rglob("*") if partial.is_dir() else [partial])
        if file.is_file()
    ]


def answers(path: Path) -> list[object]:
    """Greedy text and ids for a completion and a chat."""
    llm = Llama.build(path, max_seq_len=256, max_batch_size=1, dtype="bfloat16", device="cpu")
    completion = llm.text_completion(["The capital of France"], temperature=0, max_gen_len=6)
    chat = llm.chat_completion([[{"role": "user", "content": "Say hello."}]], temperature=0, max_gen_len=6)
    return [completion, chat, llm.tokenizer.stop_tokens, llm.tokenizer.special_tokens]


def test_the_demo_model_answers_alike_in_every_format(demo_model: Path, tmp_path: Path) -> None:
    expected = answers(demo_model)
    done = succeed("convert", demo_model, tmp_path / "meta", "--format", "meta", "--shards", 3)
    assert "written in bfloat16" in done.stderr and done.stdout == ""
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == 3
    assert answers(tmp_path / "meta") == expected
    succeed("convert", tmp_path / "meta", tmp_path / "hf", "--format=hf", "--dtype=bfloat16")
    assert answers(tmp_path / "hf") == expected
    assert open_checkpoint(tmp_path / "hf").args.tied_embeddings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "meta"]


def test_a_random_checkpoint_is_well_and_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    succeed("make", folder, "--preset", "tiny", "--shards", 4)
    assert "all is well" in succeed("verify", folder, "--deep", "--write").stdout
    assert subprocess.run(["sha256sum", "-c", "checksums.sha256"], cwd=folder, capture_output=True).returncode == 0
    weights = folder / "consolidated.02.pth"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = llama("verify", folder)
    assert done.returncode == 1 and "1 problem" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if "WRONG" in line] == ["consolidated.02.pth"]


def test_a_checkpoint_is_quantized_and_checked(tmp_path: Path) -> None:
    succeed("make", tmp_path / "tiny", "--preset", "tiny")
    done = succeed("convert", tmp_path / "tiny", tmp_path / "int4", "--format", "hf", "--quantize", "int4")
    assert "written in bfloat16" not in done.stderr and done.stdout == ""
    assert "all is well" in succeed("verify", tmp_path / "int4", "--deep").stdout
    assert open_checkpoint(tmp_path / "int4").block_type("norm.weight") is None
    done = succeed("convert", tmp_path / "int4", tmp_path / "dense", "--format", "meta")
    assert "written in bfloat16, unless --dtype" in done.stderr
    done = llama("convert", tmp_path / "tiny", tmp_path / "meta", "--format", "meta", "--quantize", "int8")
    assert done.returncode == 1 and "error: --quantize int8 is for --format hf alone" in done.stderr


@pytest.mark.parametrize("format", ["meta", "hf", "gguf"])
def test_a_killed_run_leaves_nothing_that_looks_finished(format: str, tmp_path: Path) -> None:
    target = tmp_path / ("model.gguf" if format == "gguf" else "model")
    with making(target, "--format", format) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)
    assert not target.exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises((ValueError, OSError)):
        open_checkpoint(partial)
    with pytest.raises((ValueError, OSError)):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with making(target) as process:
        process.send_signal(number)
        assert process.wait(TIMEOUT) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("convert", ["{full}", "{full}", "--format", "hf"], "full exists already"),
        ("convert", ["{full}", "--format", "hf"], "DST must be given"),
        ("convert", ["{full}", "{new}", "--format", "hf", "more"], "unexpected argument 'more'"),
        ("make", ["{new}", "--preset", "llama-9"], "--preset must be one of tiny,"),
        ("make", ["{new}", "--preset", "tiny", "--shards", "5"], "use one of 1, 2, 4, 8"),
        ("verify", ["{new}"], "does not exist"),
    ],
    ids=str,
)
def test_a_users_mistake_is_one_line(command: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    done = llama(command, *(word.format(full=tmp_path / "full", new=tmp_path / "new") for word in arguments))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]
