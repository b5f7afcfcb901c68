"""Attention kernels see what a mask of positions lets through, and give a token the same bits in any step of few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama import model
from tests.gpu_compile import CAPABILITIES, Ahead, compiled_kernels

pytest.importorskip("triton", reason="GPU kernels are written in Triton")
from llama.backends.cuda import attention
from llama.backends.cuda.attention import attention_tile, flash_attention, n_splits
from llama.quantization.planar import MAX_GEMV_TOKENS

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
N_KV_HEADS = 2
LAYERS = 2


def random_step(
    bsz: int, seqlen: int, group: int, head_dim: int, max_seq_len: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the last layer's keys and values of a cache with a row more than they have."""
    generator = torch.Generator().manual_seed(11)
    q = torch.randn(bsz, seqlen, N_KV_HEADS * group, head_dim, generator=generator)
    # Sharp enough that a wrong maximum or a wrong scale shows.
    cache = torch.randn(2, LAYERS, bsz + 1, max_seq_len, N_KV_HEADS, head_dim, generator=generator)
    keys, values = cache.to(DEVICE, dtype)
    return (2 * q).to(DEVICE, dtype), keys[-1], values[-1]


def expected(q: Tensor, keys: Tensor, values: Tensor, start_pos: Tensor, window: int | None) -> Tensor:
    """By torch in fp64, from the same inputs."""
    bsz, seqlen, _, _ = q.shape
    queries = (start_pos[:, None] + torch.arange(seqlen, device=DEVICE))[:, None, :, None]
    places = torch.arange(keys.shape[1], device=DEVICE)
    mask = places <= queries
    if window is not None:
        mask &= places > queries - window
    return model.attend(q.double(), keys[:bsz].double(), values[:bsz].double(), mask)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert (actual.double() - wanted).abs().max() <= BOUNDS[actual.dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("seqlen", "group", "head_dim", "max_seq_len", "window"),
    [
        (1, 3, 64, 150, None),  # several splits, of which a short row uses one
        (1, 4, 128, 30, None),
        (1, 1, 80, 150, 50),
        (3, 4, 80, 150, 33),  # a window shorter than a block
        (3, 1, 12, 150, None),
        (8, 7, 12, 80, 70),  # more rows than a tile
        (8, 3, 256, 60, None),
        (40, 1, 64, 150, None),
        (33, 4, 128, 60, None),  # a row more than a tile of 128 holds
        (19, 7, 80, 60, 33),
    ],
)
def test_a_query_sees_the_keys_up_to_its_own(
    seqlen: int,
    group: int,
    head_dim: int,
    max_seq_len: int,
    window: int | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE.type == "cpu" and seqlen > MAX_GEMV_TOKENS and dtype != torch.float32:
        # As long prompts are: not split. Merging splits takes the interpreter longest, and is fp32 for any dtype.
        monkeypatch.setattr(attention, "PROGRAMS", 1)
    q, keys, values = random_step(3, seqlen, group, head_dim, max_seq_len, dtype)
    start_pos = torch.tensor([max_seq_len - seqlen, 0, (max_seq_len - seqlen) // 2], device=DEVICE)
    for row, start in enumerate(start_pos.tolist()):  # what was not written may be anything
        keys[row, start + seqlen :] *= 100
        values[row, start + seqlen :] = 1000
    y = flash_attention(q, keys, values, start_pos, window)
    assert y.dtype == dtype
    close(y, expected(q, keys, values, start_pos, window))


def test_caches_of_any_strides_are_read() -> None:
    """Layers of a cache that holds heads before positions."""
    q, keys, values = random_step(2, 3, 3, 64, 90, torch.float32)
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    start_pos = torch.tensor([17, 80], device=DEVICE)
    close(flash_attention(q, keys, values, start_pos, None), expected(q, keys, values, start_pos, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("group", "max_seq_len", "window"), [(1, 30, None), (1, 150, 40), (3, 150, None), (7, 30, 20), (7, 80, None)]
)
def test_a_token_gets_the_same_bits_whatever_goes_with_it(
    group: int, max_seq_len: int, window: int | None, dtype: torch.dtype
) -> None:
    """Speculation would otherwise change texts: a guess is checked among others, and generated alone."""
    q, keys, values = random_step(2, MAX_GEMV_TOKENS, group, 64, max_seq_len, dtype)
    start_pos = torch.tensor([max_seq_len - MAX_GEMV_TOKENS, 5], device=DEVICE)
    together = flash_attention(q, keys, values, start_pos, window)
    three = flash_attention(q[:, :3], keys, values, start_pos, window)
    assert torch.equal(together[:, :3], three)
    for token in (0, 4, MAX_GEMV_TOKENS - 1):
        alone = flash_attention(q[:, token : token + 1], keys, values, start_pos + token, window)
        assert torch.equal(together[:, token : token + 1], alone), token


def test_a_dead_row_yields_something_finite() -> None:
    q, keys, values = random_step(2, 1, 3, 64, 150, torch.bfloat16)
    keys[1], values[1] = 0, 0
    y = flash_attention(q, keys, values, torch.tensor([140, 0], device=DEVICE), None)
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


def test_rows_beyond_two_to_the_31_values_are_read() -> None:
    """64 rows of 32k positions are more than an int32 counts; two rows as far apart stand for them."""
    start_pos, head_dim = torch.tensor([0, 1], device=DEVICE), 16
    apart = (1 << 31) // head_dim * head_dim
    room = torch.empty(apart + 2 * head_dim, dtype=torch.float16, device=DEVICE)  # on a CPU, committed where written
    keys = room.as_strided((2, 2, 1, head_dim), (apart, head_dim, head_dim, 1))
    generator = torch.Generator().manual_seed(5)
    keys.copy_(torch.randn(keys.shape, generator=generator))
    q = torch.randn(2, 1, 3, head_dim, generator=generator).to(DEVICE, torch.float16)
    close(flash_attention(q, keys, keys, start_pos, None), expected(q, keys, keys, start_pos, None))


def ahead_of_time() -> Iterator[Ahead]:
    """At the shape of Llama 3 8B: a step with splits and a prompt without."""
    pointers = ("q_ptr", "keys_ptr", "values_ptr", "out_ptr")
    numbers = {"seqlen": "i32", "max_seq_len": "i32", "window": "i32"}
    strides = {"stride_row": "i64:16"}
    parts = {"start_pos_ptr": "*i64", "partial_ptr": "*fp32", "weights_ptr": "*fp32"}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        signature = {pointer: f"*{name}" for pointer in pointers} | parts | numbers | strides
        for seqlen in (1, 4096):
            for capability in CAPABILITIES:
                tile = attention_tile(dtype, 128, 4, seqlen, capability)
                constants = {
                    **{"STRIDE_POSITION": 1024, "STRIDE_HEAD": 128},
                    **{"N_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "BLOCK_D": 128},
                    **{"BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
                    **{"WINDOW": False, "SPLIT": seqlen == 1, "WHOLE": seqlen > MAX_GEMV_TOKENS},
                }
                label = f"{name} {seqlen} for {capability}"
                yield Ahead(label, attention._attend, signature, constants, tile.warps, tile.stages)
    signature = {"partial_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    yield Ahead("combine", attention._combine, signature, {"HEAD_DIM": 128, "BLOCK_S": 32, "BLOCK_D": 128})


def test_no_kernel_spills_registers_at_the_shape_of_8b() -> None:
    kernels = compiled_kernels("tests.unit.test_gpu_attention")
    # Each tile for the GPU that it is meant for.
    kernels = {name: kernel for name, kernel in kernels.items() if " for " not in name or name[-2:] == name[-8:-6]}
    assert len(kernels) == 10
    for name, kernel in kernels.items():
        assert kernel.spills == 0, name
        assert kernel.shared <= 160 << 10, name
    copied = "cp.async.cg.shared.global"
    assert copied in kernels["bf16 1 for 90 sm_90"].ptx and "wgmma" in kernels["bf16 4096 for 90 sm_90"].ptx
