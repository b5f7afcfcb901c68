"""Blocks of quantized weights against the gguf library, which decodes and rounds as ggml does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from llama.quantization.gguf_blocks import BLOCK_TYPES, QUANTIZE, BlockType, dequantize, quantize, take_apart
from llama.quantization.packing import put_together
from tests.gguf_files import SCALES_AT

# The library's, about values that scales cannot hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Q4_1, Q8_0 = BLOCK_TYPES["Q4_1"], BLOCK_TYPES["Q8_0"]


def finite_blocks(name: str, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes, with every finite fp16 number, denormal ones too, as a scale of some block in turn."""
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (n_blocks, size), dtype=np.uint8)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for place in SCALES_AT[name]:
        numbers = np.resize(generator.permutation(halves), n_blocks)
        blocks[:, place : place + 2] = numbers[:, None].view(np.uint8)
    return blocks


def library(blocks: np.ndarray, name: str) -> np.ndarray:
    return gguf.dequantize(blocks, GGMLQuantizationType[name])


def decoded(values: Tensor, block_type: BlockType) -> Tensor:
    return dequantize(quantize(values, block_type), block_type)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def squared_error(values: Tensor, found: Tensor) -> float:
    return float((values.double() - found.double()).square().sum())


def plainly_rounded(values: Tensor) -> Tensor:
    rows = np.ascontiguousarray(values.float().numpy())
    blocks = gguf.quantize(rows, GGMLQuantizationType.Q4_1)
    return torch.from_numpy(np.array(library(blocks, "Q4_1")))


def test_block_types_have_the_librarys_sizes() -> None:
    for name, block_type in BLOCK_TYPES.items():
        assert block_type.name == name
        assert (block_type.elements, block_type.size) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert set(QUANTIZE.values()) <= BLOCK_TYPES.keys()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_decoded_to_the_bit_as_the_library_does(name: str) -> None:
    blocks = finite_blocks(name, 1 << 16 if BLOCK_TYPES[name].elements == 32 else 1 << 14).reshape(64, -1)
    found = dequantize(torch.from_numpy(blocks), BLOCK_TYPES[name])
    np.testing.assert_array_equal(found.numpy().view(np.uint32), library(blocks, name).view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_infinite_and_nan_scales_are_decoded_as_the_library_does(name: str) -> None:
    """Damaged files have them; --deep counts what they make."""
    blocks = finite_blocks(name, 64)
    numbers = np.resize(np.array([np.inf, np.nan, -np.inf, 0], np.float16), 64)
    for place in SCALES_AT[name]:
        blocks[::3, place : place + 2] = numbers[::3, None].view(np.uint8)
    found = dequantize(torch.from_numpy(blocks), BLOCK_TYPES[name])
    np.testing.assert_array_equal(found.numpy(), library(blocks, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_columns_and_rows_of_blocks_are_decoded_where_they_lie(name: str) -> None:
    """Ranks hold columns of a mapped file, and may have no rows at all."""
    block_type = BLOCK_TYPES[name]
    blocks = torch.from_numpy(finite_blocks(name, 5 * 6).reshape(5, -1))
    whole = dequantize(blocks, block_type)
    columns = dequantize(blocks[1:4, 2 * block_type.size : 5 * block_type.size], block_type)
    assert torch.equal(columns, whole[1:4, 2 * block_type.elements : 5 * block_type.elements])
    assert torch.equal(dequantize(blocks[3], block_type), whole[3])
    assert dequantize(blocks[2:2], block_type).shape == (0, 6 * block_type.elements)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_that_were_taken_apart_are_put_together_again(name: str) -> None:
    blocks = torch.from_numpy(finite_blocks(name, 256)).unflatten(0, (16, 16))
    assert torch.equal(put_together(take_apart(blocks, BLOCK_TYPES[name]), BLOCK_TYPES[name]), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1e-40, 1e-9, 1e-6, 0.02, 3.0, 1e5])
def test_int8_is_the_librarys_rounding(dtype: torch.dtype, spread: float) -> None:
    values = (normal(64, 320) * 50 * min(spread, 1e4 if dtype == torch.float16 else spread)).to(dtype)
    expected = gguf.quantize(values.float().numpy(), GGMLQuantizationType.Q8_0)
    found = quantize(values, Q8_0)
    # Scales that are 0 in fp16 leave the codes without a meaning.
    assert torch.equal(dequantize(found, Q8_0), torch.from_numpy(np.array(library(expected, "Q8_0"))))
    if spread > 1e-6:
        np.testing.assert_array_equal(found.numpy(), expected)


def test_halves_are_rounded_away_from_zero() -> None:
    values = torch.zeros(2, 32)
    values[0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, 0.49999997])
    values[1] = -values[0]
    expected = torch.zeros(2, 32)
    expected[0, :5] = torch.tensor([127.0, 1, 2, 3, 0])
    expected[1] = -expected[0]
    assert torch.equal(decoded(values, Q8_0), expected)


@pytest.mark.parametrize("seed", range(3))
def test_int4_is_closer_than_plain_rounding(seed: int) -> None:
    values = normal(128, 1024, seed=seed)
    assert squared_error(values, decoded(values, Q4_1)) < 0.85 * squared_error(values, plainly_rounded(values))


def test_no_group_comes_out_worse_than_by_plain_rounding() -> None:
    """Heavy tails, a few outliers, groups far from 0, and groups that fp16 barely holds."""
    generator = torch.Generator().manual_seed(1)
    plain = normal(64, 32, seed=1)
    tails = plain / torch.rand(64, 32, generator=generator)
    outliers = torch.where(torch.rand(64, 32, generator=generator) < 0.05, 30 * plain, plain)
    for values in (plain, tails, outliers, plain + 1, plain - 100, plain * 1e-5, plain * 3e5, plain.bfloat16()):
        found = (values.double() - decoded(values, Q4_1)).square().sum(dim=1)
        expected = (values.double() - plainly_rounded(values)).square().sum(dim=1)
        assert (found <= expected * 1.0001).all()


def test_weights_of_a_real_model_are_no_further_off_than_by_plain_rounding(demo_weights: Tensor) -> None:
    assert squared_error(demo_weights, decoded(demo_weights, Q4_1)) <= squared_error(
        demo_weights, plainly_rounded(demo_weights)
    )


@pytest.fixture(scope="module")
def demo_weights(demo_model: Path) -> Tensor:
    """A projection of the demo model, smoothed so that it does not lie on the 4-bit grid of its file."""
    from llama.checkpoint import open_checkpoint

    weights = open_checkpoint(demo_model).read("layers.11.feed_forward.w1.weight")
    return weights + 0.5 * weights.roll(1, 0)


@pytest.mark.parametrize("block_type", [Q4_1, Q8_0], ids=lambda block_type: block_type.name)
def test_groups_of_one_value_come_out_exactly(block_type: BlockType) -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 127.0, -0.5, 254.0, 2.0**-14, -(2.0**-9)])
    values = values if block_type == Q4_1 else values * 127 / 128  # whose scales fp16 holds
    groups = values[:, None].expand(-1, 64)
    assert torch.equal(decoded(groups, block_type), groups)
    if block_type == Q4_1:
        for dtype in (torch.bfloat16, torch.float16):
            constants = normal(256, 1).mul(50).to(dtype).expand(-1, 32)
            assert torch.equal(decoded(constants, block_type), constants.float())


def test_what_lies_on_the_grid_stays_there() -> None:
    """Values that were blocks before, with both ends of the codes in every group, lose nothing a second time."""
    blocks = torch.from_numpy(finite_blocks("Q4_1", 4096))
    blocks[:, 4], blocks[:, 1], blocks[:, 3] = 0xF0, blocks[:, 1] & 0x3F | 0x20, blocks[:, 3] & 0xBF
    values = dequantize(blocks, Q4_1)
    error = squared_error(values, decoded(values, Q4_1))
    assert error <= 1e-7 * float(values.double().square().sum())


@pytest.mark.parametrize("block_type", [Q4_1, Q8_0], ids=lambda block_type: block_type.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e7, -3e38])
def test_values_that_scales_cannot_hold_are_an_error(block_type: BlockType, value: float) -> None:
    values = normal(3, 64)
    values[1, 40] = value
    with pytest.raises(ValueError, match=f"cannot be quantized to {block_type.name}.*leave --quantize out"):
        quantize(values, block_type)


@pytest.mark.parametrize("block_type", [Q4_1, Q8_0], ids=lambda block_type: block_type.name)
def test_rows_that_are_not_whole_blocks_are_an_error(block_type: BlockType) -> None:
    with pytest.raises(ValueError, match="rows of 48 values are not whole"):
        quantize(normal(2, 48), block_type)
    assert quantize(normal(0, 64), block_type).shape == (0, 2 * block_type.size)


@pytest.mark.parametrize("block_type", [Q4_1, Q8_0], ids=lambda block_type: block_type.name)
def test_groups_do_not_depend_on_what_is_quantized_with_them(block_type: BlockType) -> None:
    """A rank quantizes its part of a tensor; values are quantized a run at a time, and are left as they were."""
    values = normal(66, 1 << 14)
    kept = values.clone()
    whole = quantize(values, block_type)
    assert torch.equal(values, kept)
    assert torch.equal(whole[65], quantize(values[65], block_type))
    n_bytes = (1 << 13) // 32 * block_type.size
    assert torch.equal(whole[:3, n_bytes:], quantize(values[:3, 1 << 13 :], block_type))
    assert torch.equal(whole[5, : block_type.size], quantize(values[5, :32], block_type))
    assert torch.equal(values, kept)
