"""The examples in the docstrings of the public calls do what they say, on the demo model."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from llama import generation

pytestmark = pytest.mark.slow

CALLS = ("build", "from_options", "stream", "generate", "text_completion", "chat_completion", "text_infilling")


def test_examples_in_docstrings_run(demo_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(demo_model.parent)
    monkeypatch.chdir(tmp_path)
    llm = generation.Llama.build(demo_model, device="cpu")
    names = vars(generation) | {"llm": llm}
    tests = doctest.DocTestFinder().find(generation.Llama, "Llama", globs=names)
    assert {f"Llama.{name}" for name in CALLS} <= {test.name for test in tests if test.examples}
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize().failed == 0
