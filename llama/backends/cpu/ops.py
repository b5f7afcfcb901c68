"""The kernels as functions of tensors. Structures here mirror those of csrc/*.h, field by field."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from llama.backends.cpu.build import library

# Most tokens that one pass over the weights serves, as in csrc/layers.h; for more, matrix products are faster: see D32.
MAX_GEMV_TOKENS = 16
TILE_ROWS = 16  # rows of packed blocks that are stored together: see D31

# Halves of a layer, for `run_layers`.
ATTENTION, FEED_FORWARD = 1, 2

FLOAT_TYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_TYPE_IDS = {"Q8_0": 3, "Q4_0": 4, "Q4_1": 5, "Q4_K": 6, "Q6_K": 7}
# Values of a block, and the bytes of the heads and of the codes of 16 rows of one block each (weights.h).
PACKED_SIZES = {"Q8_0": (32, 32, 512), "Q4_0": (32, 32, 256), "Q4_1": (32, 64, 256), "Q4_K": (256, 320, 2048)}
PACKED_SIZES["Q6_K"] = (256, 288, 3072)


class WeightView(ctypes.Structure):
    """WeightView in weights.h: a matrix (rows, columns) and its bias, or null."""

    _fields_ = [
        ("type", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("data", c_void_p),
        ("bias", c_void_p),
    ]


class Layer(ctypes.Structure):
    """Layer in layers.h."""

    _fields_ = [
        *((name, WeightView) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
    ]


class LayersInput(ctypes.Structure):
    """LayersInput in layers.h: what layers read and write beside their weights."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in ("n_tokens", "seqlen", "dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "cache_type")
        ),
        ("window", c_int64),
        *((name, c_void_p) for name in ("positions", "rotation", "keys", "values")),
        ("layer_stride", c_int64),
        ("row_stride", c_int64),
        ("x", c_void_p),
        ("out", c_void_p),
        ("eps", c_float),
        ("threads", c_int32),
    ]


@functools.cache
def kernels() -> ctypes.CDLL:
    """Return the compiled kernels, which exist where choose_backend has chosen them."""
    loaded = library()
    assert loaded is not None, "choose_backend chooses the CPU kernels only where they exist"
    return loaded


def set_openmp_threads(threads: int) -> None:
    """Set the number of threads of the kernels and of torch's operations, for the calling thread alone."""
    kernels().omp_set_num_threads(threads)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's operations done by the calling thread alone: for so little work that others come too late."""
    threads = torch.get_num_threads()
    set_openmp_threads(1)
    try:
        yield
    finally:
        set_openmp_threads(threads)


def float_weight(weight: Tensor) -> WeightView:
    """Describe a contiguous matrix (out, in) of floats, which must outlive the description."""
    assert weight.is_contiguous() and weight.device.type == "cpu"
    return WeightView(FLOAT_TYPE_IDS[weight.dtype], *weight.shape, weight.data_ptr(), None)


def packed_bytes(block_type: str, rows: int, columns: int) -> int:
    """Return the bytes of a packed matrix (rows, columns)."""
    elements, head, codes = PACKED_SIZES[block_type]
    blocks = columns // elements
    return -(-rows // TILE_ROWS) * (-(-blocks * head // 64) * 64 + blocks * codes)


def pack(blocks: Tensor, block_type: str, columns: int) -> Tensor:
    """Pack raw blocks in ggml's layout, uint8 (rows, row_bytes), into the kernels' layout: uint8 (bytes,)."""
    rows = len(blocks)
    tiles = torch.empty(packed_bytes(block_type, rows, columns), dtype=torch.uint8)
    blocks = blocks.contiguous()
    kernels().pack(
        BLOCK_TYPE_IDS[block_type],
        c_void_p(blocks.data_ptr()),
        rows,
        columns,
        c_void_p(tiles.data_ptr()),
        torch.get_num_threads(),
    )
    return tiles


def unpack(weight: WeightView, first: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Dequantize rows [first, stop) of a packed weight to the columns of a matrix (in, stop - first)."""
    assert first % TILE_ROWS == 0
    to = torch.empty(weight.columns, stop - first, dtype=dtype)
    threads = torch.get_num_threads()
    kernels().unpack(ctypes.byref(weight), first, stop - first, c_void_p(to.data_ptr()), FLOAT_TYPE_IDS[dtype], threads)
    return to


def embedding(weight: WeightView, rows: Tensor) -> Tensor:
    """Look up rows of a packed weight by index, int64 of any shape: fp32 (*rows.shape, in)."""
    rows = rows.contiguous()
    to = torch.empty(*rows.shape, weight.columns)
    kernels().embedding(
        ctypes.byref(weight),
        c_void_p(rows.data_ptr()),
        rows.numel(),
        c_void_p(to.data_ptr()),
        torch.get_num_threads(),
    )
    return to


def is_gemv(x: Tensor) -> bool:
    """Tell whether x (..., in) has so few tokens that one pass over the weights serves them all."""
    return x.numel() <= MAX_GEMV_TOKENS * x.shape[-1]


def gemv(weight: WeightView, x: Tensor) -> Tensor:
    """Multiply x (..., in), at most MAX_GEMV_TOKENS tokens, by the weight and add its bias: fp32 (..., out)."""
    x = x.float().contiguous()
    n_tokens = x.numel() // weight.columns
    assert n_tokens <= MAX_GEMV_TOKENS, n_tokens
    y = torch.empty(*x.shape[:-1], weight.rows)
    kernels().gemv(
        ctypes.byref(weight), c_void_p(x.data_ptr()), n_tokens, c_void_p(y.data_ptr()), torch.get_num_threads()
    )
    return y


@functools.cache
def has_matrix_unit() -> bool:
    """Tell whether `gemm` works here: the processor has a matrix unit for bf16, and lets this process use it."""
    return bool(kernels().has_matrix_unit())


def gemm(weight: WeightView, x: Tensor) -> Tensor:
    """Multiply x (..., in), bf16, by a packed weight on the matrix unit: bf16 (..., out)."""
    n_tokens = x.numel() // weight.columns
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], weight.rows, dtype=torch.bfloat16)
    kernels().gemm(
        ctypes.byref(weight), c_void_p(x.data_ptr()), n_tokens, c_void_p(y.data_ptr()), torch.get_num_threads()
    )
    return y


def run_layers(layers: ctypes.Array[Layer], first: int, stop: int, halves: int, inputs: LayersInput) -> None:
    """Compute layers [first, stop), or a half of each: ATTENTION, FEED_FORWARD, or both, combined by |."""
    assert inputs.n_tokens <= MAX_GEMV_TOKENS, inputs.n_tokens
    kernels().run_layers(layers, first, stop, halves, ctypes.byref(inputs))


def fused_add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add delta to x (n, dim), fp32, in place; return its RMSNorm with weight (dim,), fp32, in `dtype`: (n, dim).

    Without a weight nothing is normalised, and x is returned.
    """
    y = torch.empty(x.shape, dtype=dtype) if weight is not None else x
    kernels().fused_add_rms_norm(
        c_void_p(x.data_ptr()),
        c_void_p(delta.data_ptr() if delta is not None else None),
        c_void_p(weight.data_ptr() if weight is not None else None),
        c_float(eps),
        *x.shape,
        c_void_p(y.data_ptr() if weight is not None else None),
        FLOAT_TYPE_IDS[dtype],
        torch.get_num_threads(),
    )
    return y


def silu_and_mul(gates: Tensor, ups: Tensor) -> Tensor:
    """Compute silu(gates) * ups in place of gates, and return it; both are contiguous, with the same dtype."""
    n = ctypes.c_size_t(gates.numel())
    threads = torch.get_num_threads()
    kernels().silu_and_mul(
        c_void_p(gates.data_ptr()), c_void_p(ups.data_ptr()), n, FLOAT_TYPE_IDS[gates.dtype], threads
    )
    return gates


def rope_and_append_kv(inputs: LayersInput, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Rotate q in place; write k, rotated, and v to the cache that `inputs` points at. All have the cache's dtype."""
    kernels().rope_and_append_kv(
        ctypes.byref(inputs), layer, c_void_p(q.data_ptr()), c_void_p(k.data_ptr()), c_void_p(v.data_ptr())
    )
