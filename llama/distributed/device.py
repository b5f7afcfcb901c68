"""The device that a rank computes on, and the dtype that it computes in."""

from __future__ import annotations

import platform

import torch

from llama.distributed.job import local_rank, local_world_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return this rank's device: the one named, else the first that exists of CUDA, MPS and CPU.

    Raise ValueError where the device named does not exist, or not for every rank of the host.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cuda, mps or cpu, got {str(name)!r}") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but this machine or torch build has no MPS: use --device cpu")
    if device.type == "cuda":
        return _choose_cuda_device(device)
    if device.type not in ("mps", "cpu"):
        raise ValueError(f"device must be cuda, mps or cpu, got {str(name)!r}")
    return device


def _choose_cuda_device(device: torch.device) -> torch.device:
    """Return this rank's own CUDA device, and make it torch's current one."""
    if not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device: use --device cpu")
    ranks, found = local_world_size(), torch.cuda.device_count()
    if ranks > found:
        raise ValueError(f"{ranks} ranks on this host, but {found} CUDA devices: start {found}, or use --device cpu")
    index = local_rank() if ranks > 1 or device.index is None else device.index
    if index >= found:
        raise ValueError(f"device cuda:{index} was asked for, but this host has {found} CUDA devices, from cuda:0")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(
    name: str | torch.dtype | None, device: torch.device, stored: torch.dtype, quantized: bool = False
) -> torch.dtype:
    """Return the dtype to compute in: the one named, else the device's best for weights stored in `stored` (see D12).

    quantized: matrices are held in blocks, or were stored in them. Raise ValueError for a name that is not one of
    DTYPES.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name is not None:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.bfloat16 if stored == torch.bfloat16 and not quantized and _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    """Tell whether this CPU has instructions for products of bf16."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
