"""Imports inside llama/ form the graph of docs/design.md, and `import llama` is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each part of the package may import; a part is a module, or a folder of them.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "blocks": set(),
    "sampling": set(),
    "cache": set(),
    "gpu": {"blocks", "sampling"},
    "kernels": set(),
    "threads": set(),
    "linear": {"blocks", "gpu", "kernels"},
    "parallel": {"linear", "threads"},
    "statistics": set(),
    "memory": set(),
    "tokenizer": set(),
    "render_template": set(),
    "rope": {"config"},
    "model": {"cache", "config", "linear", "parallel", "rope"},
    "fused": {"cache", "kernels", "linear", "model", "parallel"},
    "gpu_layers": {"cache", "gpu", "linear", "model", "parallel"},
    "compiled": {"cache", "model"},
    "infilling": {"tokenizer"},
    "chat_template": {"tokenizer"},
    "chat": {"chat_template", "tokenizer"},
    "predictions": {"chat", "tokenizer"},
    "checkpoint": {"blocks", "config", "gpu", "linear", "model", "parallel", "rope", "tokenizer"},
    "footprint": {"config", "gpu", "parallel"},
    "plan": {
        *{"blocks", "checkpoint", "compiled", "config", "footprint", "linear", "memory", "model", "parallel"},
    },
    "build": {
        *{"chat", "checkpoint", "compiled", "config", "footprint", "fused", "gpu", "gpu_layers", "kernels", "linear"},
        *{"memory", "model", "parallel", "plan", "tokenizer"},
    },
    "context": {"config", "footprint", "model", "sampling"},
    "steps": {"context", "gpu", "model", "sampling"},
    "graphs": {"compiled", "context", "model", "sampling", "steps"},
    "kept": {"build", "context", "footprint", "graphs", "model", "steps"},
    "speculation": {"context", "sampling", "steps"},
    "batch": {"footprint", "predictions", "sampling", "speculation", "statistics", "steps"},
    "prompts": {"config", "tokenizer"},
    "generation": {
        *{"batch", "build", "chat", "footprint", "infilling", "kept", "model", "predictions", "prompts", "sampling"},
        *{"speculation", "statistics", "tokenizer"},
    },
    "cli": {"generation", "parallel", "statistics"},
    "__init__": {"generation", "model", "tokenizer"},
}
# Only where they are used, as each costs up to seconds.
LAZY = ("fairscale", "fire", "gguf", "google.protobuf", "jinja2", "safetensors", "sentencepiece", "tiktoken")
LAZY += ("tokenizers", "transformers")


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "llama").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as a whole dotted name."""
    names: set[str] = set()
    package = ["llama", *path.relative_to(ROOT / "llama").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from llama import parallel` imports a module; from a module, names.
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "llama" else {module}
    return names


FILES = sorted((ROOT / "llama").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_file_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    own = {name.split(".")[1] for name in imported(path) if name.startswith("llama.")}
    assert own - {part} <= ALLOWED[part]
    assert "llama" not in imported(path), "import its modules: the package imports them all"


def test_the_allowed_imports_have_no_cycle() -> None:
    left = dict(ALLOWED)
    while left:
        ready = [part for part, needs in left.items() if not needs & left.keys()]
        assert ready, f"a cycle among {sorted(left)}"
        for part in ready:
            del left[part]


def test_every_allowed_import_is_used() -> None:
    """The graph above would otherwise grow laxer than the code."""
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for path in FILES:
        used[part_of(path)] |= {name.split(".")[1] for name in imported(path) if name.startswith("llama.")}
    assert {part: needs - {part} for part, needs in used.items()} == ALLOWED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_knows_neither_scripts_nor_examples_nor_tests(path: Path) -> None:
    outside = {"scripts", "tests", "example_text_completion", "example_chat"}
    assert not {name.split(".")[0] for name in imported(path)} & outside


def test_importing_the_package_imports_no_optional_library() -> None:
    code = f"import sys; from llama import Llama; print([name for name in {LAZY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_importing_the_package_prints_and_warns_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from llama import Llama"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
