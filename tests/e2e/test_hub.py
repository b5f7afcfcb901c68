"""Models by name on several ranks: one download a host, and one error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.cli import make
from tests.e2e.processes import llama, torchrun
from tests.hub_server import Hub

pytestmark = pytest.mark.slow
FLAGS = ("--device", "cpu", "--prompt", "Hello", "--temperature", "0", "--max_gen_len", "4")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    make.main(tmp_path / "tiny", preset="tiny", format="hf", dtype="float32")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    with Hub({"org/tiny": files, "org/gated": files}) as server:
        server.gated = {"org/gated"}
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_two_ranks_download_once_and_say_what_one_says(hub: Hub) -> None:
    hub.cut["model.safetensors"] = 100_000
    done = torchrun(2, "-m", "llama", "complete", "--ckpt_dir", "org/tiny", *FLAGS)
    assert done.returncode == 0, done.stderr
    files = hub.repos["org/tiny"]
    assert {name: hub.sent[name] for name in files} == {name: len(files[name]) for name in files}
    assert done.stderr.count("downloading org/tiny to ") == 1 and "HTTP" not in done.stderr
    assert llama("complete", "--ckpt_dir", "org/tiny", *FLAGS).stdout == done.stdout


def test_a_model_that_cannot_be_had_is_one_error_on_two_ranks(hub: Hub) -> None:
    done = torchrun(2, "-m", "llama", "complete", "--ckpt_dir", "org/tiny", "--draft_ckpt_dir", "org/gated", *FLAGS)
    assert done.returncode == 1 and done.stdout == ""
    assert [line.partition(": ask")[0] for line in done.errors] == ["error: org/gated is gated"]
