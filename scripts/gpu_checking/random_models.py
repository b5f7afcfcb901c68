"""Weights of random values, never zeros, made where they are used, and models of them that keep activations sane."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from gpu_checking.sizes import FLOATS
from llama.backends.cuda.backend import CudaBackend
from llama.backends.cuda.matmul import GpuWeight
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, set_quantized_weight, tie_output
from llama.model import Transformer
from llama.norms import XIELU, AllHeadsNorm, LayerNorm, RMSNorm
from llama.quantization.gguf_blocks import BLOCK_TYPES, QUANTIZE, BlockType, dequantize, quantize
from llama.quantization.planar import Fp8Weight, PlanarWeight

LOGITS = 3.0  # their standard deviation
# Where blocks that no code here quantizes have their halves, and how these are to each other: Q4_K's codes are 7.5 on
# average, and its minima are subtracted.
HALVES = {"Q4_0": {0: 1.0}, "Q4_K": {0: 1.0, 2: 7.5}, "Q6_K": {208: 1.0}}
MEASURED_ROWS = 64  # of random blocks, to learn how large their values are


def random_values(shape: tuple[int, ...], std: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(std)


def random_blocks(block_type: BlockType, rows: int, columns: int, std: float, device: torch.device) -> Tensor:
    """Blocks (rows, bytes) of normal values, quantized, or of random codes and scales with one scale over them."""
    if block_type.name in QUANTIZE.values():
        return quantize(random_values((rows, columns), std, device, torch.float32), block_type)
    n_blocks = columns // block_type.elements
    blocks = torch.randint(0, 256, (rows, n_blocks, block_type.size), dtype=torch.uint8, device=device)
    _set_halves(blocks, block_type, 1.0)
    _set_halves(blocks, block_type, std / float(dequantize(blocks[:MEASURED_ROWS].flatten(1), block_type).std()))
    return blocks.flatten(1)


def _set_halves(blocks: Tensor, block_type: BlockType, scale: float) -> None:
    for at, times in HALVES[block_type.name].items():
        half = torch.tensor([times * scale], dtype=torch.float16).view(torch.uint8)
        blocks[..., at : at + 2] = half.to(blocks.device)


def block_type_of(form: str) -> BlockType:
    return BLOCK_TYPES[QUANTIZE.get(form, form)]


def random_model(
    args: ModelArgs, form: str, device: torch.device, dtype: torch.dtype, parallel: ModelParallel | None = None
) -> Transformer:
    """A model that computes in dtype and is run by the GPU's kernels; its embedding is in floats, unless it is tied."""
    with torch.device("meta"):
        model = Transformer(args, parallel)
    vectors: list[Any] = list(model.modules())
    for module in vectors:
        if isinstance(module, RMSNorm | LayerNorm | AllHeadsNorm | XIELU):
            _set(module, 1 + random_values(module.weight.shape, 0.1, device, dtype))
        if getattr(module, "bias", None) is not None:
            bias = random_values(module.bias.shape, 0.1, device, dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)
        if isinstance(module, AllHeadsNorm):
            module.to(device)
    make = Maker(form, device, dtype)
    layers: list[Any] = list(model.layers)
    for layer in layers:
        for half in (layer.attention, layer.feed_forward):
            for name, linear in half.named_children():
                if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                    _set(linear, make(name, linear.weight.shape))
    output, table = model.output, model.tok_embeddings
    if args.tied_embeddings:
        _set(table, make("output", table.weight.shape, times=LOGITS))
        tie_output(output, table)
    else:
        _set(output, make("output", output.weight.shape, times=LOGITS))
        _set(table, random_values(table.weight.shape, 1.0, device, dtype))
    model.rope.to(device)
    CudaBackend(device).bind(model)
    return model


class Maker:
    """Makes the weights of a model. Blocks of one name are made once: layers have them with their rows in turn."""

    def __init__(self, form: str, device: torch.device, dtype: torch.dtype) -> None:
        self.form, self.device, self.dtype = form, device, dtype
        self._blocks: dict[str, Tensor] = {}
        self._turns = itertools.count(1, 7)

    def __call__(self, name: str, shape: tuple[int, ...], times: float = 1.0) -> GpuWeight:
        rows, columns = shape
        std = times * columns**-0.5
        if self.form == FLOATS:
            return random_values((rows, columns), std, self.device, self.dtype)
        if self.form == "fp8":
            return Fp8Weight.of(random_values((rows, columns), std, self.device, torch.bfloat16))
        block_type = block_type_of(self.form)
        if name not in self._blocks:
            self._blocks[name] = random_blocks(block_type, rows, columns, std, self.device)
        return PlanarWeight(self._blocks[name].roll(next(self._turns), 0), block_type)


def _set(module: Any, weight: GpuWeight) -> None:
    if isinstance(weight, Tensor):
        module.weight = nn.Parameter(weight, requires_grad=False)
    else:
        set_quantized_weight(module, weight)
