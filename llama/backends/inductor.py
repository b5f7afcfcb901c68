"""The decode step of a model compiled by torch (Inductor), for --compile where no kernels of the package run.

Only steps of one token a sequence are compiled: a prefill runs once, which is not worth a compiler's time.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from llama.backends.eager import EagerBackend
from llama.cache import ForwardBatch
from llama.distributed.job import collective
from llama.errors import one_line
from llama.model import Transformer

log = logging.getLogger("llama")


class InductorBackend(EagerBackend):
    """Computes a Transformer's layers by compiled code, which Inductor caches on disk for later processes.

    Where the compiler fails, the model's own layers run, and one line is logged that says why.
    """

    name = "inductor"

    def __init__(self, device: torch.device, compiler: str = "inductor") -> None:
        """Prepare for a device; compiler: a backend of torch.compile."""
        super().__init__(device)
        self._compiler = compiler

    def bind(self, model: Transformer) -> None:
        super().bind(model)
        self._decode = torch.compile(model.run_layers, backend=self._compiler, dynamic=True)
        self._ready = self._failed = False

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        if any(group.seqlen > 1 for group in batch.groups) or self._failed:
            return self.model.run_layers(tokens, rotations, batch)
        start = time.perf_counter()
        if not self._ready:
            log.info("compiling the decode step: a minute or so the first time, seconds from the cache")
        try:
            args = tokens, rotations, batch
            y = collective(self._decode, *args) if self._ready else self._decode(*args)
        except ConnectionError:
            raise
        except Exception as error:  # whatever a compiler can raise, also when another shape makes it compile again
            self._failed = True
            why = one_line(str(error))[:300] or type(error).__name__
            log.warning("--compile failed, so the layers run as they are: %s", why)
            return self.model.run_layers(tokens, rotations, batch)
        if not self._ready:
            self._ready = True
            log.info("compiled the decode step in %.1f s", time.perf_counter() - start)
        return y
