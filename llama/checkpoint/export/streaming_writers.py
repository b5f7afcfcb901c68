"""Write tensors one after another into files, under a path that appears only when everything in it is there.

Nothing larger than a tensor is held in memory. Knows file formats, no architecture.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES

SAFETENSORS_DTYPES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()} | {torch.uint8: "U8"}
TORCH_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}

ALIGNMENT = 64  # of torch.save's storages
LOCAL_HEADER = 30  # bytes before a zip member's name
ZIP64_EXTRA = 20  # bytes that a member of 2 GiB or more adds to its local header
ARCHIVE = "archive"


class TensorEntry(NamedTuple):
    """Describe the shape and dtype that a tensor is written in."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextlib.contextmanager
def new_path(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """Yield a path to write to beside `path`; give it that name when the caller is done, and remove it on an error.

    A process that is killed leaves it as NAME.partial-PID. Raise OSError as `check_place` does.
    """
    check_place(path, nbytes)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        check_new(path)
        if path.is_dir():
            path.rmdir()
        os.rename(partial, path)
    except BaseException as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and "requested and" in str(error):  # numpy's: so many values, without the reason
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def check_place(path: Path, nbytes: int = 0) -> None:
    """Make the folders above `path`; raise OSError where something is at it, or nbytes cannot be written there."""
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} cannot be made, as {path.parent} is no folder: name another") from None
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be made, as {path.parent} cannot be written to: name another folder")
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        sizes = f"{path} takes {nbytes / 1e6:.1f} MB, and its disk has {free / 1e6:.1f} MB free"
        raise OSError(f"{sizes}: make room, or name a folder on another disk")


def check_new(path: Path) -> None:
    """Raise FileExistsError when something is at `path` that is no empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} exists already: name another, or remove it")


def write_json(path: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """Write an object as JSON in UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


class SafetensorsFile:
    """Write a safetensors file: `add` takes the tensors of `entries` in their order."""

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, entry in entries.items():
            start, offset = offset, offset + entry.nbytes
            dtype = SAFETENSORS_DTYPES[entry.dtype]
            header[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [start, offset]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, tensor: Tensor) -> None:
        self._file.write(_bytes(tensor))

    def close(self) -> None:
        _close(self._file)


class PickleFile:
    """Write a state dict as torch.save does: `add` takes the tensors of `entries` in their order.

    torch.save itself wants all tensors in memory at once.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._file = path.open("xb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._count = 0
        self._member("data.pkl", _pickle(entries))
        self._member("byteorder", sys.byteorder.encode())

    def add(self, tensor: Tensor) -> None:
        self._member(f"data/{self._count}", _bytes(tensor))
        self._count += 1

    def close(self) -> None:
        self._member("version", b"3\n")
        self._zip.close()
        _close(self._file)

    def _member(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{ARCHIVE}/{name}")
        large = len(data) > zipfile.ZIP64_LIMIT // 2
        start = self._file.tell() + LOCAL_HEADER + len(info.filename) + ZIP64_EXTRA * large
        # An extra field of its own, tagged as torch tags it, fills up to where the mapped storage is aligned.
        padding = -(start + 4) % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as member:
            member.write(data)


class _StorageKey(NamedTuple):
    """Name a storage by its number in the archive, and the tensor that lies in it."""

    key: int
    entry: TensorEntry


class _PickledTensor:
    """Stand for a tensor on its storage, as which it unpickles."""

    def __init__(self, storage: _StorageKey) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.entry.shape
        strides = torch.empty(shape, device="meta").stride()
        hooks: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(shape), strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> tuple[Any, ...] | None:
        if not isinstance(obj, _StorageKey):
            return None
        dtype, size = obj.entry.dtype, torch.Size(obj.entry.shape).numel()
        return "storage", TORCH_STORAGES[dtype], str(obj.key), "cpu", size


def _pickle(entries: Mapping[str, TensorEntry]) -> bytes:
    stream = io.BytesIO()
    state = {name: _PickledTensor(_StorageKey(i, entry)) for i, (name, entry) in enumerate(entries.items())}
    _Pickler(stream, protocol=2).dump(state)
    return stream.getvalue()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _close(file: BinaryIO) -> None:
    """Close a file once it is on the disk, before a rename can say that it is whole."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
