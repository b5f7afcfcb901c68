"""Find the matrices of releases that are small floats, or codes in a table: FP8, MXFP4, NVFP4, bitsandbytes."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import torch

from llama.checkpoint.release_tensors import FLOATS, Found, ReleaseFolder, ReleaseModule, integers
from llama.quantization.released import FloatMatrix, ReleasedMatrix
from llama.quantization.released_layouts import fp8_values, table_values

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_DESCRIPTION_BYTES = 1 << 16


def find_fp8(folder: ReleaseFolder) -> Found:
    tile = tile_of(folder, "weight_block_size", folder.settings.get("weight_block_size"))
    for end in ("weight_scale", "weight_scale_inv"):  # either is what values are multiplied by
        for module in folder.modules(end):
            yield module, fp8_matrix(module, end, tile, set())


def tile_of(folder: ReleaseFolder, key: str, value: Any) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, as the configuration has them."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise folder.error(f"{key} must be two whole numbers from 1, got {value!r}")
    return value[0], value[1]


def fp8_matrix(module: ReleaseModule, end: str, tile: tuple[int, int] | None, sizes: set[int]) -> ReleasedMatrix:
    """Take 8-bit floats with a scale for the matrix, for each row, each group of a row, or each tile."""
    shape = module.matrix("weight", FP8)
    if tile is not None:
        n, m = (-(-size // part) for size, part in zip(shape, tile, strict=True))
        scales = module.take(end, (*FLOATS, torch.float8_e8m0fnu), (n, m))
        what = f"tiles of {tile[0]} x {tile[1]}"
    else:
        tile = 1, module.groups(end, FLOATS, shape, sizes)
        scales = module.parts[end]
        what = "groups of a row" if tile[1] == shape[1] else f"groups of {tile[1]}"
    values = scales.float()
    if not bool(values.isfinite().all()) or not bool(values.all()):
        raise ValueError(f"{module.label}.{end} has scales that are 0 or not finite: download it again")
    module.parts["scale"] = module.parts.pop(end)
    return FloatMatrix(module.label, module.parts, shape, f"fp8 in {what}", functools.partial(fp8_values, tile=tile))


def find_mxfp4(folder: ReleaseFolder) -> Found:
    """As GPT-OSS has its experts: 16 bytes, and an exponent, for each 32 values."""
    for blocks, exponents in (("weight_blocks", "weight_scales"), ("weight.blocks", "weight.scales")):
        for module in folder.modules(blocks):
            found = module.peek(blocks)
            n_rows, n_groups = found.shape[:2] if found is not None and found.dim() == 3 and found.numel() else (0, 0)
            packed = module.take(blocks, (torch.uint8,), (n_rows, n_groups, 16))
            scale = module.take(exponents, (torch.uint8, torch.float8_e8m0fnu), (n_rows, n_groups))
            module.parts = {"weight_packed": packed.flatten(1), "weight_scale": scale}
            yield module, integers(module, (n_rows, n_groups * 32), "mxfp4", "MXFP4", 5, 32, True)


def find_modelopt(folder: ReleaseFolder) -> Found:
    """NVIDIA's: FP8 with a scale a matrix, or NVFP4 whose scales of groups are multiplied by one of the matrix."""
    algorithm = folder.settings.get("quant_algo")
    if algorithm not in ("FP8", "NVFP4"):
        raise folder.error(f"quant_algo {algorithm!r} is not supported: only FP8 and NVFP4 are")
    for module in folder.modules("weight_scale_2"):
        n_rows, n_bytes = module.matrix("weight", (torch.uint8,))
        shape = n_rows, 2 * n_bytes
        module.take("weight_scale_2", FLOATS, (1,), ())
        size = module.groups("weight_scale", (torch.float8_e4m3fn,), shape, {16})
        yield module, integers(module, shape, "modelopt nvfp4", "NVFP4", 5, size, True)
    for module in folder.modules("weight_scale"):
        yield module, fp8_matrix(module, "weight_scale", None, set())


def find_bitsandbytes(folder: ReleaseFolder) -> Found:
    for module in folder.modules("SCB"):
        shape = module.matrix("weight", (torch.int8,))
        module.take("SCB", FLOATS, (shape[0],))
        yield module, integers(module, shape, "llm.int8", "LLM.int8", 8, shape[1], True)
    for form in ("nf4", "fp4"):
        end = f"weight.quant_state.bitsandbytes__{form}"
        for module in folder.modules(end):
            yield module, _table(module, end, form)


def _table(module: ReleaseModule, end: str, form: str) -> ReleasedMatrix:
    described = module.peek(end)
    said = module.take_bytes(end, described.nbytes if described is not None else 0)
    try:
        if len(said) > MAX_DESCRIPTION_BYTES:
            raise ValueError
        state = json.loads(bytes(said.tolist()))
        shape, block_len = tuple(state["shape"]), state["blocksize"]
        nested = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
        sizes = (*shape, block_len, nested[0])
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in sizes) or not math.isfinite(nested[1]):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{module.label}.{end} is no description of a matrix: download it again") from None
    n_values = shape[0] * shape[1]
    n_bytes, n_blocks = -(-n_values // 2), -(-n_values // block_len)
    module.take_bytes("weight", n_bytes)
    module.take("weight.quant_map", FLOATS, (16,))
    is_nested = module.has("weight.nested_absmax")
    module.take("weight.absmax", (torch.uint8,) if is_nested else FLOATS, (n_blocks,))
    if is_nested:
        module.take("weight.nested_absmax", FLOATS, (-(-n_blocks // nested[0]),))
        module.take("weight.nested_quant_map", FLOATS, (256,))
    module.parts = {end.removeprefix("weight."): part for end, part in module.parts.items()}
    decode = functools.partial(table_values, block_len=block_len, nested=nested)
    return FloatMatrix(module.label, module.parts, shape, f"{form} in groups of {block_len}", decode)
