"""Linears that bitsandbytes, compressed-tensors, AutoGPTQ and AutoAWQ quantized have the values that they compute.

released_linears.json has the tensors and the values, as the libraries wrote them on a CPU.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint.releases import find_matrices
from llama.quantization.planar import Fp8Weight

LINEARS = json.loads((Path(__file__).parent / "released_linears.json").read_text())["linears"]


def decoded(stored: dict[str, Any]) -> Tensor:
    data = torch.frombuffer(bytearray(base64.b64decode(stored["data"])), dtype=torch.uint8)
    return data.view(getattr(torch, stored["dtype"])).view(stored["shape"])


@pytest.mark.parametrize("name", LINEARS)
def test_values_are_those_that_the_library_computes(name: str) -> None:
    """To the bit in 16 bits, which the libraries round to; bitsandbytes computes in fp32, in another order."""
    linear = LINEARS[name]
    tensors = {f"layer.q_proj.{end}": decoded(stored) for end, stored in linear["tensors"].items()}
    matrices = find_matrices(Path("folder"), tensors, linear["quantization_config"])
    assert not tensors and matrices.keys() == {"layer.q_proj.weight"}
    expected = decoded(linear["values"])
    values = matrices["layer.q_proj.weight"].values(0, 0, len(expected))
    if expected.dtype == torch.float32:
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(values.to(expected.dtype), expected)


def test_8_bit_floats_with_a_scale_a_row_stay_as_they_are_where_a_gpu_computes_with_them() -> None:
    """Their largest code is the largest there is, so that `--quantize fp8` finds the same scales."""
    linear = LINEARS["compressed-tensors fp8 rows"]
    tensors = {f"layer.q_proj.{end}": decoded(stored) for end, stored in linear["tensors"].items()}
    codes = tensors["layer.q_proj.weight"].view(torch.uint8)
    (matrix,) = find_matrices(Path("folder"), tensors, linear["quantization_config"]).values()
    assert torch.equal(Fp8Weight.of(matrix.values(0, 0, len(codes))).codes.view(torch.uint8), codes)
