"""Hold what all written formats share: the checkpoint, in which dtype it goes, and what about it can be recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, read_in_turn
from llama.checkpoint.export.tokenizer import TokenizerSource
from llama.checkpoint.names import stored_name
from llama.config import FactorScaling, Llama3Scaling, ModelArgs, RopeScaling
from llama.rope import scaled_frequencies


@dataclass(frozen=True)
class ExportPlan:
    """Describe a checkpoint that is to be written.

    args: its architecture, with ties that its files do not tell. context_len: what the model was trained for.
    reopen: opens the checkpoint once more, so that what was read of a file can leave the memory.
    """

    checkpoint: Checkpoint
    reopen: Callable[[], Checkpoint]
    args: ModelArgs
    tokenizer: TokenizerSource
    dtype: torch.dtype
    context_len: int

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield names in their order with whole tensors, as stored."""
        return read_in_turn(names, lambda: self.reopen().read)

    def own_name(self, name: str) -> str:
        """Return what the checkpoint's files call a tensor, for messages."""
        return stored_name(name, self.checkpoint.naming)

    def as_dtype(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor in that dtype; raise ValueError when float16 cannot hold a value."""
        if dtype == torch.float16 and tensor.dtype != dtype:
            low, high = (float(value) for value in torch.aminmax(tensor))
            largest = max(-low, high)
            if torch.finfo(dtype).max < largest < float("inf"):
                raise ValueError(
                    f"float16 cannot hold {self.own_name(name)}, whose largest value is {largest:g}: use bfloat16"
                )
        return tensor.to(dtype)


def recognised(args: ModelArgs) -> RopeScaling | None:
    """Return the RoPE scaling, with GGUF's factors for each pair as Llama 3.1's rule where they came from it."""
    if not isinstance(args.rope_scaling, FactorScaling):
        return args.rope_scaling
    found = scaled_frequencies(args.head_dim, args.rope_theta, args.rope_scaling)
    scaling = Llama3Scaling(factor=float(max(args.rope_scaling.factors)))  # that of the longest wavelengths
    # GGUF has the factors in fp32.
    if torch.allclose(found, scaled_frequencies(args.head_dim, args.rope_theta, scaling), rtol=1e-6, atol=0):
        return scaling
    return args.rope_scaling


def usual_context_len(args: ModelArgs) -> int:
    """Return the context that models of this kind were trained for, where a format does not say it, as Meta's."""
    scaling = recognised(args)
    if isinstance(scaling, Llama3Scaling):
        return 131072
    if args.sliding_window is not None:
        return 32768
    return {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 2048 if args.norm_eps == 1e-6 else 4096)
