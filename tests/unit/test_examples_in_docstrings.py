"""The examples in the docstrings of the public calls do what they say, on the demo model."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from llama import generation

ROOT = Path(__file__).parents[2]
CALLS = ("build", "from_options", "stream", "generate", "text_completion", "chat_completion", "text_infilling")


def test_examples_in_docstrings_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        pytest.skip("no demo model here: scripts/test gets it")
    monkeypatch.chdir(ROOT)
    llm = generation.Llama.build("models/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    names = vars(generation) | {"llm": llm}
    tests = doctest.DocTestFinder().find(generation.Llama, "Llama", globs=names)
    assert {f"Llama.{name}" for name in CALLS} <= {test.name for test in tests if test.examples}
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize().failed == 0
