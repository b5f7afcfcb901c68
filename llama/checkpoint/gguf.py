"""GGUF: one file with the architecture, the tokenizer and blocks of quantized weights, here turned into dense ones."""

from __future__ import annotations

import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.gguf_header import TensorInfo, is_gguf, read_header
from llama.config import ModelArgs
from llama.tokenizer import Tokenizer

__all__ = ["GGUFCheckpoint", "is_gguf"]

# llama.cpp's names of tensors, in Meta's.
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
# ggml types that are torch dtypes; all others are blocks.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Values decoded at once by a thread: their temporaries stay in its cache (4 times faster than by rows of 576).
DECODED_AT_ONCE = 1 << 18


class GGUFCheckpoint:
    """A GGUF file of architecture "llama". The file is mapped; a tensor's blocks are decoded when it is read."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        header = read_header(path)
        self._metadata = header.metadata
        self._tensors = {_meta_name(name): info for name, info in header.tensors.items()}
        self._types = {int(code): code.name for code in gguf.GGMLQuantizationType}
        self._block_sizes = {code.name: sizes for code, sizes in gguf.GGML_QUANT_SIZES.items()}
        # Copy-on-write, because torch wants memory that it may write to.
        self._data = np.memmap(path, mode="c", dtype=np.uint8).view(np.ndarray)
        for info in self._tensors.values():
            self._check_place(info)
        self._check_types()
        self.args = self._read_args()
        kinds = {self._types[info.ggml_type] for info in self._tensors.values() if len(info.shape) > 1}
        self.dtype = DTYPES[kinds.pop()] if len(kinds) == 1 and kinds <= DTYPES.keys() else torch.bfloat16

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        info = self._tensors[name]
        stop = info.shape[dim] if stop is None else stop
        rows = (start, stop) if dim == 0 else (0, info.shape[0])
        part = self._decode(info, *rows)
        return part if dim == 0 else part.narrow(dim, start, stop - start)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._metadata)

    def _decode(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, dense: in its own dtype, or fp32 where it is blocks."""
        row_bytes = self._nbytes(info) // info.shape[0]
        raw = self._data[info.offset + start * row_bytes : info.offset + stop * row_bytes]
        shape = (stop - start, *info.shape[1:])
        kind = self._types[info.ggml_type]
        if kind in DTYPES:
            return torch.from_numpy(raw).view(DTYPES[kind]).view(shape)
        return _decode_blocks(raw, info.ggml_type, *self._block_sizes[kind]).view(shape)

    def _nbytes(self, info: TensorInfo) -> int:
        elements, size = self._block_sizes[self._types[info.ggml_type]]
        return math.prod(info.shape) // elements * size

    def _check_place(self, info: TensorInfo) -> None:
        """ValueError unless the tensor's type is known, its rows are whole blocks and its bytes are in the file."""
        if info.ggml_type not in self._types:
            raise ValueError(f"{self.path}: tensor {info.name} has unknown type {info.ggml_type}")
        kind = self._types[info.ggml_type]
        if 0 in info.shape or info.shape[-1] % self._block_sizes[kind][0]:
            raise ValueError(f"{self.path}: tensor {info.name} of type {kind} has impossible shape {info.shape}")
        stop = info.offset + self._nbytes(info)
        if stop > len(self._data):
            raise ValueError(
                f"{self.path} is truncated: tensor {info.name} ends at byte {stop}, the file has {len(self._data)}: "
                "download it again"
            )

    def _check_types(self) -> None:
        """ValueError unless every tensor is of a type that can be turned into dense weights."""
        for info in {info.ggml_type: info for info in self._tensors.values()}.values():
            kind = self._types[info.ggml_type]
            try:
                _decode_blocks(np.zeros(self._block_sizes[kind][1], np.uint8), info.ggml_type, *self._block_sizes[kind])
            except NotImplementedError:
                raise ValueError(f"{self.path}: tensor {info.name} has type {kind}, which is not supported") from None

    def _read_args(self) -> ModelArgs:
        architecture = self._get("general.architecture", str)
        if architecture != "llama":
            raise ValueError(f"{self.path} holds architecture {architecture!r}: only 'llama' is supported")
        if self._metadata.get("llama.expert_count", 0):
            raise ValueError(f"{self.path} holds a mixture of experts: only dense LLaMA models are supported")
        scaling = self._metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{self.path} uses RoPE scaling {scaling!r}, which is not supported in GGUF files")
        dim, n_heads = self._get("llama.embedding_length", int), self._get("llama.attention.head_count", int)
        vocab = self._metadata.get("tokenizer.ggml.tokens")
        head_dim = self._metadata.get("llama.attention.key_length")
        rotated = self._metadata.get("llama.rope.dimension_count")
        try:
            args = ModelArgs(
                dim=dim,
                n_layers=self._get("llama.block_count", int),
                n_heads=n_heads,
                n_kv_heads=self._metadata.get("llama.attention.head_count_kv"),  # type: ignore[arg-type]
                vocab_size=len(vocab) if isinstance(vocab, list) and vocab else -1,
                norm_eps=self._get("llama.attention.layer_norm_rms_epsilon", float),
                rope_theta=self._metadata.get("llama.rope.freq_base", 10000.0),
                head_dim=head_dim,  # type: ignore[arg-type]
                hidden_dim=self._get("llama.feed_forward_length", int),
                tied_embeddings="output.weight" not in self._tensors,
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if rotated not in (None, args.head_dim):
            raise ValueError(f"{self.path} rotates {rotated} of {args.head_dim} dimensions of a head: not supported")
        return args

    def _get(self, key: str, type_: type) -> Any:
        value = self._metadata.get(key)
        if type(value) is not type_:
            found = "nothing" if value is None else repr(value)
            raise ValueError(f"{self.path}: {key} must be of type {type_.__name__}, found {found}")
        return value


def _decode_blocks(raw: np.ndarray, ggml_type: int, elements: int, size: int) -> Tensor:
    """fp32 values of consecutive blocks, each of `size` bytes for `elements` values."""
    from gguf import GGMLQuantizationType, dequantize

    n_blocks = len(raw) // size
    values = np.empty((n_blocks, elements), np.float32)  # not torch's: threads are outside a caller's inference mode

    def decode(first: int) -> None:
        # As one long row: the library works through a few rows at a time, which for short rows is slow.
        blocks = raw[first * size : (first + step) * size][None]
        values[first : first + step] = dequantize(blocks, qtype).reshape(-1, elements)

    qtype, step = GGMLQuantizationType(ggml_type), DECODED_AT_ONCE // elements
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(decode, range(0, n_blocks, step)))
    return torch.from_numpy(values)


def _meta_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.attention.wq.weight; a name that is not known stays as it is."""
    parts = name.split(".")
    layer = f"layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
    base = parts[-2] if len(parts) > 1 else ""
    known = base in NAMES and parts[-1] == "weight" and (layer or len(parts) == 2)
    return f"{layer}{NAMES[base]}.weight" if known else name
