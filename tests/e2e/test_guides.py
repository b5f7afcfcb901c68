"""Every command and every line of Python that README.md and docs/guides show, run as they stand there.

A fence that says "not run" gives its reason. Weights that have to be asked for are stood in for by tiny random ones of
the same name, and jobs of more ranks than a small machine carries are run on two.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.config import ModelArgs
from llama.testing.model_presets import PRESETS, Preset
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.adapters import random_halves, write_gguf_adapter, write_peft
from tests.e2e.processes import ROOT, TORCHRUN, Finished, forked_python, run
from tests.hub_server import Hub

pytestmark = pytest.mark.slow

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r" not run: \S.*")
SHOWN_ONLY = {"text", "mermaid"}
TINY = PRESETS["tiny"]
CODE_LLAMA = Preset(ModelArgs(64, 2, 8, vocab_size=512, multiple_of=64), "code_llama", 2048)
# Folders that the documents name: the architecture in their place, its format and its number of files.
STAND_INS = {
    "CodeLlama-7b": (CODE_LLAMA, "meta", 1),
    "Llama-2-7b": (TINY, "meta", 1),
    "Llama-2-7b-chat": (TINY, "meta", 1),
    "Llama-2-70b": (TINY, "meta", 8),
    "Llama-3.1-8B": (TINY, "hf", 1),
    "Llama-3.2-1B": (TINY, "hf", 1),
    "Llama-3.2-1B-Instruct": (TINY, "hf", 1),
    "Meta-Llama-3-8B-Instruct": (TINY, "meta", 1),
    "Meta-Llama-3.1-405B": (TINY, "meta", 8),
}
MOST_RANKS = 3  # the demo model's heads can be split over three ranks, and not over two


def fences(document: Path) -> list[tuple[str, str, str]]:
    """The language, the rest of the first line and the content of each fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def runnable(document: Path, *languages: str) -> list[tuple[str, str]]:
    """The language and the content of each block that is to be run."""
    return [(language, text) for language, rest, text in fences(document) if language in languages and not rest]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint for each name."""
    root = tmp_path_factory.mktemp("stand_ins")
    for seed, (name, (preset, form, shards)) in enumerate(STAND_INS.items()):
        checkpoint = RandomCheckpoint(name, preset, seed)
        made = writer(checkpoint, tokenizer_source(checkpoint), form, shards=shards, dtype="bfloat16")
        write_checkpoint(made, root / name, lambda n_bytes: None)
    base = open_checkpoint(root / "Llama-3.1-8B")
    halves = random_halves(base.args, {name: base.read(name) for name in base.names()})
    write_peft(root / "my-adapter", base.args, halves)
    write_gguf_adapter(root / "style.gguf", halves)
    (root / "articles.txt").write_text("Salt was dear where the sea was far away. " * 40)
    return root


@pytest.fixture
def checkout(stand_ins: Path, demo_model: Path, tmp_path: Path) -> Path:
    """What a reader's folder holds: the checkout's scripts and examples, the demo model, weights, and the commands."""
    for path in [ROOT / "scripts", *ROOT.glob("example_*.py"), *stand_ins.iterdir()]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / demo_model.name).symlink_to(demo_model)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").touch()
    programs = {"python": "", "llama": "-m llama", "torchrun": TORCHRUN}
    for name, program in programs.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{forked_python()}" {program} "$@"\n')
        (commands / name).chmod(0o755)
    return tmp_path


@pytest.fixture(scope="module")
def hub(stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with the models that the documents name, which are tiny here."""
    folder = stand_ins / "Llama-3.2-1B"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint = RandomCheckpoint("Llama-3.2-1B", TINY, 0)
    gguf = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), "gguf", dtype="q8_0"), gguf, lambda n_bytes: None)
    types = {f"m-{kind}.gguf": gguf.read_bytes() for kind in ("Q4_K_M", "Q8_0")}
    with Hub({"meta-llama/Llama-3.2-1B": whole, "bartowski/Llama-3.2-1B-Instruct-GGUF": types}) as server:
        yield server


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def perform(command: str, checkout: Path, hub: Hub) -> Finished:
    """Do what a reader types who has activated the environment; without a terminal, and with nothing to type."""
    path = f"{checkout / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    env = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHON_EXEC": str(forked_python())}
    env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(checkout / "home")}
    return run(["bash", "-euo", "pipefail", "-c", command], cwd=checkout, env=env)


def fitted(script: str) -> str:
    """The same script with ranks and hosts that one small machine has: two hosts are two launchers here."""

    def fewer(found: re.Match[str]) -> str:
        return found[0] if int(found[1]) <= MOST_RANKS else "--nproc_per_node 2"

    script = re.sub(r"--nproc_per_node (\d+)", fewer, script)
    if "--nnodes 2" not in script:
        return script
    script = re.sub(r"--nproc_per_node \d+", "--nproc_per_node 1", script)
    script = re.sub(r"--rdzv_endpoint \S+", f"--rdzv_endpoint 127.0.0.1:{free_port()}", script).strip()
    return f"({script}) & ({script}); wait $!"


def sessions(text: str) -> list[tuple[str, str]]:
    """Each command of a console block, and what it is said to print; "" where the block does not say."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)


def lines(text: str) -> list[str]:
    """The commands of a block, one a line unless the line ends in a backslash; no comments."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_a_document_shows_runs(document: Path, checkout: Path, hub: Hub) -> None:
    """The README once named scripts that were gone. All Python of a document is one program."""
    commands: list[tuple[str, str]] = []
    for language, text in runnable(document, "bash", "console"):
        commands += sessions(text) if language == "console" else [(line, "") for line in lines(text)]
    blocks = [text for _, text in runnable(document, "python")]
    if blocks:
        (checkout / "program.py").write_text("\n".join(blocks), encoding="utf-8")
        commands.append(("python program.py", ""))
    assert commands, "nothing was found to run"
    for command, shown in commands:
        done = perform(fitted(command), checkout, hub)
        assert done.returncode == 0, f"{command}\n{done.all_stderr}"
        if shown:
            assert stripped(done.stdout) == stripped(shown), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_block_is_run_or_says_why_not(document: Path) -> None:
    for language, rest, text in fences(document):
        assert language in {"bash", "console", "python"} | SHOWN_ONLY, f"a block without a language:\n{text}"
        assert not rest or NOT_RUN.fullmatch(rest), f"{rest!r} is no reason"
        assert language != "console" or sessions(text), f"a session without a command:\n{text}"
