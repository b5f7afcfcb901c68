"""scripts/gpu_check.py on a CPU, where Triton's interpreter runs the kernels: what it finds, not how fast they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.e2e import processes
from tests.e2e.processes import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"
INTERPRETED = {"TRITON_INTERPRET": "1"}
TINY = ("--device", "cpu", "--size", "tiny")
CHECKED = ("product", "attention", "sum", "norm", "gate", "rotated", "greedy", "sampled", "logits", "tokens")
# What a product would be with one scale misread; the rest of the checks would take long and tell nothing more.
WRONG = """
import dataclasses, runpy, sys
sys.argv, scripts = sys.argv[1:], sys.argv[2]
sys.path.insert(0, scripts)
from gpu_checking.sizes import SIZES
from llama.gpu import products
right = products.multiply

def wrong(*arguments, **options):
    y = right(*arguments, **options)
    y[-1, -1] *= 1.5
    return y

products.multiply = wrong
SIZES["tiny"] = dataclasses.replace(SIZES["tiny"], graphed=(), heads=(), vocab_sizes=())
runpy.run_path(sys.argv.pop(0), run_name="__main__")
"""


def test_all_is_checked_and_measured_and_a_peer_that_fails_changes_nothing(tmp_path: Path) -> None:
    """The first run on a GPU shall not end at a typo."""
    (tmp_path / "model.py").write_text("raise RuntimeError('not today')\n")
    found = tmp_path / "found.json"
    done = processes.python(SCRIPT, *TINY, "--json", found, "--gpt_fast", tmp_path, env=INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(found.read_text())
    assert result["failed"] == [] and all(check["passed"] for check in result["checks"])
    assert all(any(check["name"].startswith(what) for check in result["checks"]) for what in CHECKED)
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


def test_a_wrong_kernel_is_named_and_ends_with_1(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(WRONG)
    done = processes.python(driver, SCRIPT, SCRIPT.parent, *TINY, "--only", "checks", env=INTERPRETED)
    assert done.returncode == 1, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])["failed"]
    assert "product int4 21 x 256, tokens: 8" in failed
    assert any(name.startswith("logits int4") for name in failed)
    assert not any(name.startswith(("sum", "norm", "gate")) for name in failed)


def test_without_a_gpu_or_an_interpreter_nothing_is_claimed() -> None:
    done = processes.python(SCRIPT, *TINY, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1" in done.stderr


def test_peers_alone_are_named(tmp_path: Path) -> None:
    """They compile for minutes, which they did not have among all that is measured."""
    done = processes.python(SCRIPT, *TINY, "--only", "peers", env=INTERPRETED)
    assert done.returncode == 1
    assert "--only peers takes --peers, --gpt_fast or both" in done.stderr
