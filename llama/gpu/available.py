"""Whether Triton kernels run on a device; the kernels themselves are imported only where they do."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# Ampere: the oldest with bfloat16 and with tensor cores as the kernels use them.
OLDEST = (8, 0)
# Tokens in a vocabulary: up to 2**44 units of mass each are summed in int64 (sampling_kernels.py).
LARGEST_VOCAB = 2**18


@functools.cache  # asked for every product
def has_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton run on this device; LLAMA_KERNELS=0 says that none are to."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if os.environ.get("LLAMA_KERNELS") == "0":
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= OLDEST
