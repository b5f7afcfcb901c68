"""What computes a model: the protocol of a backend, and the one place that chooses it.

Everything that depends on which kernels there are is an answer of the backend that `choose_backend` returns; no other
module asks whether a compiler, Triton or a processor's instructions are there.
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
from llama.cache import KVCache
from llama.model import Transformer
from llama.quantization.weights import QuantizedWeight
from llama.sampling import TokenSampler

log = logging.getLogger("llama")


# Takes what a step does on the device and runs it once; the result runs it again, on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Backend(Protocol):
    """Computes one model on one device. It is chosen before weights are read, and bound when they are there."""

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
        """The class that holds quantized weights."""
        ...

    @property
    def keeps_stored_blocks(self) -> bool:
        """Whether quantized blocks of a file stay blocks unless asked; otherwise they become floats."""
        ...

    @property
    def quantize_modes(self) -> tuple[str, ...]:
        """What `BuildOptions.quantize` may be here."""
        ...

    @property
    def captures_graphs(self) -> bool:
        """Whether a decode step of the bound model can be a CUDA graph: its kernels find all lengths on the device."""
        ...

    def graph_capture(self) -> Capture:
        """Return what captures decode steps, whose graphs share one pool of memory; only if `captures_graphs`."""
        ...

    @property
    def max_prefill_tokens(self) -> int:
        """Tokens of all sequences together that a prefill reads at once."""
        ...

    @property
    def dequantized_values(self) -> int:
        """Values of a quantized weight that a product of many tokens holds in floats at once, beside activations."""
        ...

    def bind(self, model: Transformer) -> None:
        """Compute this model from here on. A model whose weights move or change drops its backend."""
        ...

    def run_layers(self, tokens: Tensor, positions: Tensor, rotation: Tensor, kv_len: int, cache: KVCache) -> Tensor:
        """Compute final states as `Transformer.run_layers` does, in its dtype or in fp32."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute this rank's logits of final states (..., dim): fp32 (..., local vocabulary)."""
        ...

    def token_sampler(self) -> TokenSampler:
        """Return what draws tokens from logits on this device."""
        ...


def choose_backend(device: torch.device, head_dim: int, compile: bool = False) -> Backend:
    """Choose what computes a model on a device: the package's kernels where they run, else Inductor or torch.

    compile: the user asked for torch.compile, which the package's kernels do without.
    """
    backend: Backend | None = None
    if device.type == "cpu" and library() is not None:
        from llama.backends.cpu.backend import CpuBackend

        backend = CpuBackend(device)
    elif has_triton(device):
        from llama.backends.cuda.backend import MAX_HEAD_DIM, CudaBackend

        backend = CudaBackend(device) if head_dim <= MAX_HEAD_DIM else None
    if backend is not None:
        if compile:
            log.info("--compile has nothing to add: kernels of our own run the layers, and are compiled")
        return backend
    if compile:
        from llama.backends.inductor import InductorBackend

        return InductorBackend(device)
    return EagerBackend(device)


def backend_of(model: Transformer) -> Backend:
    """Return what computes a model: what was bound to it, else torch's operations."""
    if model.backend is None:
        EagerBackend(model.device).bind(model)
    return cast(Backend, model.backend)
