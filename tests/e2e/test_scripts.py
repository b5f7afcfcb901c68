"""The README's two commands, in the repository itself: once set up, they need no network and install nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.processes import ROOT, run

pytestmark = pytest.mark.slow

STAMP = ROOT / ".venv" / ".installed"
NOWHERE = "http://127.0.0.1:9"
NO_NETWORK = {
    "PIP_NO_INDEX": "1",
    "PIP_INDEX_URL": NOWHERE,
    **{name: NOWHERE for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())},
}


@pytest.fixture(autouse=True)
def set_up(demo_model: Path) -> None:
    if not STAMP.is_file():
        pytest.skip("the repository has no .venv made by its scripts: scripts/test makes it")


def test_a_second_demo_prints_completions_without_network(tmp_path: Path) -> None:
    before = STAMP.read_text()
    done = run([ROOT / "scripts" / "demo", "--temperature", "0", "--max_gen_len", "8"], env=NO_NETWORK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is\n>  Paris")
    assert done.stdout.count("==================================") >= 2
    assert [line.split(" ")[0] for line in done.stderr.splitlines()] == ["demo", "loaded", "prefill"]
    assert STAMP.read_text() == before
    assert list(tmp_path.iterdir()) == []


def test_scripts_test_hands_its_arguments_to_pytest_without_network(tmp_path: Path) -> None:
    command = [ROOT / "scripts" / "test", "--collect-only", "-q", "tests/e2e/test_scripts.py"]
    done = run(command, env=NO_NETWORK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tests/e2e/test_scripts.py::test_a_second_demo_prints_completions_without_network\n")


def test_the_demo_runs_without_an_environment_that_was_activated() -> None:
    """A user's shell knows no .venv/bin, and may have a PYTHONPATH of its own."""
    env = {"PATH": "/usr/bin:/bin:/usr/local/bin", "PYTHONPATH": "/nowhere", "VIRTUAL_ENV": "/nowhere"}
    done = run([ROOT / "scripts" / "demo", "--help"], env=NO_NETWORK | env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: example_text_completion.py")
