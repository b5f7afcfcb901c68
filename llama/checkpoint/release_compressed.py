"""Find the matrices of compressed-tensors' releases: packed integers, bytes, 8-bit and 4-bit floats."""

from __future__ import annotations

from typing import Any

import torch

from llama.checkpoint.release_floats import fp8_matrix, tile_of
from llama.checkpoint.release_tensors import FLOATS, Found, ReleaseFolder, ReleaseModule, group_order, integers
from llama.quantization.released import ReleasedMatrix

# What compressed-tensors calls the ways of storing weights that are read here.
COMPRESSED_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized"),
)


def find_compressed(folder: ReleaseFolder) -> Found:
    settings = folder.settings
    schemes = settings.get("config_groups")
    if not isinstance(schemes, dict) or not all(isinstance(scheme, dict) for scheme in schemes.values()):
        raise folder.error("config_groups must be an object of objects")
    forms = {str(each.get("format") or settings.get("format")) for each in (*schemes.values(), settings)}
    for form in sorted(forms - set(COMPRESSED_FORMATS)):
        raise folder.error(f"format {form!r} is not supported: only {', '.join(COMPRESSED_FORMATS)} are")
    if settings.get("transform_config"):
        raise folder.error("transform_config, rotations while the model runs, is not supported")
    if folder.object("sparsity_config").get("format", "dense") != "dense":
        raise folder.error("sparsity_config is not supported: use a release that is not sparse")
    weights = [scheme["weights"] for scheme in schemes.values() if isinstance(scheme.get("weights"), dict)]
    sizes = {each["group_size"] for each in weights if type(each.get("group_size")) is int and each["group_size"] > 0}
    bits = [each.get("num_bits") for each in weights]
    for module in folder.modules("weight_packed"):
        yield module, _packed(folder, module, sizes, bits)
    tiles = [each.get("block_structure") or [128, 128] for each in weights if each.get("strategy") == "block"]
    tile = tile_of(folder, "block_structure", tiles[0] if tiles else None)
    for module in folder.modules("weight_scale"):
        weight = folder.tensors.get(f"{module.name}.weight")
        if weight is not None and weight.dtype == torch.int8:
            yield module, _int8(module, sizes)
        else:
            yield module, fp8_matrix(module, "weight_scale", tile, sizes)


def _packed(folder: ReleaseFolder, module: ReleaseModule, sizes: set[int], all_bits: list[Any]) -> ReleasedMatrix:
    packed = module.take("weight_packed", (torch.int32, torch.uint8))
    n_rows, words = packed.shape
    if packed.dtype == torch.uint8:
        shape = n_rows, 2 * words
        if module.has("weight_global_scale"):
            module.take("weight_global_scale", FLOATS, (1,), ())
            size = module.groups("weight_scale", (torch.float8_e4m3fn,), shape, {16})
            return integers(module, shape, "nvfp4", "NVFP4", 5, size, True)
        size = module.groups("weight_scale", (torch.uint8, torch.float8_e8m0fnu), shape, {32})
        return integers(module, shape, "mxfp4", "MXFP4", 5, size, True)
    n_columns = int(module.take("weight_shape", (torch.int64, torch.int32), (2,))[1])
    found = [bits for bits in (4, 8) if bits in all_bits and words == -(-n_columns * bits // 32)]
    if not found or module.parts["weight_shape"].tolist() != [n_rows, n_columns]:
        raise ValueError(
            f"{module.label}.weight_packed is of {n_rows} rows of {words} words, which are no "
            f"{module.parts['weight_shape'].tolist()} values of {' or '.join(map(str, all_bits))} "
            "bits; only 4 and 8 bits are supported"
        )
    shape, bits = (n_rows, n_columns), found[0]
    size = module.groups("weight_scale", FLOATS, shape, sizes)
    n_groups = n_columns // size
    order = group_order(module, "weight_g_idx", n_columns, size, n_groups)
    symmetric = not module.has("weight_zero_point")
    if not symmetric:
        module.take("weight_zero_point", (torch.int32,), (-(-n_rows * bits // 32), n_groups))
    layout = "packed" if symmetric else "packed with zeros"
    return integers(module, shape, layout, f"int{bits}", bits, size, symmetric, order)


def _int8(module: ReleaseModule, sizes: set[int]) -> ReleasedMatrix:
    n_rows, n_columns = shape = module.matrix("weight", (torch.int8,))
    size = module.groups("weight_scale", FLOATS, shape, sizes)
    symmetric = not module.has("weight_zero_point")
    if not symmetric:
        n_groups = n_columns // size
        zeros = module.take("weight_zero_point", (torch.int8,), (n_rows, n_groups), (n_rows,), (1,), (1, 1), ())
        module.parts["weight_zero_point"] = zeros if n_groups > 1 else zeros.reshape(-1, 1).expand(n_rows, 1)
    layout = "int8" if symmetric else "int8 with zeros"
    return integers(module, shape, layout, "int8", 8, size, symmetric)
