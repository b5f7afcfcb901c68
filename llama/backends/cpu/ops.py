"""The kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cpu.arena import Arena
from llama.backends.cpu.build import library
from llama.backends.cpu.structures import (
    ACTIVATION_IDS,
    BLOCK_TYPE_IDS,
    FEW_TOKENS,
    FLOAT_TYPE_IDS,
    MAX_FEW_TOKENS,
    PACKED_SIZES,
    TILE_ROWS,
    ActivationView,
    Layer,
    LayersInput,
    LowRankView,
    NormView,
    WeightView,
)


@functools.cache
def kernels() -> ctypes.CDLL:
    """Return the compiled kernels, which exist where choose_backend has chosen them."""
    loaded = library()
    assert loaded is not None, "choose_backend chooses the CPU kernels only where they exist"
    return loaded


def set_openmp_threads(threads: int) -> None:
    """Set the number of threads of torch's operations, for the calling thread alone; do nothing without OpenMP."""
    kernels().set_openmp_threads(threads)


def pointers(*buffers: tuple[Tensor, torch.dtype, int]) -> list[c_void_p]:
    """Return the addresses of tensors, each with the dtype and the number of values that a kernel takes it for.

    All memory that C++ reads or writes passes here. A buffer of another dtype than was meant, as one that torch makes
    in the caller's default dtype, would be read or written beyond its end.
    """
    for tensor, dtype, numel in buffers:
        assert tensor.dtype == dtype and tensor.numel() == numel, (tensor.dtype, tensor.shape, dtype, numel)
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), (tensor.device, tensor.stride())
        assert tensor.data_ptr() % dtype.itemsize == 0, (tensor.data_ptr(), dtype)
    return [c_void_p(tensor.data_ptr()) for tensor, _, _ in buffers]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for a kernel to fill, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def float_weight(weight: Tensor) -> WeightView:
    """Describe a contiguous matrix (out, in) of floats, which must outlive the description."""
    return WeightView(
        FLOAT_TYPE_IDS[weight.dtype], *weight.shape, *pointers((weight, weight.dtype, weight.numel())), None
    )


def packed_weight(tiles: Tensor, block_type: str, rows: int, columns: int) -> WeightView:
    """Describe a packed matrix (rows, columns), whose tiles, uint8 (bytes,), must outlive the description."""
    address = pointers((tiles, torch.uint8, packed_bytes(block_type, rows, columns)))
    return WeightView(BLOCK_TYPE_IDS[block_type], rows, columns, *address, None)


def vector(values: Tensor, size: int) -> c_void_p:
    """Return the address of `size` fp32 values, a norm's weight or a bias, which must outlive its use."""
    return pointers((values, torch.float32, size))[0]


def packed_bytes(block_type: str, rows: int, columns: int) -> int:
    """Return the bytes of a packed matrix (rows, columns)."""
    elements, head, codes = PACKED_SIZES[block_type]
    blocks = columns // elements
    return -(-rows // TILE_ROWS) * (-(-blocks * head // 64) * 64 + blocks * codes)


_arena = Arena()


def pack(blocks: Tensor, block_type: str, columns: int) -> Tensor:
    """Pack raw blocks in ggml's layout, uint8 (rows, row_bytes), into the kernels' layout: uint8 (bytes,)."""
    rows = len(blocks)
    tiles = _arena.take(packed_bytes(block_type, rows, columns))
    blocks = blocks.contiguous()
    stored, packed = pointers((blocks, torch.uint8, blocks.numel()), (tiles, torch.uint8, tiles.numel()))
    kernels().pack(BLOCK_TYPE_IDS[block_type], stored, rows, columns, packed, torch.get_num_threads())
    return tiles


def embedding(weight: WeightView, rows: Tensor) -> Tensor:
    """Look up rows of a packed weight by index, int64 of any shape: fp32 (*rows.shape, in)."""
    rows = rows.contiguous()
    n = rows.numel()
    to = new(*rows.shape, weight.columns)
    ids, values = pointers((rows, torch.int64, n), (to, torch.float32, n * weight.columns))
    kernels().embedding(ctypes.byref(weight), ids, n, values, torch.get_num_threads())
    return to


def multiply(weight: WeightView, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply x (..., in) by the weight and add its bias: (..., out) in `dtype`. A token's result is its own (D30)."""
    x = x.contiguous()
    n_tokens = x.numel() // weight.columns
    y = new(*x.shape[:-1], weight.rows, dtype=dtype)
    from_x, to_y = pointers((x, x.dtype, n_tokens * weight.columns), (y, dtype, n_tokens * weight.rows))
    types = FLOAT_TYPE_IDS[x.dtype], FLOAT_TYPE_IDS[dtype]
    kernels().multiply(ctypes.byref(weight), from_x, n_tokens, types[0], to_y, types[1], torch.get_num_threads())
    return y


def multiply_floats(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x (..., in) by floats (out, in) transposed: (..., out) in `dtype`, by default x's; see `multiply`."""
    return multiply(float_weight(weight), x, dtype or x.dtype)


def low_rank(a: Tensor, b: Tensor) -> LowRankView:
    """Describe adapters, a (r, in) and b (out, r); a must outlive the description, which keeps what it needs of b."""
    padded = F.pad(b.float(), (0, 0, 0, -len(b) % TILE_ROWS))
    tiles = padded.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2).contiguous()
    view = LowRankView(float_weight(a), *pointers((tiles, torch.float32, tiles.numel())))
    view.tiles = tiles
    return view


def add_low_rank(adapters: LowRankView, y: Tensor, x: Tensor) -> None:
    """Add x (..., in) times what adapters add to a weight, transposed, to its products y (..., out), in place."""
    x = x.contiguous()
    n_tokens, rows = x.numel() // adapters.a.columns, y.shape[-1]
    assert len(adapters.tiles) == -(-rows // TILE_ROWS), (rows, adapters.tiles.shape)
    from_x, to_y = pointers((x, x.dtype, n_tokens * adapters.a.columns), (y, y.dtype, n_tokens * rows))
    types = FLOAT_TYPE_IDS[x.dtype], FLOAT_TYPE_IDS[y.dtype]
    kernels().add_low_rank(
        ctypes.byref(adapters), rows, from_x, n_tokens, types[0], to_y, types[1], torch.get_num_threads()
    )


@functools.cache
def has_matrix_unit() -> bool:
    """Tell whether `gemm` works here: the processor has a matrix unit for bf16, and lets this process use it."""
    return bool(kernels().has_matrix_unit())


def max_few_tokens() -> int:
    """Return the number of tokens up to which the kernels' pass over a weight beats a matrix product here."""
    return FEW_TOKENS if has_matrix_unit() else MAX_FEW_TOKENS


def gemm(weight: WeightView, x: Tensor) -> Tensor:
    """Multiply x (..., in), fp32 or bf16, by a packed weight on the matrix unit: (..., out) in x's dtype.

    Floats are sums of two bf16 terms there: see D32.
    """
    n_tokens = x.numel() // weight.columns
    x = x.contiguous()
    y = new(*x.shape[:-1], weight.rows, dtype=x.dtype)
    from_x, to_y = pointers((x, x.dtype, n_tokens * weight.columns), (y, x.dtype, n_tokens * weight.rows))
    kernels().gemm(ctypes.byref(weight), from_x, n_tokens, to_y, FLOAT_TYPE_IDS[x.dtype], torch.get_num_threads())
    return y


def run_layers(layers: ctypes.Array[Layer], first: int, stop: int, parts: int, inputs: LayersInput) -> None:
    """Compute layers [first, stop), or parts of each: PROJECTION, ATTENTION and FEED_FORWARD, combined by |."""
    assert inputs.n_tokens <= MAX_FEW_TOKENS, inputs.n_tokens
    kernels().run_layers(layers, first, stop, parts, ctypes.byref(inputs))


def is_within_cache(inputs: LayersInput) -> bool:
    """Tell whether all that layers read and write of the cache, and of the page table, is theirs."""
    return bool(kernels().is_within_cache(ctypes.byref(inputs)))


def fused_add_norm(
    x: Tensor, delta: Tensor | None, of_delta: NormView, of_sum: NormView | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add the norm of delta to x (n, dim), fp32, in place; return the norm of the sum, in `dtype`: (n, dim).

    delta has that dtype. A view of no norm leaves what it is of as it is; where of_sum is None, x is returned.
    """
    n, dim = x.shape
    y = new(n, dim, dtype=dtype) if of_sum is not None else None
    added = pointers((delta, dtype, n * dim))[0] if delta is not None else None
    (residual,) = pointers((x, torch.float32, n * dim))
    result = pointers((y, dtype, n * dim))[0] if y is not None else None
    norms = ctypes.byref(of_delta), ctypes.byref(of_sum) if of_sum is not None else None
    threads = torch.get_num_threads()
    kernels().fused_add_norm(residual, added, *norms, c_float(eps), n, dim, result, FLOAT_TYPE_IDS[dtype], threads)
    return x if y is None else y


def silu_and_mul(gates: Tensor, ups: Tensor) -> Tensor:
    """Compute silu(gates) * ups in place of gates, and return it; both are contiguous, with the same dtype."""
    return activate(ActivationView(), gates, ups)


def activate(activation: ActivationView, values: Tensor, ups: Tensor | None = None) -> Tensor:
    """Compute an activation in place of contiguous values, and return them; SiLU multiplies ups, which others lack."""
    assert (activation.kind == ACTIVATION_IDS["silu"]) == (ups is not None)
    dtype, n = values.dtype, values.numel()
    (to,) = pointers((values, dtype, n))
    other = pointers((ups, dtype, n))[0] if ups is not None else None
    threads = torch.get_num_threads()
    kernels().activate(ctypes.byref(activation), to, other, ctypes.c_size_t(n), FLOAT_TYPE_IDS[dtype], threads)
    return values


def rope_and_append_kv(
    layers: ctypes.Array[Layer], layer: int, inputs: LayersInput, q: Tensor, k: Tensor, v: Tensor
) -> None:
    """Normalise and rotate q in place as a layer does; write k, turned alike, and v to the cache of `inputs`.

    All have the cache's dtype.
    """
    dtype = q.dtype
    assert FLOAT_TYPE_IDS[dtype] == inputs.cache_type, dtype
    n, n_kv = (inputs.n_tokens * heads * inputs.head_dim for heads in (inputs.n_heads, inputs.n_kv_heads))
    three = pointers((q, dtype, n), (k, dtype, n_kv), (v, dtype, n_kv))
    kernels().rope_and_append_kv(layers, layer, ctypes.byref(inputs), *three)


def attend(layers: ctypes.Array[Layer], layer: int, inputs: LayersInput, q: Tensor) -> None:
    """Compute a layer's attention of q (n_tokens, n_heads * head_dim), of the cache's dtype, over the cache, in place.

    A token's result depends neither on the others nor on how its row comes in calls.
    """
    dtype = q.dtype
    assert FLOAT_TYPE_IDS[dtype] == inputs.cache_type, dtype
    (queries,) = pointers((q, dtype, inputs.n_tokens * inputs.n_heads * inputs.head_dim))
    kernels().attend(layers, layer, ctypes.byref(inputs), queries)
