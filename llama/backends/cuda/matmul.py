"""Products of any number of tokens with a weight on a GPU: by kernels from the stored codes, or by cuBLAS.

Few tokens take the weights as they are stored; for many a quantized weight is dequantized in pieces first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.backends.cuda import products
from llama.quantization.planar import FEW, MAX_DEQUANTIZED_VALUES, MOST, Fp8Weight, PlanarWeight
from llama.quantization.weights import float_matmul

GpuWeight = Tensor | PlanarWeight | Fp8Weight


def is_few(x: Tensor, weight: GpuWeight) -> bool:
    """Tell whether kernels take x (n_tokens, in) from the stored codes: of floats fewer tokens than of codes."""
    return len(x) <= (FEW if isinstance(weight, Tensor) else MOST)


def matmul(x: Tensor, weight: GpuWeight, bias: Tensor | None = None, few_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x (n_tokens, in) by weight (out, in) transposed and add bias (out,): (n_tokens, out).

    The result is in x's dtype, or, of few tokens, in few_dtype.
    """
    if is_few(x, weight):
        return products.multiply(x, weight, bias, few_dtype)
    if isinstance(weight, Tensor):
        y = float_matmul(x, weight)
    elif isinstance(weight, Fp8Weight) and weight.multiplies_fp8(x.device):
        y = weight(x)
    else:
        y = _dequantized_matmul(x, weight)
    return y if bias is None else y + bias


def _dequantized_matmul(x: Tensor, weight: PlanarWeight | Fp8Weight) -> Tensor:
    """Dequantize pieces of rows by a kernel, each of at most MAX_DEQUANTIZED_VALUES, and let cuBLAS multiply."""
    n_out, n_in = weight.shape
    y = x.new_empty(len(x), n_out)
    step = max(1, MAX_DEQUANTIZED_VALUES // n_in)
    for first in range(0, n_out, step):
        part = weight.part(first, first + step)
        y[:, first : first + step] = float_matmul(x, products.dense(part, x.dtype))
    return y
