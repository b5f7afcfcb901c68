"""The protocol of a backend, which computes a model, and the one function that chooses it.

Everything that depends on which kernels exist is an attribute or a method of the backend that `choose_backend` returns;
no other module asks whether there is a compiler, Triton or a processor's instruction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from llama.backends.cpu.build import library
from llama.backends.cuda.available import has_triton
from llama.backends.eager import EagerBackend
from llama.cache import ForwardBatch
from llama.config import ModelArgs
from llama.model import Transformer
from llama.quantization.weights import QuantizedWeight
from llama.sampling import TokenSampler

log = logging.getLogger("llama")

# Captures a function's work on the device, running it once, and returns a function that replays it on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Backend(Protocol):
    """Computes one model on one device. It is chosen before weights are read, and bound to the model afterwards."""

    device: torch.device

    @property
    def name(self) -> str:
        """eager, inductor, cpu or cuda."""
        ...

    @property
    def own_kernels(self) -> bool:
        """Whether kernels of this package compute the layers, and not torch's operations, compiled or not."""
        ...

    @property
    def weight_cls(self) -> type[QuantizedWeight]:
        """The class of quantized weights."""
        ...

    @property
    def keeps_stored_blocks(self) -> bool:
        """Whether quantized blocks of a file stay blocks unless asked; otherwise they become floats."""
        ...

    @property
    def quantize_modes(self) -> tuple[str, ...]:
        """The values of `BuildOptions.quantize` that this backend can run."""
        ...

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps of the bound model can be CUDA graphs: see D38."""
        ...

    def graph_capture(self) -> Capture:
        """Return a function that captures decode steps, in one pool of memory; only where `captures_graphs`."""
        ...

    @property
    def max_prefill_tokens(self) -> int:
        """Most tokens of prompts that a step computes."""
        ...

    @property
    def dequantized_values(self) -> int:
        """Values of a quantized weight that are in memory as floats at once in a product of many tokens."""
        ...

    def bind(self, model: Transformer) -> None:
        """Compute this model from here on; it drops its backend when its weights move or change."""
        ...

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        """Return final states as `Transformer.run_layers` does, in the model's dtype or in fp32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits of final states (..., dim): fp32 (..., local vocabulary)."""
        ...

    def token_sampler(self) -> TokenSampler:
        """Return the sampler that draws tokens from logits on this device."""
        ...


def choose_backend(device: torch.device, args: ModelArgs, compile: bool = False) -> Backend:
    """Choose the backend for a device: the package's kernels where they run, else Inductor or torch's operations.

    compile: the user asked for torch.compile, which kernels of the package do without (see D34).
    """
    backend: Backend | None = None
    if device.type == "cpu" and library() is not None:
        from llama.backends.cpu.backend import CpuBackend

        backend = CpuBackend(device)
    elif has_triton(device):
        from llama.backends.cuda.backend import CudaBackend

        backend = CudaBackend(device) if CudaBackend.computes(args) else None
    if backend is not None:
        return backend
    if compile and args.experts is not None:
        log.info("--compile is not used: which experts are read depends on the tokens")
    elif compile:
        from llama.backends.inductor import InductorBackend

        return InductorBackend(device)
    return EagerBackend(device)


def backend_of(model: Transformer) -> Backend:
    """Return the backend that is bound to a model; bind torch's operations where none is."""
    if model.backend is None:
        EagerBackend(model.device).bind(model)
    return cast(Backend, model.backend)
