"""Read what a Hugging Face folder says of how its weights are quantized: in config.json, or in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama.config import read_json_object

BLOCKS_METHOD = "ggml_blocks"  # the quant_method of weights in blocks, where others say gptq or awq: see D22
# The quant_methods whose matrices releases.py finds.
RELEASE_METHODS = (
    "gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes", "mxfp4", "modelopt", "modelopt_fp4",
)  # fmt: skip

_CODEBOOKS = "its weights are sums of vectors in learned codebooks"
_OWN_LAYOUT = "its codes lie in an order of its own kernels"
# What is known of others, for the message that refuses them.
REFUSED_METHODS = {
    "aqlm": _CODEBOOKS,
    "vptq": _CODEBOOKS,
    "quip": f"{_CODEBOOKS}, and its activations are rotated",
    "higgs": "its weights are points of a lattice, and are rotated",
    "spqr": "it keeps outliers in a sparse matrix",
    "exl2": "the bits of its rows differ, and are packed for its own kernels",
    "exl3": "its weights are paths in a trellis, and are rotated",
    "hqq": "its zero points are fractions, and its groups are packed for its own kernels",
    "eetq": _OWN_LAYOUT,
    "marlin": _OWN_LAYOUT,
    "gptq_marlin": _OWN_LAYOUT,
    "gptq_marlin_24": "half of its weights are left out (sparse 2:4)",
    "torchao": "its tensors are pickled objects of that library",
    "quanto": "its tensors are objects of that library",
    "quark": "its formats are many, and none is read",
    "bitnet": "its weights are of three values, and its activations are rounded",
    "auto-round": "its own formats are not read: export it as auto_gptq or llm_compressor",
}

# Files of AutoGPTQ, of optimum and of AutoAWQ, and the quant_method that they stand for. Who has saved one later with
# transformers has it in config.json as well, which is what counts then.
BESIDE = {"quantize_config.json": "gptq", "quantization_config.json": "gptq", "quant_config.json": "awq"}
AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}  # as AutoAWQ's own file has them
MODELOPT_FILE = "hf_quant_config.json"


class ReleaseConfig(NamedTuple):
    """What a folder says of a quantized release: the settings, the file that has them, and the key they are under."""

    settings: Mapping[str, Any]
    file: str = "config.json"
    key: str = "quantization_config"


def read_release(folder: Path) -> ReleaseConfig | None:
    """Return what a folder says of a quantized release of RELEASE_METHODS; None where the weights are none.

    Raise ValueError that says why, where they are quantized in another way.
    """
    config = folder / "config.json"
    settings = read_json_object(config).get("quantization_config")
    if settings is None:
        return _read_beside(folder)
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict) and method in RELEASE_METHODS:
        return ReleaseConfig(settings)
    if method == BLOCKS_METHOD:
        return None
    reason = f", as {REFUSED_METHODS[method]}" if isinstance(method, str) and method in REFUSED_METHODS else ""
    raise ValueError(
        f"{config} describes {method!r} quantized weights, which are not supported{reason}: only "
        f"{', '.join(RELEASE_METHODS)} are; or use unquantized ones"
    )


def _read_beside(folder: Path) -> ReleaseConfig | None:
    for file, method in BESIDE.items():
        if (folder / file).is_file():
            said = read_json_object(folder / file)
            keys = AWQ_KEYS if method == "awq" else {}
            settings = {keys.get(key, key): value for key, value in said.items()}
            return ReleaseConfig({**settings, "quant_method": method}, file, "")
    if (folder / MODELOPT_FILE).is_file():
        found = read_json_object(folder / MODELOPT_FILE).get("quantization")
        if not isinstance(found, dict):
            raise ValueError(f"{folder / MODELOPT_FILE} must have an object `quantization`, got {found!r}")
        return ReleaseConfig({**found, "quant_method": "modelopt"}, MODELOPT_FILE, "quantization")
    return None
