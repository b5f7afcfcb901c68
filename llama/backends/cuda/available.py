"""Whether Triton kernels run on a device; the kernels themselves are imported only where they do."""

from __future__ import annotations

import functools
import logging
import os

import torch

# Ampere: the oldest with bfloat16 and with tensor cores as the kernels use them.
OLDEST = (8, 0)
# Tokens in a vocabulary: up to 2**44 units of mass each are summed in int64 (sampling_kernels.py).
LARGEST_VOCAB = 2**18


log = logging.getLogger("llama")


@functools.cache  # its answer does not change
def has_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton run on this device; a warning says why not, where they might.

    LLAMA_KERNELS=0 says that none are to.
    """
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if os.environ.get("LLAMA_KERNELS") == "0" or torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        from llama.backends.cuda.elementwise import silu_and_mul

        with torch.cuda.device(device):
            silu_and_mul(torch.zeros(1, 2, dtype=torch.float32, device=device)).item()
    except Exception as error:  # there is no Triton, or it finds no C compiler, Python.h or driver to its liking
        why = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("no GPU kernels, so torch's operations do the work: Triton does not run here: %s", why)
        return False
    return True
