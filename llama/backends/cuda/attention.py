"""Attention over the cache's pages on a GPU: one kernel for few tokens and for a prompt, which reads what is used.

Rows of a tile are (token, head) pairs of the query heads that share a KV head: a key that is read serves all of them.
Lengths are read on the device: nothing here waits for it, and a CUDA graph of a step holds at every length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.backends.cuda.available import OLDEST
from llama.backends.cuda.dequantize import INTERPRETED
from llama.cache import PAGE_SIZE
from llama.config import Sight
from llama.quantization.planar import MAX_GEMV_TOKENS

# Programs that a launch aims at: two for each of the 108 to 132 multiprocessors of an A100 or H100.
PROGRAMS = 256
MOST_SPLITS = 64  # what a program of `_combine` holds at once
PAGE = tl.constexpr(PAGE_SIZE)


@dataclass(frozen=True)
class AttentionTile:
    """What a program holds at once, rows of queries and a block of keys, and how Triton compiles it."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the most of head_dim. `stages - 1` blocks of keys and as many of values lie in shared memory: under 80 KB for few
# tokens, so that two programs fit a multiprocessor of an A100, and under 130 KB for a prompt on an H100. Compiled for
# sm_80 and sm_90, larger tiles spill registers.
# 32 rows are eight tokens of four heads, and too few for wgmma: each row is multiplied as it would be alone.
FEW_TILES = {128: AttentionTile(32, 64, 4, 3), 256: AttentionTile(32, 32, 4, 3)}
MANY_TOKEN_TILES = {128: AttentionTile(128, 64, 8, 3), 256: AttentionTile(64, 32, 8, 3)}
AMPERE_TILES = {128: AttentionTile(128, 32, 8, 3), 256: AttentionTile(64, 32, 8, 3)}  # mma takes keys from registers
# Without tensor cores a whole product lives in registers.
FEW_FP32_TILES = {128: AttentionTile(16, 32, 4, 2), 256: AttentionTile(16, 16, 4, 2)}
FP32_TILES = {128: AttentionTile(32, 16, 4, 2), 256: AttentionTile(16, 16, 4, 2)}


def attention_tile(dtype: torch.dtype, head_dim: int, group: int, seqlen: int, capability: int) -> AttentionTile:
    """Return the tile of `seqlen` tokens with `group` query heads a KV head: the same up to MAX_GEMV_TOKENS tokens."""
    size = 128 if head_dim <= 128 else 256
    if seqlen > MAX_GEMV_TOKENS:
        if dtype == torch.float32:
            return FP32_TILES[size]
        return (MANY_TOKEN_TILES if capability >= 90 else AMPERE_TILES)[size]
    tile = (FEW_FP32_TILES if dtype == torch.float32 else FEW_TILES)[size]
    return replace(tile, rows=min(tile.rows, _padded(MAX_GEMV_TOKENS * group)))


def n_splits(programs: int, max_seq_len: int, keys: int) -> int:
    """Programs that share the blocks of one sequence: enough for all multiprocessors, and each with a block or more."""
    return max(1, min(-(-PROGRAMS // programs), -(-max_seq_len // keys), MOST_SPLITS))


def flash_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    start_pos: Tensor,
    sight: Sight,
    out: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over a layer's cache, in which the queries' own keys are written already.

    q: (rows, seqlen, n_heads, head_dim), and so is the result, which is written to `out` where there is one,
    contiguous; head_dim is at most 256.
    keys, values: (n_pages, PAGE_SIZE, n_kv_heads, head_dim), contiguous.
    page_table: (rows, pages), int32, contiguous: each row's pages in order; what lies beyond its length is not read.
    start_pos: (rows,), int64, position of each row's first query; sight: which positions up to its own a query sees.

    Which blocks a program sums follows from the shape of the page table, not from lengths nor from which pages it
    names: of up to MAX_GEMV_TOKENS tokens each gets the same bits as alone. A row without a token, at start_pos 0, gets
    something finite.
    """
    bsz, seqlen, n_heads, head_dim = q.shape
    n_kv_heads = keys.shape[2]
    max_seq_len = page_table.shape[1] * PAGE_SIZE
    group, padded_dim = n_heads // n_kv_heads, _padded(head_dim)
    assert keys.shape == values.shape and keys.shape[1] == PAGE_SIZE and keys.is_contiguous() and values.is_contiguous()
    assert page_table.dtype == torch.int32 and page_table.is_contiguous() and len(page_table) == len(start_pos) == bsz
    assert start_pos.dtype == torch.int64 and start_pos.is_contiguous(), start_pos.stride()
    assert group * n_kv_heads == n_heads and padded_dim <= 256, (q.shape, keys.shape)
    q = q.contiguous()
    tile = attention_tile(keys.dtype, head_dim, group, seqlen, _capability(q.device))
    n_tiles = -(-seqlen * group // tile.rows)
    programs = bsz * n_kv_heads * (1 if seqlen <= MAX_GEMV_TOKENS else n_tiles)
    splits = n_splits(programs, max_seq_len, tile.keys)
    out = torch.empty_like(q) if out is None else out
    assert out.shape == q.shape and out.is_contiguous(), (out.shape, out.stride())
    # Of each (query head, split): the sum of weighted values; the scores' maximum and the sum of weights.
    partial = q.new_empty((bsz * seqlen * n_heads, splits, head_dim) if splits > 1 else (0,), dtype=torch.float32)
    weights = q.new_empty((bsz * seqlen * n_heads, splits, 2) if splits > 1 else (0,), dtype=torch.float32)
    _attend[(n_tiles, splits, bsz * n_kv_heads)](
        q,
        keys,
        values,
        page_table,
        start_pos,
        out,
        partial,
        weights,
        seqlen,
        max_seq_len,
        sight.window or 0,
        sight.chunk or 0,
        # Constants, so that Triton sees how far places are aligned: of head_dim 100, to 4 values.
        N_KV_HEADS=n_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=padded_dim,
        WINDOW=sight.window is not None,
        CHUNK=sight.chunk is not None,
        SPLIT=splits > 1,
        WHOLE=seqlen > MAX_GEMV_TOKENS and sight == Sight(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _combine[(bsz * seqlen * n_heads,)](
            partial,
            weights,
            out,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_S=MOST_SPLITS,  # not as many as there are: the order of additions is the same in every cache
            BLOCK_D=padded_dim,
            num_warps=4,
        )
    return out


@functools.cache
def _capability(device: torch.device) -> int:
    """90 of an H100; of a CPU, where Triton's interpreter runs the kernels, any."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST
    return 10 * major + minor


def _padded(n: int) -> int:
    """The power of two that holds n, and the least that tensor cores multiply."""
    return max(16, triton.next_power_of_2(n))


# Not specialized: for another number of tokens, or another first row, the same code runs, and rounds the same.
@triton.jit(
    do_not_specialize=["seqlen", "max_seq_len", "window", "chunk"],
    do_not_specialize_on_alignment=["table_ptr", "start_pos_ptr"],
)
def _attend(
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start_pos_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    seqlen: tl.tensor,
    max_seq_len: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """BLOCK_M (token, head) pairs of a row and KV head meet every n_splits-th block of BLOCK_N keys that they see.

    The grid is (tiles of pairs, n_splits, bsz * N_KV_HEADS). q, out: (bsz, seqlen, N_KV_HEADS * GROUP, HEAD_DIM).
    keys, values: (n_pages, PAGE, N_KV_HEADS, HEAD_DIM); table: (bsz, max_seq_len / PAGE).
    SPLIT: to partial (bsz * seqlen * n_heads, n_splits, HEAD_DIM) and weights (..., 2) instead of out.
    WHOLE: blocks that all pairs see whole are not masked. Blocks begin at multiples of BLOCK_N whatever is asked.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    row, kv_head = tl.program_id(2) // N_KV_HEADS, tl.program_id(2) % N_KV_HEADS
    # The last tile sees the most keys: it begins first.
    first_pair = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    pairs = first_pair + tl.arange(0, BLOCK_M)
    tokens = pairs // GROUP
    start_pos = tl.load(start_pos_ptr + row).to(tl.int32)
    positions = start_pos + tokens

    d = tl.arange(0, BLOCK_D)
    exists = (tokens < seqlen)[:, None] & (d < HEAD_DIM)[None, :]
    # Where the pairs are among the (bsz * seqlen * n_heads) rows of q.
    queries = row.to(tl.int64) * seqlen * (N_KV_HEADS * GROUP)
    queries += tokens * (N_KV_HEADS * GROUP) + kv_head * GROUP + pairs % GROUP
    q = tl.load(q_ptr + queries[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0)
    q = q.to(keys_ptr.dtype.element_ty)

    # From the first key that the first token sees to the last of the last one; never outside the row.
    first_pos = start_pos + first_pair // GROUP
    last_token = tl.minimum((first_pair + BLOCK_M - 1) // GROUP, seqlen - 1)
    stop = tl.minimum(start_pos + last_token + 1, max_seq_len)
    at = split * BLOCK_N
    if WINDOW or CHUNK:
        seen = _first_seen(first_pos, window, chunk, WINDOW, CHUNK) // BLOCK_N
        at = (seen + (split + splits - seen % splits) % splits) * BLOCK_N
    step = splits * BLOCK_N

    table_ptr += row.to(tl.int64) * (max_seq_len // PAGE)
    keys_ptr += kv_head * HEAD_DIM
    values_ptr += kv_head * HEAD_DIM
    STRIDE: tl.constexpr = N_KV_HEADS * HEAD_DIM
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # A block's pages are looked up while the block before it is read: else keys would wait for them.
    slots = _slots(table_ptr, at, stop, BLOCK_N)
    if WHOLE:
        whole = tl.minimum(first_pos + 1, max_seq_len) // BLOCK_N * BLOCK_N
        for key in range(at, whole, step):
            next_slots = _slots(table_ptr, key + step, stop, BLOCK_N)
            scores, v = _meet(q, keys_ptr, values_ptr, slots, key, stop, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, False)
            acc, highest, total = _add(acc, highest, total, scores, v)
            slots = next_slots
        at += tl.cdiv(tl.maximum(whole - at, 0), step) * step
    for key in range(at, stop, step):
        next_slots = _slots(table_ptr, key + step, stop, BLOCK_N)
        scores, v = _meet(q, keys_ptr, values_ptr, slots, key, stop, STRIDE, HEAD_DIM, BLOCK_N, BLOCK_D, True)
        slots = next_slots
        key_positions = key + tl.arange(0, BLOCK_N)[None, :]
        sees = key_positions <= positions[:, None]
        if WINDOW or CHUNK:
            sees &= key_positions >= _first_seen(positions, window, chunk, WINDOW, CHUNK)[:, None]
        scores = tl.where(sees, scores, float("-inf"))
        acc, highest, total = _add(acc, highest, total, scores, v)

    if SPLIT:
        place = queries * splits + split
        tl.store(weights_ptr + place * 2, highest, mask=tokens < seqlen)
        tl.store(weights_ptr + place * 2 + 1, total, mask=tokens < seqlen)
        # Nothing is stored of what saw no key; _combine reads nothing of it.
        tl.store(partial_ptr + place[:, None] * HEAD_DIM + d[None, :], acc, mask=exists & (total > 0)[:, None])
    else:
        acc = acc / total[:, None]
        tl.store(out_ptr + queries[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _first_seen(
    position: tl.tensor, window: tl.tensor, chunk: tl.tensor, WINDOW: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """The first position that a query at `position` sees, by its window, by its chunk, or by both."""
    if WINDOW and CHUNK:
        first = tl.maximum(position - window + 1, position // chunk * chunk)
    elif CHUNK:
        first = position // chunk * chunk
    else:
        first = position - window + 1
    return tl.maximum(first, 0)


@triton.jit
def _slots(table_ptr: tl.tensor, first: tl.tensor, stop: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The slots of BLOCK_N positions from `first` on, (BLOCK_N,), by a row's page table; any from `stop` on."""
    # One load of each page, without a mask: of other forms ptxas spills registers in fp32 on sm_90.
    at = tl.minimum(first // PAGE + tl.arange(0, BLOCK_N // PAGE), (stop - 1) // PAGE)
    pages = tl.broadcast_to(tl.load(table_ptr + at)[:, None], (BLOCK_N // PAGE, PAGE))
    return tl.reshape(pages, (BLOCK_N,)).to(tl.int64) * PAGE + tl.arange(0, BLOCK_N) % PAGE


@triton.jit
def _meet(
    q: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    slots: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """Scores of the keys in slots, as powers of two, and the values: BLOCK_N positions from `first` on.

    STRIDE: values of a slot. LAST: keys from `stop` on are zeros.
    """
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # A head_dim that is a power of two needs no mask of its own.
    exists = (d < HEAD_DIM)[None, :]
    if LAST:
        exists = exists & (n < stop - first)[:, None]
    offsets = slots[:, None] * STRIDE + d[None, :]
    k = tl.load(keys_ptr + offsets, mask=exists, other=0.0)
    v = tl.load(values_ptr + offsets, mask=exists, other=0.0)
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5  # log2(e): exp2 is what the hardware has
    if INTERPRETED:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE, v


@triton.jit
def _add(acc: tl.tensor, highest: tl.tensor, total: tl.tensor, scores: tl.tensor, v: tl.tensor) -> tl.tensor:
    """The softmax so far, and a block more of it; a block of which nothing is seen changes no bit."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf is no number
    shrink = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    if INTERPRETED:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One query head's parts (splits, HEAD_DIM) and their weights (splits, 2) to its row of out (rows, HEAD_DIM)."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place = row * splits + s
    highest = tl.load(weights_ptr + place * 2, mask=s < splits, other=float("-inf"))
    total = tl.load(weights_ptr + place * 2 + 1, mask=s < splits, other=0.0)
    exists = (total > 0)[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(partial_ptr + place[:, None] * HEAD_DIM + d[None, :], mask=exists, other=0.0)
    weights = tl.exp2(highest - tl.max(highest, 0))
    y = tl.sum(parts * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out_ptr + row * HEAD_DIM + d, y.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
