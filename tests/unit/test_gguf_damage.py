"""A damaged GGUF file ends in a ValueError that names it: no other error, and no memory that it only claims to need."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama.checkpoint import open_checkpoint
from llama.checkpoint.gguf_header import read_header
from llama.config import ModelArgs
from tests.checkpoints import random_state
from tests.fuzz.structures import parse_gguf
from tests.gguf_files import metadata_of, write_gguf, write_gguf_model

SMALL = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=32)
HEAD = b"GGUF" + struct.pack("<I", 3)


@contextlib.contextmanager
def spare_memory(size: int) -> Iterator[None]:
    """Let this process have `size` more bytes, so that what a length field claims is not simply allocated."""
    resource = pytest.importorskip("resource")
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    found = re.search(r"VmSize:\s+(\d+) kB", status.read_text())
    assert found
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(found[1]) * 1024 + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf_model(path, SMALL, random_state(SMALL))
    return path.read_bytes()


def use(path: Path) -> bool:
    """Open a file and read all that it holds; whether that was possible."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.read(name)
    except ValueError as error:
        assert path.name in str(error)
        return False
    return True


def test_every_truncation_is_a_value_error(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert use(path)
    header_size = min(info.offset for info in read_header(path).tensors.values())
    for length in (*range(0, header_size, 7), *range(32), *range(header_size, len(whole), 257), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not use(path), length


def test_every_mutated_length_is_a_value_error_or_harmless(whole: bytes, tmp_path: Path) -> None:
    """Each 8 bytes of the header as the largest numbers there are."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    header_size = min(info.offset for info in read_header(path).tensors.values())
    with spare_memory(1 << 29):
        for at in range(4, header_size - 8, 3):
            for number in (2**64 - 1, 2**32):
                data = bytearray(whole)
                data[at : at + 8] = struct.pack("<Q", number)
                path.write_bytes(data)
                use(path)


@pytest.mark.parametrize(
    "header",
    [
        HEAD + struct.pack("<QQ", 2**62, 0),
        HEAD + struct.pack("<QQ", 0, 2**62),
        HEAD + struct.pack("<QQQ", 0, 1, 2**62),
        HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 3 << 29),  # an array of bytes
        HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 3 << 26),  # an array of texts
        HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),  # an array of arrays
    ],
    ids=["tensors", "values", "key", "bytes", "texts", "arrays"],
)
def test_a_large_file_cannot_ask_for_more_memory_than_a_header_needs(tmp_path: Path, header: bytes) -> None:
    """In a file of 40 GB a damaged array may claim a length that the file has, and would be 32 bytes a number.

    Zeros, as a download that was cut off leaves them, are millions of empty keys.
    """
    path = tmp_path / "model.gguf"
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(2 << 30)  # sparse
    with spare_memory((2 << 30) + (1 << 28)), pytest.raises(ValueError, match=r"model\.gguf"):
        read_header(path)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"", "is empty"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "version 50331648 is not supported, .* little-endian"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 13) + bytes(64), "unknown value type 13"),
        (HEAD + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 5) + bytes(64), "has 5 dimensions"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "model.gguf").write_bytes(start)
    with pytest.raises(ValueError, match=said):
        read_header(tmp_path / "model.gguf")


def test_a_tensor_that_does_not_follow_the_one_before_is_told(whole: bytes, tmp_path: Path) -> None:
    """A wrong offset once gave other weights without a word; llama.cpp refuses it."""
    path = tmp_path / "model.gguf"
    parts = parse_gguf(whole)
    assert parts.write() == whole
    name, dims, code, offset = parts.tensors[3]
    for wrong in (offset - 32, offset + 32, offset + 4, 0):
        parts.tensors[3] = name, dims, code, wrong
        path.write_bytes(parts.write())
        with pytest.raises(ValueError, match=rf"model\.gguf is damaged: tensor {name.decode()} lies at byte"):
            open_checkpoint(path)


def test_keys_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt key was ignored without a word, and its default taken."""
    path = tmp_path / "model.gguf"
    write_gguf_model(path, SMALL, random_state(SMALL), llama__rope__freq_bace=5e5, general__whatever=1)
    open_checkpoint(path)
    assert caplog.messages == [f"{path} has keys that are ignored: llama.rope.freq_bace"]


def test_a_file_larger_than_memory_is_told(whole: bytes, tmp_path: Path) -> None:
    """Linux maps no such file, and said so by a number alone."""
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    with path.open("r+b") as file:
        file.truncate(4 << 30)  # sparse
    said = r"model\.gguf of 4\.3 GB cannot be mapped .*memory"
    with spare_memory(1 << 28), pytest.raises(OSError, match=said):
        open_checkpoint(path)


def test_norms_and_biases_in_blocks_are_refused(tmp_path: Path) -> None:
    """Their rows were taken for rows of one value, which ended in a shape of nowhere."""
    write_gguf_model(tmp_path / "model.gguf", SMALL, random_state(SMALL))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {each.name: (np.array(each.data), each.tensor_type) for each in reader.tensors}
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    tensors["output_norm.weight"] = gguf.quantize(np.ones(SMALL.dim, np.float32), q8_0), q8_0
    write_gguf(tmp_path / "model.gguf", metadata_of(SMALL), tensors)
    with pytest.raises(
        ValueError, match=r"model\.gguf: output_norm\.weight has blocks of type Q8_0, as only matrices may"
    ):
        open_checkpoint(tmp_path)
