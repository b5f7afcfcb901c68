"""Products of any number of tokens with a weight on a GPU: by kernels from the stored codes, or by cuBLAS.

Few tokens take the weights as they are stored; for many a quantized weight is dequantized in pieces first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cuda import gemm, gemv
from llama.quantization.planar import (
    MAX_DEQUANT_GEMM_TOKENS,
    MAX_DEQUANTIZED_GPU_VALUES,
    MAX_GEMV_TOKENS,
    MAX_UNROUNDED_TOKENS,
    Fp8Weight,
    PlanarWeight,
)
from llama.quantization.weights import float_matmul

GpuWeight = Tensor | PlanarWeight | Fp8Weight


def is_few(x: Tensor, weight: GpuWeight) -> bool:
    """Tell whether x (n_tokens, in) is so few tokens that weights are read as they are stored."""
    return len(x) <= (MAX_GEMV_TOKENS if isinstance(weight, Tensor) else MAX_DEQUANT_GEMM_TOKENS)


def matmul(
    x: Tensor,
    weight: GpuWeight,
    bias: Tensor | None = None,
    few_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply x (n_tokens, in) by weight (out, in) transposed and add bias (out,): (n_tokens, out).

    The result is in `dtype`, or else in x's. Of few tokens it is in few_dtype, if that is given, and with floats always
    in fp32: in their own dtype torch may round sums of parts.
    """
    if is_few(x, weight):
        if not isinstance(weight, Tensor):
            multiply = gemv.gemv if len(x) == 1 else gemm.gemm
            return multiply(x, weight, bias, few_dtype or dtype)
        y = padded_matmul(x, weight)
    elif isinstance(weight, Tensor):
        y = float_matmul(x, weight, dtype)
    elif isinstance(weight, Fp8Weight) and len(x) > MAX_UNROUNDED_TOKENS and weight.multiplies_fp8(x.device):
        y = weight(x, dtype)
    else:
        y = _matmul_in_pieces(x, weight, dtype or x.dtype)
    return y if bias is None else y + bias


def matmul_in(x: Tensor, weight: GpuWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply x (..., in) by weight (out, in) transposed, as linears do: (..., out) in `dtype`, by default x's."""
    y = matmul(x.reshape(-1, x.shape[-1]), weight, dtype=dtype)
    return y.to(dtype or x.dtype).view(*x.shape[:-1], -1)


def padded_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (n_tokens, in) by floats (out, in) transposed as MAX_GEMV_TOKENS rows: (n_tokens, out), fp32.

    cuBLAS then takes the same kernel for any number of them, and a token's numbers do not depend on the others.
    """
    n_tokens = len(x)
    if x.device.type != "cuda":  # where tests run layers, torch would round a product of 16-bit floats to 16 bits
        x, weight = x.float(), weight.float()
    if n_tokens < MAX_GEMV_TOKENS:
        x = F.pad(x, (0, 0, 0, MAX_GEMV_TOKENS - n_tokens))
    return float_matmul(x, weight, torch.float32)[:n_tokens]


def _matmul_in_pieces(x: Tensor, weight: PlanarWeight | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """Dequantize pieces of rows by a kernel, each of at most MAX_DEQUANTIZED_GPU_VALUES, and let cuBLAS multiply."""
    n_out, n_in = weight.shape
    y = x.new_empty(len(x), n_out, dtype=dtype)
    step = max(1, MAX_DEQUANTIZED_GPU_VALUES // n_in)
    for first in range(0, n_out, step):
        part = weight.part(first, first + step)
        y[:, first : first + step] = float_matmul(x, gemm.dequantize(part, x.dtype), dtype)
    return y
