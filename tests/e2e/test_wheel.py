"""The wheel alone, in an environment that has its dependencies and nothing else of ours."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from llama import __version__
from llama.backends.cpu.libraries import processor_flags
from tests.e2e.processes import ROOT, Finished, run

pytestmark = pytest.mark.slow

BUILT_FROM = ("llama", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what it is made of: a build leaves files in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "tree" / name)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "tree")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: dependencies are found where the tests have them, after its own packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    bin_folder = folder / "bin"
    pip(bin_folder / "python", "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path is added as it is: .pth files in it, such as that of an editable installation, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_folder


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx2" not in processor_flags() or shutil.which("c++") is None,
    reason="no C++ compiler here for a processor with AVX2",
)
def test_a_wheel_may_bring_kernels_for_machines_without_a_compiler(tiny_folder: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # without optimizations, which take most of the time
    compiler.chmod(0o755)
    build = [sys.executable, ROOT / "scripts" / "wheel.py", "x86_64", tmp_path, "x86-64-v3"]
    wheel = Path(run(build, env={"CXX": str(compiler)}).stdout.strip())
    assert wheel.name.startswith("llama_torchrun-") and wheel.name.endswith("_x86_64.whl"), wheel
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    flags = ["--ckpt_dir", tiny_folder, "--prompt", "hello", "--max_gen_len", "4", "--json", "--device", "cpu"]
    env = {"PYTHONPATH": str(tmp_path / "site"), "CXX": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run([sys.executable, "-m", "llama", "complete", *flags], cwd=tmp_path, env=env)
    assert "came with the package for x86-64-v3: no C++ compiler (/nonexistent)" in done.stderr, done
    assert "own kernels" in done.stderr and done.json_lines[0]["generation"]


def pip(python: object, *arguments: object) -> None:
    """This interpreter's pip, for the environment of `python`."""
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def call(command: Path, *arguments: object, cwd: Path) -> Finished:
    return run([command, *arguments], cwd=cwd, env={"PYTHONPATH": ""})


def test_a_wheel_holds_the_package_alone(wheel: Path) -> None:
    """Data files, such as C++ sources and the marker of types, are easily left out; tests and scripts slip in."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llama").rglob("*") if path.is_file()}
    expected = {name for name in sources if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"llama/py.typed", "llama/backends/cpu/csrc/kernels.cpp"} <= expected
    assert f"\nVersion: {__version__}\n" in metadata


def test_the_command_completes_a_prompt_from_the_wheel(bin_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    where = call(bin_folder / "python", "-c", "import llama; print(llama.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(bin_folder.parent), where
    assert call(bin_folder / "llama", "--version", cwd=tmp_path).stdout == f"llama {__version__}\n"
    flags = ["--ckpt_dir", tiny_folder, "--prompt", "hello", "--max_gen_len", "4", "--json", "--device", "cpu"]
    (answer,) = call(bin_folder / "llama", "complete", *flags, cwd=tmp_path).json_lines
    assert answer["prompt"] == "hello" and answer["generation"]
    (same,) = call(bin_folder / "python", "-m", "llama", "complete", *flags, cwd=tmp_path).json_lines
    assert same == answer
