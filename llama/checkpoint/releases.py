"""Find the matrices of a quantized release among a folder's tensors: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes.

What a matrix is made of is told by the tensors, and checked against `quantization_config`; only headers, the order of
groups and bitsandbytes' descriptions are read. Knows Hugging Face's names, and nothing of the architecture.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.base import dtype_name, some_of
from llama.checkpoint.release_tensors import FLOATS, ReleaseFolder, ReleaseModule, Settings
from llama.quantization.released import FloatMatrix, IntegerMatrix, ReleasedMatrix
from llama.quantization.released_layouts import INTEGER_LAYOUTS, fp8_values, table_values

log = logging.getLogger("llama")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Tensors that say how activations and caches are rounded: here they are not.
UNUSED = re.compile(
    r".+\.(activation_scale|input_scale|input_scale_ub|input_zero_point|input_global_scale|output_scale"
    r"|output_zero_point|[qkv]_scale|[qkv]_zero_point|weight_format)"
)
# What compressed-tensors calls the ways of storing weights that are read here.
COMPRESSED_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized"),
)
MAX_DESCRIPTION_BYTES = 1 << 16


def find_matrices(folder: Path, tensors: MutableMapping[str, Tensor], settings: Settings) -> dict[str, ReleasedMatrix]:
    """Take the quantized matrices out of a folder's tensors; return them by the names that plain ones would have.

    Raise ValueError that names a form which is not supported, or what does not fit.
    """
    method = settings.get("quant_method")
    matrices = {
        f"{module.name}.weight": matrix
        for module, matrix in METHODS[str(method)](ReleaseFolder(folder, tensors, settings))
    }
    unused = [name for name in tensors if UNUSED.fullmatch(name)]
    if unused:
        log.info("%s has scales of activations, which are not rounded here: %s", folder, some_of(unused))
    for name in unused:
        del tensors[name]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {name} is {dtype_name(tensor.dtype)}, but no quantized matrix of {method} has it: its "
                "scales are missing, or quantization_config does not belong to these weights"
            )
    if not matrices:
        log.warning("%s: quantization_config says %s, but no matrix is quantized", folder, method)
    return matrices


Found = Iterator[tuple[ReleaseModule, ReleasedMatrix]]


def _gptq(folder: ReleaseFolder) -> Found:
    bits, settings = folder.number("bits", 4, 8), folder.settings
    form = settings.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or folder.is_true("is_marlin_format"):
        raise folder.error(f"checkpoint_format {form!r} is not supported: only gptq and gptq_v2 are")
    dynamic = settings.get("dynamic") or {}
    if any(not str(rule).startswith("-:") for rule in dynamic):
        raise folder.error("dynamic, other bits for some modules, is not supported")
    act_order, symmetric = folder.is_true("desc_act"), folder.is_true("sym")
    for module in folder.modules("qweight"):
        words, n_rows = module.matrix("qweight", (torch.int32,))
        shape = n_rows, words * 32 // bits
        size = _group_size(folder, shape[1])
        n_groups = -(-shape[1] // size)
        module.take("scales", FLOATS, (n_groups, n_rows))
        module.take("qzeros", (torch.int32,), (n_groups, -(-n_rows * bits // 32)))
        order = _group_order(module, "g_idx", shape[1], size, n_groups, needed=act_order and n_groups > 1)
        yield module, _integers(module, shape, form, f"GPTQ int{bits}", bits, size, symmetric, order)


def _group_size(folder: ReleaseFolder, n_columns: int) -> int:
    """Return the configuration's group_size, where -1 stands for whole rows."""
    size = folder.number("group_size")
    if size != -1 and size < 1:
        raise folder.error(f"group_size must be -1 or at least 1, got {size}")
    return n_columns if size == -1 else size


def _group_order(
    module: ReleaseModule, end: str, n_columns: int, size: int, n_groups: int, needed: bool = False
) -> Tensor | None:
    """Return the group of each column, or None where groups are columns one after another."""
    if not needed and not module.has(end):
        return None
    order = module.take(end, (torch.int32, torch.int64), (n_columns,))
    if int(order.min()) < 0 or int(order.max()) >= n_groups:
        raise ValueError(
            f"{module.label}.{end} has groups {int(order.min())} to {int(order.max())}, there are {n_groups}: download "
            "it again"
        )
    return None if torch.equal(order.long(), torch.arange(n_columns) // size) else order.long()


def _integers(
    module: ReleaseModule,
    shape: tuple[int, int],
    layout: str,
    name: str,
    bits: int,
    size: int,
    symmetric: bool,
    order: Tensor | None = None,
) -> IntegerMatrix:
    groups = "a row" if size == shape[1] else f"{size}"
    kind = f"{name} in groups of {groups}" + " in another order" * (order is not None)
    return IntegerMatrix(module.label, module.parts, shape, INTEGER_LAYOUTS[layout], kind, bits, size, symmetric, order)


def _awq(folder: ReleaseFolder) -> Found:
    folder.number("bits", 4)
    version = folder.settings.get("version") or "gemm"
    if str(version).lower() != "gemm":
        raise folder.error(f"version {version!r} is not supported: only gemm is")
    symmetric = folder.settings.get("zero_point") is False
    for module in folder.modules("qweight"):
        n_columns, words = module.matrix("qweight", (torch.int32,))
        size = _group_size(folder, n_columns)
        if n_columns % size:
            raise ValueError(
                f"{module.label} has rows of {n_columns} values, which groups of {size} do not divide: weights and "
                "quantization_config do not belong together"
            )
        module.take("scales", FLOATS, (n_columns // size, words * 8))
        module.take("qzeros", (torch.int32,), (n_columns // size, words))
        yield module, _integers(module, (words * 8, n_columns), "awq", "AWQ int4", 4, size, symmetric)


def _compressed(folder: ReleaseFolder) -> Found:
    settings = folder.settings
    schemes = settings.get("config_groups")
    if not isinstance(schemes, dict) or not all(isinstance(scheme, dict) for scheme in schemes.values()):
        raise folder.error("config_groups must be an object of objects")
    forms = {str(each.get("format") or settings.get("format")) for each in (*schemes.values(), settings)}
    for form in sorted(forms - set(COMPRESSED_FORMATS)):
        raise folder.error(f"format {form!r} is not supported: only {', '.join(COMPRESSED_FORMATS)} are")
    if settings.get("transform_config"):
        raise folder.error("transform_config, rotations while the model runs, is not supported")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise folder.error("sparsity_config is not supported: use a release that is not sparse")
    weights = [scheme["weights"] for scheme in schemes.values() if isinstance(scheme.get("weights"), dict)]
    sizes = {each["group_size"] for each in weights if type(each.get("group_size")) is int and each["group_size"] > 0}
    bits = {each.get("num_bits") for each in weights}
    for module in folder.modules("weight_packed"):
        yield module, _packed(folder, module, sizes, bits)
    tiles = [each.get("block_structure") or [128, 128] for each in weights if each.get("strategy") == "block"]
    tile = _tile(folder, "block_structure", tiles[0] if tiles else None)
    for module in folder.modules("weight_scale"):
        weight = folder.tensors.get(f"{module.name}.weight")
        if weight is not None and weight.dtype == torch.int8:
            yield module, _int8(module, sizes)
        else:
            yield module, _fp8_matrix(module, "weight_scale", tile, sizes)


def _packed(folder: ReleaseFolder, module: ReleaseModule, sizes: set[int], all_bits: set[Any]) -> ReleasedMatrix:
    packed = module.take("weight_packed", (torch.int32, torch.uint8))
    n_rows, words = packed.shape
    if packed.dtype == torch.uint8:
        shape = n_rows, 2 * words
        if module.has("weight_global_scale"):
            module.take("weight_global_scale", FLOATS, (1,), ())
            size = module.groups("weight_scale", (torch.float8_e4m3fn,), shape, {16})
            return _integers(module, shape, "nvfp4", "NVFP4", 5, size, True)
        size = module.groups("weight_scale", (torch.uint8, torch.float8_e8m0fnu), shape, {32})
        return _integers(module, shape, "mxfp4", "MXFP4", 5, size, True)
    n_columns = int(module.take("weight_shape", (torch.int64, torch.int32), (2,))[1])
    found = [bits for bits in (4, 8) if bits in all_bits and words == -(-n_columns * bits // 32)]
    if not found or module.parts["weight_shape"].tolist() != [n_rows, n_columns]:
        raise ValueError(
            f"{module.label}.weight_packed is of {n_rows} rows of {words} words, which are no "
            f"{module.parts['weight_shape'].tolist()} values of {' or '.join(map(str, sorted(all_bits, key=str)))} "
            "bits; only 4 and 8 bits are supported"
        )
    shape, bits = (n_rows, n_columns), found[0]
    size = module.groups("weight_scale", FLOATS, shape, sizes)
    n_groups = n_columns // size
    order = _group_order(module, "weight_g_idx", n_columns, size, n_groups)
    symmetric = not module.has("weight_zero_point")
    if not symmetric:
        module.take("weight_zero_point", (torch.int32,), (-(-n_rows * bits // 32), n_groups))
    layout = "packed" if symmetric else "packed with zeros"
    return _integers(module, shape, layout, f"int{bits}", bits, size, symmetric, order)


def _int8(module: ReleaseModule, sizes: set[int]) -> ReleasedMatrix:
    n_rows, n_columns = shape = module.matrix("weight", (torch.int8,))
    size = module.groups("weight_scale", FLOATS, shape, sizes)
    symmetric = not module.has("weight_zero_point")
    if not symmetric:
        n_groups = n_columns // size
        zeros = module.take("weight_zero_point", (torch.int8,), (n_rows, n_groups), (n_rows,), (1,), (1, 1), ())
        module.parts["weight_zero_point"] = zeros if n_groups > 1 else zeros.reshape(-1, 1).expand(n_rows, 1)
    layout = "int8" if symmetric else "int8 with zeros"
    return _integers(module, shape, layout, "int8", 8, size, symmetric)


def _fp8(folder: ReleaseFolder) -> Found:
    tile = _tile(folder, "weight_block_size", folder.settings.get("weight_block_size"))
    for end in ("weight_scale", "weight_scale_inv"):  # either is what values are multiplied by
        for module in folder.modules(end):
            yield module, _fp8_matrix(module, end, tile, set())


def _tile(folder: ReleaseFolder, key: str, value: Any) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, as the configuration has them."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(size) is not int or size < 1 for size in value):
        raise folder.error(f"{key} must be two whole numbers from 1, got {value!r}")
    return value[0], value[1]


def _fp8_matrix(module: ReleaseModule, end: str, tile: tuple[int, int] | None, sizes: set[int]) -> ReleasedMatrix:
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


def _bitsandbytes(folder: ReleaseFolder) -> Found:
    for module in folder.modules("SCB"):
        shape = module.matrix("weight", (torch.int8,))
        module.take("SCB", FLOATS, (shape[0],))
        yield module, _integers(module, shape, "llm.int8", "LLM.int8", 8, shape[1], True)
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


# How the matrices of each quant_method are found.
METHODS: dict[str, Callable[[ReleaseFolder], Found]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
}
