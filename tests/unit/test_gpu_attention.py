"""Attention kernels see what a mask of positions lets through, and give a token the same bits in any step of few."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama import attention as reference
from tests.gpu_compile import CAPABILITIES, Ahead, compiled_kernels

pytest.importorskip("triton", reason="GPU kernels are written in Triton")
from llama.backends.cuda import attention
from llama.backends.cuda.attention import attention_tile, flash_attention, n_splits
from llama.cache import PAGE_SIZE, pages_for
from llama.config import Sight
from llama.quantization.planar import MAX_GEMV_TOKENS

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
N_KV_HEADS = 2
ALL = Sight()
NO_PAGE = 1 << 30  # reading it would end the process


def random_step(
    bsz: int, seqlen: int, group: int, head_dim: int, max_seq_len: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of each row in the order of positions."""
    generator = torch.Generator().manual_seed(11)
    q = torch.randn(bsz, seqlen, N_KV_HEADS * group, head_dim, generator=generator)
    # Sharp enough that a wrong maximum or a wrong scale shows.
    keys, values = torch.randn(2, bsz, max_seq_len, N_KV_HEADS, head_dim, generator=generator).to(DEVICE, dtype)
    return (2 * q).to(DEVICE, dtype), keys, values


def attention_over_pages(
    q: Tensor, keys: Tensor, values: Tensor, start_pos: Tensor, sight: Sight, seed: int | None = 0
) -> Tensor:
    """flash_attention over pages in a random order; what lies beyond a row's length is no number, or no page at all."""
    bsz, max_seq_len, width = len(keys), keys.shape[1], pages_for(keys.shape[1])
    n_pages = bsz * width + 2
    order = (
        torch.arange(n_pages)
        if seed is None
        else torch.randperm(n_pages, generator=torch.Generator().manual_seed(seed))
    )
    table = order[: bsz * width].view(bsz, width).to(DEVICE, torch.int32)
    pages = keys.new_full((2, n_pages, PAGE_SIZE, *keys.shape[2:]), torch.nan)
    for row, start in enumerate(start_pos.tolist()):
        length = min(start + q.shape[1], max_seq_len)
        for page, first in enumerate(range(0, length, PAGE_SIZE)):
            stop = min(first + PAGE_SIZE, length)
            pages[0, table[row, page], : stop - first] = keys[row, first:stop]
            pages[1, table[row, page], : stop - first] = values[row, first:stop]
        table[row, pages_for(length) :] = NO_PAGE
    return flash_attention(q, pages[0], pages[1], table, start_pos, sight)


def expected(q: Tensor, keys: Tensor, values: Tensor, start_pos: Tensor, sight: Sight) -> Tensor:
    """By torch in fp64, from the same inputs."""
    seqlen = q.shape[1]
    queries = (start_pos[:, None] + torch.arange(seqlen, device=DEVICE))[:, None, :, None]
    places = torch.arange(keys.shape[1], device=DEVICE)
    mask = places <= queries
    if sight.window is not None:
        mask &= places > queries - sight.window
    if sight.chunk is not None:
        mask &= places // sight.chunk == queries // sight.chunk
    return reference.attend(q.double(), keys.double(), values.double(), mask)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert (actual.double() - wanted).abs().max() <= BOUNDS[actual.dtype] * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of what a tile has beyond the last token
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("seqlen", "group", "head_dim", "max_seq_len", "sight"),
    [
        (1, 3, 64, 150, ALL),  # several splits, of which a short row uses one
        (1, 4, 128, 30, ALL),
        (1, 1, 80, 150, Sight(50)),
        (3, 4, 80, 150, Sight(33)),  # a window shorter than a block
        (3, 1, 12, 150, ALL),
        (8, 7, 12, 80, Sight(70)),  # more rows than a tile
        (8, 3, 256, 60, ALL),
        (40, 1, 64, 150, ALL),
        (33, 4, 128, 60, ALL),  # a row more than a tile of 128 holds
        (19, 7, 80, 60, Sight(33)),
        (3, 3, 64, 150, Sight(chunk=50)),  # of which a tile sees two
        (19, 1, 12, 80, Sight(9, 21)),  # by its chunk or by its window, whichever ends first
    ],
)
def test_a_query_sees_the_keys_up_to_its_own(
    seqlen: int,
    group: int,
    head_dim: int,
    max_seq_len: int,
    sight: Sight,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE.type == "cpu" and seqlen > MAX_GEMV_TOKENS and dtype != torch.float32:
        # As long prompts are: not split. Merging splits takes the interpreter longest, and is fp32 for any dtype.
        monkeypatch.setattr(attention, "PROGRAMS", 1)
    q, keys, values = random_step(3, seqlen, group, head_dim, max_seq_len, dtype)
    start_pos = torch.tensor([max_seq_len - seqlen, 0, (max_seq_len - seqlen) // 2], device=DEVICE)
    y = attention_over_pages(q, keys, values, start_pos, sight)
    assert y.dtype == dtype
    close(y, expected(q, keys, values, start_pos, sight))


@pytest.mark.parametrize(("seqlen", "group", "sight"), [(1, 3, ALL), (3, 1, Sight(40)), (19, 3, ALL)])
def test_the_same_bits_whatever_the_pages(seqlen: int, group: int, sight: Sight) -> None:
    """A text would otherwise depend on what was in the cache before it, or beside it."""
    q, keys, values = random_step(2, seqlen, group, 64, 100, torch.bfloat16)
    start_pos = torch.tensor([80, 30], device=DEVICE)
    in_order = attention_over_pages(q, keys, values, start_pos, sight, seed=None)
    for seed in (1, 2):
        assert torch.equal(attention_over_pages(q, keys, values, start_pos, sight, seed), in_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("group", "max_seq_len", "sight"),
    [(1, 30, ALL), (1, 150, Sight(40)), (3, 150, ALL), (7, 30, Sight(chunk=20)), (7, 80, ALL)],
)
def test_a_token_gets_the_same_bits_whatever_goes_with_it(
    group: int, max_seq_len: int, sight: Sight, dtype: torch.dtype
) -> None:
    """Speculation would otherwise change texts: a guess is checked among others, and generated alone."""
    q, keys, values = random_step(2, MAX_GEMV_TOKENS, group, 64, max_seq_len, dtype)
    start_pos = torch.tensor([max_seq_len - MAX_GEMV_TOKENS, 5], device=DEVICE)
    together = attention_over_pages(q, keys, values, start_pos, sight)
    three = attention_over_pages(q[:, :3], keys, values, start_pos, sight)
    assert torch.equal(together[:, :3], three)
    for token in (0, 4, MAX_GEMV_TOKENS - 1):
        alone = attention_over_pages(q[:, token : token + 1], keys, values, start_pos + token, sight)
        assert torch.equal(together[:, token : token + 1], alone), token


def test_a_dead_row_yields_something_finite() -> None:
    q, keys, values = random_step(2, 1, 3, 64, 150, torch.bfloat16)
    keys[1], values[1] = 0, 0
    y = attention_over_pages(q, keys, values, torch.tensor([140, 0], device=DEVICE), ALL)
    assert y.isfinite().all() and not y[1].any()


def test_splits_follow_from_what_a_step_cannot_change() -> None:
    """A CUDA graph's grid is fixed, and so is what each program sums."""
    assert n_splits(8, 8192, 64) == 32  # 256 programs for one row of eight KV heads
    assert n_splits(8, 100, 64) == 2  # no more than there are blocks
    assert n_splits(3, 1 << 20, 64) == 64
    assert n_splits(512, 8192, 64) == 1
    for group in (1, 3, 4, 7, 8, 32):
        assert (
            len({attention_tile(torch.bfloat16, 128, group, seqlen, 90) for seqlen in range(1, MAX_GEMV_TOKENS + 1)})
            == 1
        )


def test_pages_beyond_two_to_the_31_values_are_read() -> None:
    """2,048 rows of 1k positions are more than an int32 counts; two pages as far apart stand for them."""
    start_pos, head_dim = torch.tensor([0, 1], device=DEVICE), 16
    last = (1 << 31) // (PAGE_SIZE * head_dim)
    # On a CPU, committed where it is written.
    pages = torch.empty(last + 1, PAGE_SIZE, 1, head_dim, dtype=torch.float16, device=DEVICE)
    table = torch.tensor([[0], [last]], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(2, 2, 1, head_dim, generator=generator).to(DEVICE, torch.float16)
    pages[[0, last], :2] = keys
    q = torch.randn(2, 1, 3, head_dim, generator=generator).to(DEVICE, torch.float16)
    close(flash_attention(q, pages, pages, table, start_pos, ALL), expected(q, keys, keys, start_pos, ALL))


def ahead_of_time() -> Iterator[Ahead]:
    """At the shape of Llama 3 8B: a step with splits and a prompt without."""
    pointers = ("q_ptr", "keys_ptr", "values_ptr", "out_ptr")
    numbers = {"seqlen": "i32", "max_seq_len": "i32", "window": "i32", "chunk": "i32"}
    parts = {"table_ptr": "*i32", "start_pos_ptr": "*i64", "partial_ptr": "*fp32", "weights_ptr": "*fp32"}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        signature = {pointer: f"*{name}" for pointer in pointers} | parts | numbers
        for seqlen in (1, 4096):
            chunks = (False, True) if dtype == torch.bfloat16 else (False,)
            for capability, chunk in itertools.product(CAPABILITIES, chunks):
                tile = attention_tile(dtype, 128, 4, seqlen, capability)
                constants = {
                    **{"N_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128},
                    **{"BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
                    **{"WINDOW": chunk, "CHUNK": chunk, "SPLIT": seqlen == 1},
                    "WHOLE": seqlen > MAX_GEMV_TOKENS and not chunk,
                }
                label = f"{name} {seqlen}{' of a chunk' if chunk else ''} for {capability}"
                yield Ahead(label, attention._attend, signature, constants, tile.warps, tile.stages)
    signature = {"partial_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    yield Ahead("combine", attention._combine, signature, {"HEAD_DIM": 128, "BLOCK_S": 32, "BLOCK_D": 128})


def test_no_kernel_spills_registers_at_the_shape_of_8b() -> None:
    kernels = compiled_kernels("tests.unit.test_gpu_attention")
    # Each tile for the GPU that it is meant for.
    kernels = {name: kernel for name, kernel in kernels.items() if " for " not in name or name[-2:] == name[-8:-6]}
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert kernel.shared <= 160 << 10, name
    copied = "cp.async.cg.shared.global"
    assert copied in kernels["bf16 1 for 90 sm_90"].ptx and "wgmma" in kernels["bf16 4096 for 90 sm_90"].ptx
