"""Read a GGUF file's header: metadata and where its tensors lie, every length checked before it is believed.

The `gguf` library needs seconds for a vocabulary's arrays, as it makes several objects a string; this needs tenths.
See D10; format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.files import cannot_map, check_content

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ITEMS = 1 << 24  # of an array, above any vocabulary; each costs far more as an object than in the file

# Type codes of metadata values: struct format of the numbers, and the two that have a length of their own.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Describe where a tensor lies.

    shape is as in torch, rows first; ggml_type is a code; offset counts bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Hold a file's metadata by key, its tensors by name, in their order, and what their offsets are multiples of."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins as GGUF does."""
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def read_header(path: Path) -> Header:
    """Read a GGUF file's header; raise ValueError when it is no GGUF file, damaged or truncated."""
    check_content(path, is_binary=True)
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise cannot_map(path, error) from None
    with mapped as data:
        try:
            return _Reader(data).header()
        except _Damaged as error:
            raise ValueError(f"{path} is not a usable GGUF file: {error}") from None


class _Damaged(Exception):
    """Say what is wrong with a file, without its name."""


class _Reader:
    """Read on from a position in the mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def header(self) -> Header:
        if self.take(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise _Damaged("it does not start with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise _Damaged(f"version {version} is not supported, only {VERSIONS} in little-endian order")
        n_tensors, n_values = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = self.string()
            if key in metadata:
                raise _Damaged(f"it has the key {key!r} twice")
            metadata[key] = self.value(self.number("I"), key)
        infos = [self.tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise _Damaged(f"general.alignment must be a multiple of 8, got {alignment!r}")
        start = math.ceil(self.position / alignment) * alignment
        tensors = {info.name: TensorInfo(info.name, info.shape, info.ggml_type, start + info.offset) for info in infos}
        if len(tensors) != len(infos):
            raise _Damaged("two tensors have the same name")
        return Header(metadata, tensors, alignment)

    def tensor_info(self) -> TensorInfo:
        name = self.string()
        n_dims = self.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise _Damaged(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        ggml_type, offset = self.number("I"), self.number("Q")
        return TensorInfo(name, shape, ggml_type, offset)

    def value(self, code: int, key: str) -> Any:
        if code in NUMBERS:
            return self.number(NUMBERS[code])
        if code == STRING:
            return self.string()
        if code != ARRAY:
            raise _Damaged(f"{key!r} has unknown value type {code}")
        item, length = self.number("I"), self.number("Q")
        if length > MAX_ITEMS:
            raise _Damaged(f"{key!r} is an array of {length} items")
        if item in NUMBERS:
            return self.numbers(NUMBERS[item], length)
        if item == STRING:
            return self.strings(length)
        raise _Damaged(f"{key!r} is an array of unknown type {item}")

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def numbers(self, code: str, length: int) -> list[Any]:
        size = struct.calcsize("<" + code)
        self.need(size * length)
        return list(struct.unpack(f"<{length}{code}", self.take(size * length)))

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, length: int) -> list[str]:
        """Read `length` strings, each a 64-bit byte count and UTF-8; this loop is what a vocabulary costs."""
        self.need(8 * length)
        data, position, end = self.data, self.position, len(self.data)
        size_at = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(length):
            if position + 8 > end:
                raise _Damaged("it ends within a string")
            start = position + 8
            position = start + size_at(data, position)[0]
            if position > end:
                raise _Damaged(f"a string of {position - start} bytes passes the end of the file")
            strings.append(data[start:position])
        self.position = position
        # Some vocabularies hold broken UTF-8; a replacement character is a token that text never matches.
        return [string.decode("utf-8", errors="replace") for string in strings]

    def take(self, size: int) -> bytes:
        self.need(size)
        self.position += size
        return self.data[self.position - size : self.position]

    def need(self, size: int) -> None:
        if size > len(self.data) - self.position:
            needed = self.position + size
            raise _Damaged(f"it is truncated: {len(self.data)} bytes, {needed} or more needed: download it again")
