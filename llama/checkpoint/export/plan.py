"""Hold what all written formats share: the checkpoint, its context, and in which dtype it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, read_in_turn
from llama.checkpoint.export.tokenizer import TokenizerSource
from llama.checkpoint.names import stored_name
from llama.config import ModelArgs


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

    def check_plain(self, format: str) -> None:
        """Raise ValueError where layers compute what a format of Llama alone cannot express."""
        if not self.args.is_plain:
            beyond = ", ".join(f"{name} {value!r}" for name, value in self.args.beyond_llama.items())
            raise ValueError(f"{format} cannot express {beyond}: use --format hf")

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
