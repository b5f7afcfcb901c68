"""Find the matrices of Meta's own quantized releases, SpinQuant's and QLoRA's of Llama 3.2, and what adapts them.

meta-llama/llama-models and pytorch/executorch say what their tensors mean; both round activations as well, which is not
done here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.lora import LowRankPair
from llama.checkpoint.names import module_name
from llama.checkpoint.release_tensors import FLOATS, ReleaseFolder, ReleaseModule
from llama.checks import check_int, check_number
from llama.quantization.released import FloatMatrix, IntegerMatrix, ReleasedMatrix
from llama.quantization.released_layouts import INTEGER_LAYOUTS, hadamard_values

log = logging.getLogger("llama")

SCHEME = "int4_weight_int8_dynamic_activation"
TABLES = ("tok_embeddings", "output")  # 8 bits, with a scale a row


def find_meta_matrices(
    folder: Path, tensors: MutableMapping[str, Tensor], params: Mapping[str, Any]
) -> dict[str, ReleasedMatrix]:
    """Take the quantized matrices out of a shard's tensors; return them by the names that plain ones would have.

    SpinQuant's w2 is of inputs that a Hadamard matrix has rotated while the model runs; here it is rotated back.
    Raise ValueError that names a form which is not supported, or what does not fit.
    """
    settings = params.get("quantization_args")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / 'params.json'}: quantization_args must be an object, got {settings!r}")
    release = ReleaseFolder(folder, tensors, settings, "params.json", "quantization_args")
    if settings.get("scheme") != SCHEME:
        raise release.error(f"scheme {settings.get('scheme')!r} is not supported: only {SCHEME!r} is")
    size, spinquant = release.number("group_size"), release.is_true("spinquant")
    if size < 1:
        raise release.error(f"group_size must be at least 1, got {size}")
    if spinquant and params.get("lora_args") is not None:
        raise release.error("spinquant beside lora_args is not supported")
    matrices: dict[str, ReleasedMatrix] = {}
    for module in release.modules("scales"):
        shape = module.matrix("weight", (torch.int8,))
        is_table = module_name(f"{module.name}.weight") in TABLES
        found = module.groups("scales", FLOATS, shape, set() if is_table else {size})
        if not is_table and found != size:
            raise release.error(f"group_size {size} is not that of {module.name}, whose groups are of {found}")
        _check_zeros(module, found)
        bits = 8 if is_table else 4
        name, layout = f"{module.name}.weight", INTEGER_LAYOUTS["meta int8" if is_table else "meta int4"]
        groups = "a row" if is_table else str(size)
        kind = f"int{bits} in groups of {groups}"
        matrix = IntegerMatrix(module.label, module.parts, shape, layout, kind, bits, found, symmetric=True)
        matrices[name] = matrix if not spinquant or module_name(name) != "w2" else _rotated_back(matrix)
    plain = [name for name in tensors if module_name(name) == "w2" and name.endswith(".weight")]
    if spinquant and plain:
        raise ValueError(f"{folder}: {plain[0]} is not quantized, though params.json says that SpinQuant rotated it")
    log.info("%s: the release rounds activations to 8 bits, here they are not rounded", folder)
    return matrices


def _check_zeros(module: ReleaseModule, size: int) -> None:
    """Take zero points, which torchao stores beside scales though there are none."""
    if module.has("zeros"):
        shape = module.parts["weight"].shape
        zeros = module.take("zeros", (*FLOATS, torch.int8, torch.int32, torch.int64), (shape[0], shape[1] // size))
        if zeros.any():
            raise ValueError(f"{module.label}.zeros are not all 0: zero points are not supported")
        del module.parts["zeros"]


def _rotated_back(matrix: IntegerMatrix) -> FloatMatrix:
    n_columns = matrix.shape[1]
    if n_columns & (n_columns - 1):
        raise ValueError(
            f"{matrix.name} has rows of {n_columns} values, which no Hadamard matrix of a power of two rotates: "
            "SpinQuant of other sizes is not supported"
        )
    decode = functools.partial(hadamard_values, matrix=matrix)
    return FloatMatrix(matrix.name, matrix.parts, matrix.shape, f"{matrix.kind}, rotated", decode)


def find_adapters(
    folder: Path, tensors: MutableMapping[str, Tensor], params: Mapping[str, Any]
) -> dict[str, LowRankPair]:
    """Take QLoRA's adapters out of a shard's tensors; return them by the names of the matrices that they add to."""
    settings = params.get("lora_args")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / 'params.json'}: lora_args must be an object, got {settings!r}")
    rank: Any = settings.get("rank")
    scale: Any = settings.get("scale")
    try:
        check_int("rank", rank)
        check_number("scale", scale)
    except ValueError as error:
        raise ValueError(f"{folder / 'params.json'}: lora_args: {error}") from None
    release = ReleaseFolder(folder, tensors, settings, "params.json", "lora_args")
    pairs = {}
    for module in release.modules("adaptor.A.weight"):
        name = f"{module.name}.weight"
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"{module.label} has an adaptor, but no matrix: download it again")
        n_rows, n_columns = tensors[name].shape
        a = module.take("adaptor.A.weight", FLOATS, (rank, n_columns))
        b = module.take("adaptor.B.weight", FLOATS, (n_rows, rank))
        pairs[name] = LowRankPair(a, b, float(scale))
    if not pairs:
        raise ValueError(f"{folder} has no adaptors, though params.json has lora_args: they do not belong together")
    return pairs
