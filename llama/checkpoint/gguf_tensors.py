"""Tensors of a GGUF file as they lie in it, mapped, and their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES
from llama.checkpoint.gguf_header import Header, TensorInfo
from llama.files import cannot_map
from llama.quantization.gguf_blocks import BlockType

F32 = BlockType("F32", 1, 4)

# Values decoded or encoded at once by a thread, whose temporaries stay in its cache: see D10.
CONVERTED_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class StoredTensor:
    """Describe a tensor as it lies in a mapped file: rows of whole blocks; floats are blocks of one value."""

    raw: np.ndarray  # bytes
    shape: tuple[int, ...]
    type: BlockType

    def __getitem__(self, rows: slice | int) -> StoredTensor:
        """Return rows, or what one of the first dimension holds."""
        if isinstance(rows, int):
            one = self[rows : rows + 1]
            return StoredTensor(one.raw, self.shape[1:], self.type)
        n_rows = len(range(*rows.indices(self.shape[0])))
        size = len(self.raw) // self.shape[0]
        raw = self.raw.reshape(self.shape[0], size)[rows].reshape(-1)
        return StoredTensor(raw, (n_rows, *self.shape[1:]), self.type)

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype, or None where the values are quantized."""
        return WEIGHT_DTYPES.get(self.type.name)


def floats_of(values: np.ndarray, shape: tuple[int, ...]) -> StoredTensor:
    """Return fp32 values as a tensor that a file might have."""
    return StoredTensor(values.view(np.uint8), shape, F32)


def map_tensors(file: Path, header: Header) -> dict[str, StoredTensor]:
    """Map a file's tensors, by the names they have there.

    Raise ValueError unless their types are known, their rows whole blocks, all their bytes in the file and each where
    the one before it ends, as llama.cpp has it: an offset that is wrong would give other weights.
    """
    import gguf

    # Copy-on-write, because torch wants memory that it may write to.
    try:
        data = np.memmap(file, mode="c", dtype=np.uint8).view(np.ndarray)
    except OSError as error:
        raise cannot_map(file, error) from None
    types = {int(code): BlockType(code.name, *sizes) for code, sizes in gguf.GGML_QUANT_SIZES.items()}
    tensors: dict[str, StoredTensor] = {}
    end: int | None = None
    for info in header.tensors.values():
        if info.ggml_type not in types:
            raise ValueError(f"{file}: tensor {info.name} has unknown type {info.ggml_type}")
        block_type = types[info.ggml_type]
        if 0 in info.shape or info.shape[-1] % block_type.elements:
            raise ValueError(f"{file}: tensor {info.name} of type {block_type.name} has impossible shape {info.shape}")
        if len(info.shape) == 1 and block_type.name not in WEIGHT_DTYPES:
            raise ValueError(f"{file}: {info.name} has blocks of type {block_type.name}, as only matrices may")
        if end is not None and info.offset != math.ceil(end / header.alignment) * header.alignment:
            raise ValueError(
                f"{file} is damaged: tensor {info.name} lies at byte {info.offset}, not after the one before"
            )
        end = stop = info.offset + math.prod(info.shape) // block_type.elements * block_type.size
        if stop > len(data):
            raise ValueError(
                f"{file} is truncated: tensor {info.name} ends at byte {stop}, the file has {len(data)}: "
                "download it again"
            )
        _check_decodable(file, info, block_type)
        tensors[info.name] = StoredTensor(data[info.offset : stop], info.shape, block_type)
    return tensors


def _check_decodable(file: Path, info: TensorInfo, block_type: BlockType) -> None:
    """Raise ValueError for a type that the `gguf` library cannot decode."""
    import gguf

    try:
        gguf.dequantize(np.zeros((1, block_type.size), np.uint8), gguf.GGMLQuantizationType[block_type.name])
    except NotImplementedError:
        raise ValueError(f"{file}: tensor {info.name} has type {block_type.name}, which cannot be decoded") from None


def decode_rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of a tensor: in its own dtype, or fp32 where it is blocks."""
    row_bytes = len(tensor.raw) // tensor.shape[0]
    raw = tensor.raw[start * row_bytes : stop * row_bytes]
    values = _decode_blocks(raw, tensor.type) if tensor.dtype is None else torch.from_numpy(raw).view(tensor.dtype)
    return values.view(stop - start, *tensor.shape[1:])


def _decode_blocks(raw: np.ndarray, block_type: BlockType) -> Tensor:
    """Return the fp32 values (n_blocks, elements) of consecutive blocks."""
    from gguf import GGMLQuantizationType, dequantize

    qtype = GGMLQuantizationType[block_type.name]
    blocks = raw.reshape(-1, block_type.size)
    # Not torch's: threads are outside a caller's inference mode.
    values = np.empty((len(blocks), block_type.elements), np.float32)
    # As one long row: the library works through a few rows at a time, which for short rows is slow.
    convert_rows(blocks, values, block_type.elements, lambda rows: dequantize(rows.reshape(1, -1), qtype))
    return torch.from_numpy(values)


def convert_rows(rows: np.ndarray, out: np.ndarray, elements: int, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """Convert rows of `elements` values to rows of `out` on all threads, CONVERTED_AT_ONCE values at a time."""
    step = CONVERTED_AT_ONCE // elements

    def work(first: int) -> None:
        out[first : first + step] = convert(rows[first : first + step]).reshape(-1, out.shape[1])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(0, len(rows), step)))
