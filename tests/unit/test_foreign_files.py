"""What is not the file that its name says is named as what it is, in every format and wherever it is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoint import open_checkpoint
from llama.config import ModelArgs
from llama.files import check_content
from tests.checkpoints import random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.hugging_face import hugging_face_model
from tests.models import build

SMALL = ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=512, multiple_of=32)

FOREIGN = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
    "web page": (b"\n<!DOCTYPE html><html>Log in</html>", "is a web page saved in place of the file: log in"),
    "cloud": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "empty": (b"", "is empty: download it again"),
}
MESSAGE = b"Access to model x/y is restricted. You must be authenticated to access it."


def write_hugging_face(folder: Path, **options: Any) -> None:
    hugging_face_model(SMALL, random_state(SMALL)).save_pretrained(folder, **options)


WRITERS: dict[str, Callable[[Path], object]] = {
    "consolidated.00.pth": lambda folder: write_meta(folder, SMALL),
    "params.json": lambda folder: write_meta(folder, SMALL),
    "model.safetensors": write_hugging_face,
    "config.json": write_hugging_face,
    "generation_config.json": write_hugging_face,
    "model.safetensors.index.json": lambda folder: write_hugging_face(folder, max_shard_size="4KB"),
    "model.gguf": lambda folder: write_gguf_model(folder / "model.gguf", SMALL, random_state(SMALL)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_of_a_checkpoint_is_looked_at(tmp_path: Path, name: str) -> None:
    """Pointers were called damaged files, and the advice to download again gives the pointer again."""
    WRITERS[name](tmp_path)
    write_byte_tokenizer(tmp_path)
    open_checkpoint(tmp_path)
    for content, said in FOREIGN.values():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said) as caught:
            build(tmp_path)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.safetensors", "model.gguf"])
def test_a_servers_message_in_place_of_weights_is_shown(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / name).write_bytes(MESSAGE)
    with pytest.raises(ValueError, match=f"is text in place of the file, '{MESSAGE.decode()[:60]}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizers_files_are_looked_at(tmp_path: Path, name: str) -> None:
    """A pointer in place of the template was the template."""
    write_hugging_face(tmp_path)
    write_byte_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(FOREIGN["git-lfs"][0])
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer"):
        build(tmp_path)


def test_a_pointer_given_by_itself_is_named(tmp_path: Path) -> None:
    """A file without GGUF's first bytes was "neither a folder nor a GGUF file"."""
    (tmp_path / "model.gguf").write_bytes(FOREIGN["git-lfs"][0])
    with pytest.raises(ValueError, match="is a git-lfs pointer"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.gguf"])
def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is empty"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\x80\x02}q\x00.", b"GGUF", b"GGUF\x03\x00\x00\x00 and so on", b"PK\x03\x04 zipped"]
)
def test_weights_are_not_taken_for_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights").write_bytes(content)
    check_content(tmp_path / "weights", is_binary=True)


def test_a_whole_checkpoint_is_not_foreign(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", SMALL)
    for file in shutil.copytree(tmp_path / "meta", tmp_path / "again").iterdir():
        check_content(file, is_binary=file.suffix == ".pth")
