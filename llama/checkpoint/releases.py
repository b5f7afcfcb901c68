"""Find the matrices of a quantized release among a folder's tensors: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes.

What a matrix is made of is told by the tensors, and checked against `quantization_config`; only headers, the order of
groups and bitsandbytes' descriptions are read. Knows Hugging Face's names, and nothing of the architecture.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import dtype_name, some_of
from llama.checkpoint.release_compressed import find_compressed
from llama.checkpoint.release_floats import find_bitsandbytes, find_fp8, find_modelopt, find_mxfp4
from llama.checkpoint.release_tensors import FLOATS, Found, ReleaseFolder, Settings, group_order, integers
from llama.quantization.released import ReleasedMatrix

log = logging.getLogger("llama")

# Tensors that say how activations and caches are rounded: here they are not.
UNUSED = re.compile(
    r".+\.(activation_scale|input_scale|input_scale_ub|input_zero_point|input_global_scale|output_scale"
    r"|output_zero_point|(q|k|v|kv)_scale|[qkv]_zero_point|weight_format)"
)


def find_matrices(
    folder: Path,
    tensors: MutableMapping[str, Tensor],
    settings: Settings,
    file: str = "config.json",
    key: str = "quantization_config",
) -> dict[str, ReleasedMatrix]:
    """Take the quantized matrices out of a folder's tensors; return them by the names that plain ones would have.

    file, key: where the settings are said, for messages.
    Raise ValueError that names a form which is not supported, or what does not fit.
    """
    method = settings.get("quant_method")
    release = ReleaseFolder(folder, tensors, settings, file, key)
    matrices = {f"{module.name}.weight": matrix for module, matrix in METHODS[str(method)](release)}
    unused = [name for name in tensors if UNUSED.fullmatch(name)]
    if unused:
        log.info("%s has scales of activations, which are not rounded here: %s", folder, some_of(unused))
    for name in unused:
        del tensors[name]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {name} is {dtype_name(tensor.dtype)}, but no quantized matrix of {method} has it: its "
                f"scales are missing, or {release.said_in} does not belong to these weights"
            )
    if not matrices:
        log.warning("%s: %s says %s, but no matrix is quantized", folder, release.said_in, method)
    cache = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    if cache:
        log.info("%s: the release rounds keys and values in its cache, here they are not rounded", folder)
    return matrices


def _gptq(folder: ReleaseFolder) -> Found:
    bits, settings = folder.number("bits", 4, 8), folder.settings
    form = "gptq" if settings.get("checkpoint_format") is None else settings["checkpoint_format"]
    if form not in ("gptq", "gptq_v2") or folder.is_true("is_marlin_format"):
        raise folder.error(f"checkpoint_format {form!r} is not supported: only gptq and gptq_v2 are")
    if any(not str(rule).startswith("-:") for rule in folder.object("dynamic")):
        raise folder.error("dynamic, other bits for some modules, is not supported")
    act_order, symmetric = folder.is_true("desc_act"), folder.is_true("sym")
    for module in folder.modules("qweight"):
        words, n_rows = module.matrix("qweight", (torch.int32,))
        shape = n_rows, words * 32 // bits
        size = min(_group_size(folder, shape[1]), shape[1])
        n_groups = -(-shape[1] // size)
        module.take("scales", FLOATS, (n_groups, n_rows))
        module.take("qzeros", (torch.int32,), (n_groups, -(-n_rows * bits // 32)))
        order = group_order(module, "g_idx", shape[1], size, n_groups, needed=act_order and n_groups > 1)
        layout = _version(module.parts["qzeros"], bits, form) if symmetric else form
        yield module, integers(module, shape, layout, f"GPTQ int{bits}", bits, size, symmetric, order)


def _version(zeros: Tensor, bits: int, said: str) -> str:
    """Return by the first zero point of a symmetric matrix which version it is of: GPTQModel has written v2 as v1."""
    middle = 1 << bits - 1
    return {middle: "gptq_v2", middle - 1: "gptq"}.get(int(zeros[0, 0]) & 2 * middle - 1, said)


def _group_size(folder: ReleaseFolder, n_columns: int) -> int:
    """Return the configuration's group_size, where -1 stands for whole rows."""
    size = folder.number("group_size")
    if size != -1 and size < 1:
        raise folder.error(f"group_size must be -1 or at least 1, got {size}")
    return n_columns if size == -1 else size


def _awq(folder: ReleaseFolder) -> Found:
    folder.number("bits", 4)
    version = folder.settings.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise folder.error(f"version {version!r} is not supported: only gemm is")
    symmetric = not folder.is_true("zero_point") and folder.settings.get("zero_point") is not None
    for module in folder.modules("qweight"):
        n_columns, words = module.matrix("qweight", (torch.int32,))
        size = _group_size(folder, n_columns)
        if n_columns % size:
            raise ValueError(
                f"{module.label} has rows of {n_columns} values, which groups of {size} do not divide: weights and "
                f"{folder.said_in} do not belong together"
            )
        module.take("scales", FLOATS, (n_columns // size, words * 8))
        module.take("qzeros", (torch.int32,), (n_columns // size, words))
        yield module, integers(module, (words * 8, n_columns), "awq", "AWQ int4", 4, size, symmetric)


# How the matrices of each quant_method are found.
METHODS: dict[str, Callable[[ReleaseFolder], Found]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": find_compressed,
    "fp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "bitsandbytes": find_bitsandbytes,
    "mxfp4": find_mxfp4,
    "modelopt": find_modelopt,
    "modelopt_fp4": find_modelopt,
}
