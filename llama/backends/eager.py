"""The backend of torch's own operations, on any device, and the base class of the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llama.cache import ForwardBatch
from llama.model import Transformer
from llama.quantization.weights import BlockWeight, QuantizedWeight
from llama.sampling import TokenSampler, TorchSampler


class EagerBackend:
    """Computes a Transformer by its own modules; see `Backend` for the meaning of each member."""

    name = "eager"
    own_kernels = False
    weight_cls: type[QuantizedWeight] = BlockWeight
    keeps_stored_blocks = False
    quantize_modes: tuple[str, ...] = ("int8", "int4")
    dequantized_values = 0
    max_prefill_tokens = 2048  # enough for matrix products to be as fast as they get: see D27

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def captures_graphs(self) -> bool:
        return False

    def graph_capture(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        raise NotImplementedError(f"steps of the {self.name} backend are not captured")

    def bind(self, model: Transformer) -> None:
        self._model = weakref.ref(model)  # which holds this: a cycle would outlive the model's last use
        model.backend = self

    @property
    def model(self) -> Transformer:
        """The bound model, which is there while it computes."""
        model = self._model()
        assert model is not None
        return model

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        return self.model.run_layers(tokens, rotations, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.output(hidden, torch.float32)

    def token_sampler(self) -> TokenSampler:
        return TorchSampler()


def is_nccl(group: dist.ProcessGroup | None) -> bool:
    """Tell whether a group's collectives can be captured in a CUDA graph; a rank without a group has none."""
    return group is None or dist.get_backend(group) == "nccl"
