"""Hold what all written formats share: the checkpoint, its context, and in which dtype it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, read_in_turn
from llama.checkpoint.export.tokenizer import TokenizerSource
from llama.checkpoint.imatrix import ImportanceMatrix
from llama.checkpoint.names import stored_name
from llama.config import ModelArgs


@dataclass(frozen=True)
class ExportPlan:
    """Describe a checkpoint that is to be written.

    args: its architecture, with ties that its files do not tell. context_len: what the model was trained for.
    reopen: opens the checkpoint once more, so that what was read of a file can leave the memory.
    importance: what columns count where matrices are quantized; None: all the same.
    """

    checkpoint: Checkpoint
    reopen: Callable[[], Checkpoint]
    args: ModelArgs
    tokenizer: TokenizerSource
    dtype: torch.dtype
    context_len: int
    importance: ImportanceMatrix | None = None

    def check_plain(self, format: str) -> None:
        """Raise ValueError where layers compute what a format of Llama alone cannot express."""
        if not self.args.is_plain:
            beyond = ", ".join(f"{name} {value!r}" for name, value in self.args.beyond_llama.items())
            raise ValueError(f"{format} cannot express {beyond}: use --format hf")

    def read_all(self, names: Iterable[str], types: Mapping[str, str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield names in their order with whole tensors, as stored.

        types: of tensors that may stay the blocks that they are, uint8 (rows, row_bytes), where these are of that type.
        """

        def reader() -> Callable[[str], Tensor]:
            checkpoint = self.reopen()

            def read(name: str) -> Tensor:
                block_type = checkpoint.block_type(name) if types else None
                stays = types is not None and block_type is not None and block_type.name == types[name]
                return checkpoint.read_blocks(name) if stays else checkpoint.read(name)

            return read

        return read_in_turn(names, reader)

    def column_weights(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return what each column of a whole matrix counts; None: all the same. Raise ValueError as its `of` does."""
        return None if self.importance is None else self.importance.of(name, shape)

    def check_importance(self, quantized: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError where an importance matrix does not fit the matrices that are quantized, or none is."""
        if self.importance is None:
            return
        if not quantized:
            raise ValueError(
                f"imatrix {self.importance.path} has nothing to do, as no weight is quantized: give --format gguf with "
                "--dtype q4_k_m, or --format hf with --quantize int4"
            )
        self.importance.check_layers(self.args.n_layers)
        for name, shape in quantized.items():
            self.importance.of(name, shape)

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
