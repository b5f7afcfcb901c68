"""scripts/gpu_check.py on a CPU, where Triton's interpreter runs the kernels: what it measures, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.e2e import processes
from tests.e2e.processes import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "gpu_check.py"
INTERPRETED = {"TRITON_INTERPRET": "1"}
TINY = ("--device", "cpu", "--size", "tiny", "--seconds", "3000")  # none is left out on a busy machine


def test_all_is_measured_and_a_peer_that_fails_changes_nothing(tmp_path: Path) -> None:
    """The first run on a GPU shall not end at a typo."""
    (tmp_path / "model.py").write_text("raise RuntimeError('not today')\n")
    found = tmp_path / "found.json"
    done = processes.python(SCRIPT, *TINY, "--json", found, "--gpt_fast", tmp_path, env=INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(found.read_text())
    assert result["failed"] == []
    assert "tests: pytest runs them by Triton's interpreter" in result["left_out"]
    assert {"machine", "torch", "triton", "date", "dtype", "size", "seconds", "left_out"} <= result.keys()
    assert {(row["form"], row["bsz"]) for row in result["decode"]} == {
        (form, bsz) for form in ("fp16", "int4") for bsz in (1, 2)
    }
    assert {row["kernels"] for row in result["cold_start"]} == {"to compile", "compiled"}
    for section in ("copy", "prefill", "linears", "kernels", "memory", "goals"):
        assert result[section], section
    assert [row["error"] for row in result["peers"]] == ["RuntimeError: not today"]
    assert "peer gpt_fast failed: RuntimeError: not today" in done.stdout.splitlines()
    assert any(line.startswith("int4 at 16") for line in done.stdout.splitlines())


def test_without_a_gpu_or_an_interpreter_nothing_is_claimed() -> None:
    done = processes.python(SCRIPT, *TINY, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1" in done.stderr


def test_peers_alone_are_named(tmp_path: Path) -> None:
    """They compile for minutes, which they did not have among all that is measured."""
    done = processes.python(SCRIPT, *TINY, "--only", "peers", env=INTERPRETED)
    assert done.returncode == 1
    assert "--only peers takes --peers, --gpt_fast or both" in done.stderr
