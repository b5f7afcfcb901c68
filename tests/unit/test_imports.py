"""Imports inside llama/ go down only, kernels are asked about in one room, and `import llama` is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "llama").rglob("*.py"))
# A room may import those before it: the layers of docs/architecture.md, from the leaves to the command line.
ROOMS: tuple[str, ...] = (
    *("errors", "files", "checks", "rope_scaling", "config", "hub", "sampling", "cache", "rope"),
    *("tokenizer", "structured", "chat", "outputs", "quantization", "distributed"),
    *("norms", "feed_forward", "attention", "model"),
    *("backends", "checkpoint", "memory", "engine", "generation", "__init__", "testing"),
    *("jobs", "integrations", "benchmark", "cli", "__main__"),
)
# Only where they are used, as each costs up to seconds.
LAZY: tuple[str, ...] = (
    "fairscale",
    "fire",
    "gguf",
    "google.protobuf",
    "huggingface_hub",
    "jinja2",
    "safetensors",
    "sentencepiece",
    "tiktoken",
)
LAZY += ("llguidance", "prompt_toolkit", "pyarrow", "ray", "tokenizers", "transformers")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "llama").parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, as a whole dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from llama.engine import runner` imports a module; from a module, names.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return names


def test_each_room_imports_only_the_rooms_below_it() -> None:
    upwards = []
    for path in FILES:
        room = room_of(path)
        assert room in ROOMS, f"say in ROOMS where {room} stands"
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("llama.") else "__init__" if name == "llama" else room
            if other != room and ROOMS.index(other) > ROOMS.index(room):
                upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upwards


def test_modules_import_each_other_in_no_circle() -> None:
    """Inside rooms, too: the GPU's weights and products once imported each other."""
    left = {module_of(path): imported(path) & MODULES - {module_of(path)} for path in FILES}
    # A package's __init__ runs before its modules, whoever imports them, and may itself import some of them.
    while left:
        ready = [module for module, needs in left.items() if not needs & left.keys()]
        assert ready, f"a circle among {sorted(left)}"
        for module in ready:
            del left[module]


def test_only_backends_ask_which_kernels_there_are() -> None:
    """`choose_backend` is asked once, and its answer decides everything: twelve places once asked for themselves."""
    asking = []
    for path in FILES:
        if room_of(path) == "backends":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            classes = (
                {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)} if node.args[1:] else ()
            )
            tests_weights = name == "isinstance" and any(each.endswith("Weight") for each in classes)
            if name in ("has_triton", "library") or tests_weights:
                asking.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not asking


def test_a_public_name_stands_for_one_thing() -> None:
    """Plan, Entry, Weight and Step once meant several. Backends may name the same operation alike."""
    places: dict[str, list[Path]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            names = [getattr(target, "name", getattr(target, "id", "_")) for target in targets]
            for name in names:
                if not name.startswith("_") and name not in ("log", "main"):
                    places.setdefault(name, []).append(path)
    of_several = {name: paths for name, paths in places.items() if len(paths) > 1}
    backends = ROOT / "llama" / "backends"
    several = {
        name: [str(path.relative_to(ROOT)) for path in paths]
        for name, paths in of_several.items()
        if not any(path.is_relative_to(backends) for path in paths)
    }
    assert not several


def test_the_package_knows_neither_scripts_nor_examples_nor_tests() -> None:
    examples = {path.stem for path in ROOT.glob("example_*.py")}
    outside = {"scripts", "tests", *examples}
    assert not {str(path) for path in FILES if {name.split(".")[0] for name in imported(path)} & outside}


def test_importing_the_package_imports_no_optional_library() -> None:
    code = f"import sys; from llama import Llama; print([name for name in {LAZY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_importing_the_package_prints_and_warns_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from llama import Llama"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
