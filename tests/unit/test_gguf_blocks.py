"""Every type of block is decoded as the gguf library decodes it: whole, by rows and by columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from llama.checkpoint import open_checkpoint
from tests.checkpoints import TINY
from tests.gguf_files import metadata_of, write_gguf

ROWS, COLUMNS = 6, 512  # at least two blocks a row


def can(function: Any, array: np.ndarray, kind: GGMLQuantizationType) -> bool:
    try:
        function(array, kind)
    except NotImplementedError:
        return False
    return True


def zeros(kind: GGMLQuantizationType) -> np.ndarray:
    return np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)


DECODED = [kind for kind in GGMLQuantizationType if can(gguf.dequantize, zeros(kind), kind)]
QUANTIZED = [kind for kind in DECODED if can(gguf.quantize, np.zeros((1, 256), np.float32), kind)]
OTHERS = [kind for kind in GGMLQuantizationType if kind not in DECODED]


def open_with(path: Path, array: np.ndarray, kind: GGMLQuantizationType):  # type: ignore[no-untyped-def]
    return open_checkpoint(write_gguf(path / "model.gguf", metadata_of(TINY), {"output.weight": (array, kind)}))


def check_reads(path: Path, array: np.ndarray, kind: GGMLQuantizationType, rows: int = ROWS) -> None:
    checkpoint = open_with(path, array, kind)
    expected = gguf.dequantize(array, kind).reshape(rows, COLUMNS)
    assert checkpoint.shape("output.weight") == (rows, COLUMNS)
    slices = [(0, 0, rows), (0, 1, 3), (0, rows - 1, rows), (0, 2, 2), (0, rows, rows)]
    slices += [(1, 0, COLUMNS), (1, 7, 300), (1, 511, 512), (1, 256, 256)]
    for dim, start, stop in slices:
        part = expected[start:stop] if dim == 0 else expected[:, start:stop]
        found = checkpoint.read("output.weight", dim, start, stop)
        assert tuple(found.shape) == part.shape
        np.testing.assert_array_equal(found.float().numpy(), part)
    np.testing.assert_array_equal(checkpoint.read("output.weight").float().numpy(), expected)


def test_the_types_that_matter_are_covered() -> None:
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"} <= {kind.name for kind in QUANTIZED}
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= {kind.name for kind in DECODED}


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_weights_are_decoded_as_the_library_does(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    check_reads(tmp_path, gguf.quantize(weights, kind), kind)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_any_bytes_are_decoded_as_the_library_does(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """The library cannot quantize to K-quants; arbitrary blocks have NaN scales, too."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // elements * size), dtype=np.uint8)
    check_reads(tmp_path, blocks.view(np.float32) if kind == GGMLQuantizationType.F32 else blocks, kind)


def test_tensors_larger_than_what_is_decoded_at_once_are_whole(tmp_path: Path) -> None:
    """The last part of a tensor is shorter than the others."""
    rows = 1100
    weights = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32)
    check_reads(tmp_path, gguf.quantize(weights, GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1, rows)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_types_that_cannot_be_decoded_are_refused_when_the_file_is_opened(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((ROWS, COLUMNS // elements * size), np.uint8)
    with pytest.raises(ValueError, match=rf"output\.weight .*{kind.name}"):
        open_with(tmp_path, blocks, kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q4_1", torch.float32)],
)
def test_dense_weights_keep_their_dtype(tmp_path: Path, kind: str, expected: torch.dtype) -> None:
    """Blocks stand for no dtype, and are decoded to fp32."""
    array = gguf.quantize(np.ones((ROWS, COLUMNS), np.float32), GGMLQuantizationType[kind])
    assert open_with(tmp_path, array, GGMLQuantizationType[kind]).read("output.weight").dtype == expected
