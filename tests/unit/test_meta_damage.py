"""A damaged or hostile .pth ends in a ValueError that names the file, and never runs anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint.meta import MetaCheckpoint
from llama.config import ModelArgs
from tests.checkpoints import write_meta

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

SMALL = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32, multiple_of=8)
FORMATS = {"zip": True, "legacy": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_meta(tmp_path, SMALL)
    return tmp_path


def shard_of(folder: Path) -> Path:
    return folder / "consolidated.00.pth"


def save(folder: Path, content: Any, zipped: bool) -> bytes:
    torch.save(content, shard_of(folder), _use_new_zipfile_serialization=zipped)
    return shard_of(folder).read_bytes()


def rejected(folder: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        MetaCheckpoint(folder)
    assert "consolidated.00.pth" in str(caught.value)


class RunsCode:
    """Unpickling it makes a file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_runs_code_is_refused_and_not_run(folder: Path, form: str) -> None:
    marker = folder / "ran"
    attacks = [
        RunsCode(os.system, f"touch {marker}"),
        RunsCode(open, str(marker), "w"),
        RunsCode(eval, f"open({str(marker)!r}, 'w')"),
        RunsCode(os.mkdir, str(marker)),
    ]
    for attack in attacks:
        for content in (attack, {"norm.weight": attack}, {attack: torch.ones(3)}, [torch.ones(3), attack]):
            save(folder, content, FORMATS[form])
            rejected(folder, "is refused: it would run code when loaded")
            assert not marker.exists()


def test_the_refusal_names_the_code(folder: Path) -> None:
    save(folder, {"norm.weight": RunsCode(os.mkdir, "x")}, zipped=True)
    rejected(folder, r"refused: it would run code when loaded \(posix\.mkdir\)")


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncation_is_a_value_error(folder: Path, form: str) -> None:
    whole = save(folder, torch.load(shard_of(folder)), FORMATS[form])
    lengths = {0, 1, 2, 3, 4, 5, len(whole) - 1, len(whole) - 22, len(whole) - 23, *range(0, len(whole), 149)}
    for length in sorted(lengths):
        shard_of(folder).write_bytes(whole[:length])
        rejected(folder, "empty|truncated|damaged|not a checkpoint")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)],
        torch.ones(3),
        None,
        "text",
        {"model": {"norm.weight": torch.ones(3)}},
        {"norm.weight": [1.0, 2.0]},
        {0: torch.ones(3)},
        {("norm", "weight"): torch.ones(3)},
    ],
    ids=["list", "tensor", "none", "text", "nested", "numbers", "int key", "tuple key"],
)
def test_what_is_no_dictionary_of_tensors_is_told(folder: Path, content: Any, form: str) -> None:
    save(folder, content, FORMATS[form])
    rejected(folder, "must hold a dictionary of tensors")


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF\x03\x00\x00\x00",
        b"\x00" * 4096,
        b"PK\x05\x06" + b"\x00" * 18,
        pickle.dumps({"a": 1}),
    ],
    ids=["gguf", "zeros", "empty zip", "pickle"],
)
def test_other_files_under_the_name_are_told(folder: Path, content: bytes) -> None:
    shard_of(folder).write_bytes(content)
    rejected(folder, "damaged|not a checkpoint|truncated|dictionary")


def test_a_zip_of_something_else_is_told(folder: Path) -> None:
    with zipfile.ZipFile(shard_of(folder), "w") as archive:
        archive.writestr("hello.txt", "hello")
    rejected(folder, "damaged")


def test_a_wrong_checksum_of_what_says_where_tensors_lie_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged number of a storage once gave another tensor's weights without a word."""
    data = shard_of(folder).read_bytes()
    key = data.index(b"X\x01\x00\x00\x003")
    shard_of(folder).write_bytes(data[: key + 5] + b"5" + data[key + 6 :])
    MetaCheckpoint(folder)
    assert [message.partition(" is wrong")[0] for message in caplog.messages] == [
        f"{shard_of(folder)}: the checksum of its data.pkl"
    ]


def test_an_empty_dictionary_lacks_everything(folder: Path) -> None:
    save(folder, {}, zipped=True)
    checkpoint = MetaCheckpoint(folder)
    assert list(checkpoint.names()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(16).to_sparse(), "is sparse_coo"),
        (lambda: torch.eye(16).to_sparse_csr(), "is sparse_csr"),
        (lambda: torch.empty(16, device="meta"), "is on the device meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
        (lambda: torch.ones(1).expand(1 << 20, 1 << 20), "repeats 4 stored bytes"),
        (lambda: torch.ones(1 << 10).as_strided((1 << 10, 1 << 10), (0, 1)), "repeats 4096 stored bytes"),
    ],
    ids=["sparse", "csr", "meta", "nested", "stride 0", "rows again"],
)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
def test_tensors_whose_values_do_not_lie_in_the_file_are_refused(
    folder: Path, make: Callable[[], torch.Tensor], said: str
) -> None:
    """A few bytes that are said to be terabytes were planned as terabytes; sparse ones ended in torch's own error."""
    save(folder, {"norm.weight": make()}, zipped=True)
    rejected(folder, said)


@pytest.mark.parametrize("size", [0, 1 << 30], ids=["deflated", "huge"])
def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(folder: Path, size: int) -> None:
    """A gigabyte of zeros has a megabyte, deflated; mapped weights that are deflated would be other numbers."""
    save(folder, torch.load(shard_of(folder)), zipped=True)
    whole = zipfile.ZipFile(shard_of(folder))
    records = {record: whole.read(record) for record in whole.namelist()}
    with zipfile.ZipFile(shard_of(folder), "w") as archive:
        for name, content in records.items():
            is_data = "/data/" in name
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if is_data and not size else zipfile.ZIP_STORED)
        if size:
            with archive.open("x/data.pkl", "w", force_zip64=True) as large:
                for _ in range(65):
                    large.write(bytes(1 << 20))
    rejected(folder, "is compressed" if not size else "at most 67108864 are expected")
