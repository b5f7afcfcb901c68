"""The layers of a model compiled by torch (Inductor): set as `Transformer.fused`, from outside, where --compile asks.

Only steps of one token a row are compiled: what happens once for a prompt is not worth a compiler's time.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.model import Transformer

log = logging.getLogger("llama")


def has_own_kernels(model: Transformer) -> bool:
    """Whether kernels of ours run a model's layers, and not torch's operations, compiled or not."""
    return model.fused is not None and not isinstance(model.fused, CompiledLayers)


class CompiledLayers:
    """Runs a Transformer's layers. What Inductor builds is kept on disk, so a later process has it in seconds.

    Where the compiler fails, the model's own layers run, and one line says why.
    """

    def __init__(self, model: Transformer, backend: str = "inductor") -> None:
        self.model = model
        self._step = torch.compile(model.run_layers, backend=backend, dynamic=True)
        self._ready = False
        self._failed = False

    def __call__(self, tokens: Tensor, positions: Tensor, rotation: Tensor, kv_len: int, cache: KVCache) -> Tensor:
        """See `Transformer.run_layers`."""
        if positions.shape[1] > 1 or self._failed:
            return self.model.run_layers(tokens, positions, rotation, kv_len, cache)
        start = time.perf_counter()
        if not self._ready:
            log.info("compiling the decode step: a minute or so the first time, seconds from the cache")
        try:
            y = self._step(tokens, positions, rotation, kv_len, cache)
        except Exception as error:  # whatever a compiler can raise, also when another shape makes it compile again
            self._failed = True
            why = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("--compile failed, so the layers run as they are: %s", why)
            return self.model.run_layers(tokens, positions, rotation, kv_len, cache)
        if not self._ready:
            self._ready = True
            log.info("compiled the decode step in %.1f s", time.perf_counter() - start)
        return y
