"""Blocks of searched scales: near what was quantized, nearer than ggml's own, and by the columns that count."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from llama.quantization.gguf_blocks import BLOCK_TYPES, dequantize
from llama.quantization.k_quants import quantize_blocks

# By ggml_quantize_chunk of llama-cpp-python 0.3.36: the root mean squared error of `normal`, and, weighted, of the same
# with `IMPORTANCE`, as parts of the values' own.
GGML_ERRORS = {
    "Q4_0": (0.08583, 0.07595),
    "Q4_1": (0.07798, 0.06175),
    "Q5_0": (0.04260, 0.03788),
    "Q5_1": (0.03782, 0.02982),
    "Q2_K": (0.29757, 0.22506),
    "Q3_K": (0.15041, 0.13036),
    "Q4_K": (0.07121, 0.06292),
    "Q5_K": (0.03603, 0.03207),
    "Q6_K": (0.01766, 0.01569),
    "IQ4_NL": (0.07584, 0.06893),
    "IQ4_XS": (0.07643, 0.06967),
}
SEARCHED = tuple(GGML_ERRORS)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values of any platform's numpy: torch's random numbers differ between versions."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns), np.float32)) * 0.02


IMPORTANCE = normal(1, 1024, seed=5)[0].square() * 2500 + 0.01


def found(values: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """What the library decodes of the blocks."""
    blocks = quantize_blocks(values, BLOCK_TYPES[name], importance)
    return torch.from_numpy(np.array(gguf.dequantize(blocks.numpy(), GGMLQuantizationType[name])))


def error(values: Tensor, other: Tensor, importance: Tensor | None = None) -> float:
    """The root of the (weighted) mean squared error, as a part of the values' own."""
    weight = torch.ones(values.shape[1]) if importance is None else importance
    return float(((values - other).square() @ weight).sum() / (values.square() @ weight).sum()) ** 0.5


@pytest.mark.parametrize("name", SEARCHED)
def test_blocks_are_as_near_as_ggmls(name: str) -> None:
    values = normal(64, 1024)
    plain, weighted = GGML_ERRORS[name]
    assert 0.5 * plain < error(values, found(values, name)) <= plain
    assert 0.5 * weighted < error(values, found(values, name, IMPORTANCE), IMPORTANCE) <= weighted * 1.002


@pytest.mark.parametrize("name", SEARCHED)
def test_columns_that_count_more_are_nearer(name: str) -> None:
    values, importance = normal(32, 1024), torch.ones(1024)
    importance[::8] = 100.0
    plain, weighted = (found(values, name, each) for each in (None, importance))
    assert error(values[:, ::8], weighted[:, ::8]) < 0.97 * error(values[:, ::8], plain[:, ::8])
    # Ones count like nothing given, but for the last bit.
    assert error(found(values, name, torch.ones(1024)), plain) < 0.01


@pytest.mark.parametrize("name", SEARCHED)
def test_groups_without_a_scale_stay_what_they_are(name: str) -> None:
    values = normal(8, 1024)
    values[3], values[5] = 0.0, values[5].abs()  # no scale, and no minimum
    values[6, :256] = 0.01
    values[7, :256] = -0.01
    for importance in (None, IMPORTANCE, torch.zeros(1024)):
        decoded = found(values, name, importance)
        assert decoded.isfinite().all() and not decoded[3].any()
        if importance is None or importance.any():
            assert torch.allclose(decoded[6:, :256], values[6:, :256], rtol=0.05)


@pytest.mark.parametrize("name", SEARCHED)
def test_blocks_of_a_file_are_quantized_to_themselves_or_as_good(name: str) -> None:
    """A model that was quantized before lies on a grid, whose steps the search has to find."""
    once = found(normal(16, 1024), name)
    assert error(once, found(once, name)) < 0.25 * error(normal(16, 1024), once)


def test_rows_do_not_depend_on_what_is_quantized_with_them() -> None:
    values = normal(130, 1024)
    for name in ("Q4_K", "IQ4_NL"):
        whole = quantize_blocks(values, BLOCK_TYPES[name], IMPORTANCE)
        assert torch.equal(whole[77:79], quantize_blocks(values[77:79], BLOCK_TYPES[name], IMPORTANCE))
        assert torch.equal(whole[3:4], quantize_blocks(values[3:4].clone(), BLOCK_TYPES[name], IMPORTANCE))


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_scales_cannot_hold_are_an_error(name: str, value: float) -> None:
    values = normal(2, 256)
    values[1, 7] = value
    with pytest.raises(ValueError, match=f"cannot be quantized to {name}"):
        quantize_blocks(values, BLOCK_TYPES[name])


def test_groups_far_from_zero_are_as_precise_as_fp16_allows() -> None:
    """Sums of squares of such values, in fp32, have no digits left for the errors."""
    values = normal(16, 256) + 100
    for name in ("Q4_1", "Q5_1"):
        assert (values - found(values, name)).abs().max() < 0.05


def test_bfloat16_is_quantized_like_its_values() -> None:
    values = normal(4, 512).bfloat16()
    for name in ("Q6_K", "Q8_0"):
        blocks = quantize_blocks(values, BLOCK_TYPES[name])
        assert torch.equal(blocks, quantize_blocks(values.float(), BLOCK_TYPES[name]))
        assert error(values.float(), dequantize(blocks, BLOCK_TYPES[name])) < 0.02
