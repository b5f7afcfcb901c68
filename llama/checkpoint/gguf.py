"""GGUF: architecture, tokenizer and weights in one file or a split one; quantized blocks become dense weights."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import Reading, dtype_name
from llama.checkpoint.gguf_config import read_metadata
from llama.checkpoint.gguf_header import Header, TensorInfo, is_gguf, read_header
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType, requantize_exactly
from llama.tokenizer import Tokenizer

__all__ = ["GGUFCheckpoint", "is_gguf"]

# llama.cpp's names of modules, in Meta's.
NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
# ggml types that are torch dtypes; all others are blocks.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Values decoded at once by a thread: their temporaries stay in its cache (docs/benchmarks.md).
DECODED_AT_ONCE = 1 << 18

SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Stored:
    """A tensor's values as they lie in a mapped file: rows of whole blocks of `elements` values in `size` bytes."""

    raw: np.ndarray  # bytes
    shape: tuple[int, ...]
    type_name: str
    elements: int
    size: int


class GGUFCheckpoint:
    """GGUF files of architecture "llama". They are mapped; a tensor's blocks are decoded when it is read."""

    pads_vocab = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, _Stored] = {}
        self._metadata: Mapping[str, Any] = {}
        files = split_files(path)
        for number, file in enumerate(files):
            header = read_header(file)
            if number == 0:
                self._metadata = header.metadata
            _check_split(file, header, number, len(files))
            for name, stored in _map_tensors(file, header).items():
                if name in self._tensors:
                    raise ValueError(f"{file}: tensor {name} is in an earlier file of the split, too")
                self._tensors[name] = stored
        factors = self._tensors.pop(ROPE_FACTORS, None)
        try:
            self.args = read_metadata(
                self._metadata,
                tied="output.weight" not in self._tensors,
                rope_factors=None if factors is None else tuple(_decode(factors, 0, factors.shape[0]).tolist()),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.stop_tokens: frozenset[int] = frozenset()  # the tokenizer in the file knows them
        kinds = {stored.type_name for stored in self._tensors.values() if len(stored.shape) > 1}
        self.is_quantized = not kinds <= DTYPES.keys()
        self.dtype = DTYPES[kinds.pop()] if len(kinds) == 1 and kinds <= DTYPES.keys() else torch.bfloat16

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self._tensors[name]
        stop = stored.shape[dim] if stop is None else stop
        if dim == 0:
            return _decode(stored, start, stop)
        return _decode(stored, 0, stored.shape[0]).narrow(dim, start, stop - start)

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        type_name = self._tensors[name].type_name
        if type_name not in DTYPES:
            return torch.float32, "copy"
        return DTYPES[type_name], "strided" if dim else "zero_copy"

    def stored_as(self, name: str) -> str:
        type_name = self._tensors[name].type_name
        return dtype_name(DTYPES[type_name]) if type_name in DTYPES else type_name

    def block_type(self, name: str) -> BlockType | None:
        stored = self._tensors[name]
        # Q5_0 has no kernels of its own, and its values are also Q8_0's.
        return BLOCK_TYPES.get("Q8_0" if stored.type_name == "Q5_0" else stored.type_name)

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self._tensors[name]
        rows = torch.from_numpy(stored.raw).view(stored.shape[0], -1)
        stop = stored.shape[dim] if stop is None else stop
        if dim == 0:
            rows = rows[start:stop]
        else:
            assert start % stored.elements == stop % stored.elements == 0, (name, start, stop)
            rows = rows[:, start // stored.elements * stored.size : stop // stored.elements * stored.size]
        return requantize_exactly(rows) if stored.type_name == "Q5_0" else rows

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata)


def split_files(path: Path) -> list[Path]:
    """All files of the model that `path` is, or is a part of: name-00001-of-0000N.gguf and so on."""
    split = SPLIT_NAME.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split[3])
    files = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{path} is one of {count} files, but not beside it are {', '.join(missing[:3])}")
    return files


def _check_split(file: Path, header: Header, number: int, count: int) -> None:
    """ValueError unless the file's own metadata agrees with its name."""
    said = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1
    if said != (number, count):
        raise ValueError(
            f"{file} says that it is file {said[0]} of {said[1]}, counted from 0, but stands as {number} of {count}: "
            "files of a split keep their names name-00001-of-0000N.gguf"
        )


def _map_tensors(file: Path, header: Header) -> dict[str, _Stored]:
    """Tensors by Meta's names. ValueError unless types are known, rows whole blocks and all bytes in the file."""
    import gguf

    # Copy-on-write, because torch wants memory that it may write to.
    data = np.memmap(file, mode="c", dtype=np.uint8).view(np.ndarray)
    sizes = {int(code): (code.name, *size) for code, size in gguf.GGML_QUANT_SIZES.items()}
    tensors = {}
    for info in header.tensors.values():
        if info.ggml_type not in sizes:
            raise ValueError(f"{file}: tensor {info.name} has unknown type {info.ggml_type}")
        kind, elements, size = sizes[info.ggml_type]
        if 0 in info.shape or info.shape[-1] % elements:
            raise ValueError(f"{file}: tensor {info.name} of type {kind} has impossible shape {info.shape}")
        stop = info.offset + math.prod(info.shape) // elements * size
        if stop > len(data):
            raise ValueError(
                f"{file} is truncated: tensor {info.name} ends at byte {stop}, the file has {len(data)}: "
                "download it again"
            )
        _check_decodable(file, info, kind, size)
        if _meta_name(info.name) in tensors:
            raise ValueError(f"{file}: tensor {info.name} is there under two names")
        tensors[_meta_name(info.name)] = _Stored(data[info.offset : stop], info.shape, kind, elements, size)
    return tensors


def _check_decodable(file: Path, info: TensorInfo, kind: str, size: int) -> None:
    import gguf

    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        raise ValueError(f"{file}: tensor {info.name} has type {kind}, which cannot be decoded") from None


def _decode(stored: _Stored, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor, dense: in its own dtype, or fp32 where it is blocks."""
    row_bytes = len(stored.raw) // stored.shape[0]
    raw = stored.raw[start * row_bytes : stop * row_bytes]
    shape = (stop - start, *stored.shape[1:])
    if stored.type_name in DTYPES:
        return torch.from_numpy(raw).view(DTYPES[stored.type_name]).view(shape)
    return _decode_blocks(raw, stored.type_name, stored.elements, stored.size).view(shape)


def _decode_blocks(raw: np.ndarray, type_name: str, elements: int, size: int) -> Tensor:
    """fp32 values of consecutive blocks, each of `size` bytes for `elements` values."""
    from gguf import GGMLQuantizationType, dequantize

    n_blocks = len(raw) // size
    values = np.empty((n_blocks, elements), np.float32)  # not torch's: threads are outside a caller's inference mode

    def decode(first: int) -> None:
        # As one long row: the library works through a few rows at a time, which for short rows is slow.
        blocks = raw[first * size : (first + step) * size][None]
        values[first : first + step] = dequantize(blocks, qtype).reshape(-1, elements)

    qtype, step = GGMLQuantizationType[type_name], DECODED_AT_ONCE // elements
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(decode, range(0, n_blocks, step)))
    return torch.from_numpy(values)


def _meta_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attention.wq.weight; a name that is not known stays as it is."""
    layer = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if layer is None or layer[2] not in NAMES:
        return name
    prefix = f"layers.{layer[1]}." if layer[1] else ""
    return f"{prefix}{NAMES[layer[2]]}.{layer[3]}"
