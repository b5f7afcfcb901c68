"""A checkpoint with low-rank adapters (LoRA, arXiv:2106.09685), merged into its weights while slices are read.

Knows no files of adapters (see lora_files.py) and no ranks: like every checkpoint it offers whole tensors, and slices
of them, by Meta's names and in Meta's order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, Reading, StoredCheckpoint, dtype_name
from llama.quantization.gguf_blocks import BlockType
from llama.tokenizer import Tokenizer

# The two ends of a model, which are one tensor where they are tied.
TABLE, OUTPUT = "tok_embeddings.weight", "output.weight"


class LowRankPair(NamedTuple):
    """What one adapter adds to a matrix (out, in): factor * b a."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    factor: float


@dataclass(frozen=True)
class Adapter:
    """Hold an adapter of one base model: by the names of its matrices what is added to them, and what replaces them."""

    path: Path
    scale: float  # as the user asks, beside what the adapter says
    pairs: Mapping[str, LowRankPair]
    replaced: Mapping[str, Tensor]
    trained_on: str = ""  # the name of its base model, where that is another name than the checkpoint's

    @property
    def ranks(self) -> str:
        """Its rank, or the lowest and the highest one."""
        found = sorted({len(pair.a) for pair in self.pairs.values()})
        return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else "0"

    def __str__(self) -> str:
        whole = f", {len(self.replaced)} tensors replaced" if self.replaced else ""
        base = f", trained on {self.trained_on}" if self.trained_on else ""
        return f"{self.path} of rank {self.ranks}, times {self.scale:g}: {len(self.pairs)} matrices{whole}{base}"


class AdaptedCheckpoint:
    """Offer a checkpoint with its adapters merged: W + factor * b a, summed up in fp32, is read in W's place.

    Blocks of a file are read as they are, without their adapters: `low_rank` has what is to be added to their products.
    A table that is the output, too, is one tensor no longer where an adapter changes either: PEFT changes that one
    alone.
    """

    def __init__(self, base: StoredCheckpoint, adapters: Sequence[Adapter], keeps_blocks: bool) -> None:
        """Add adapters, which fit the base's tensors; keeps_blocks: whether adapted blocks of the file stay blocks."""
        self.base, self.adapters, self._keeps_blocks = base, adapters, keeps_blocks
        self._pairs: dict[str, list[LowRankPair]] = {}
        self._replaced: dict[str, Tensor] = {}
        for adapter in adapters:
            self._replaced |= adapter.replaced
            for name, pair in adapter.pairs.items():
                self._pairs.setdefault(name, []).append(pair)
        self.path, self.naming, self.dtype = base.path, base.naming, base.dtype
        self.context_len, self.stop_tokens, self.pads_vocab = base.context_len, base.stop_tokens, base.pads_vocab
        self.tokenizer_metadata, self.model_name = base.tokenizer_metadata, base.model_name
        self.family, self.factors = base.family, base.factors
        self.is_quantized = base.is_quantized
        unties = base.args.tied_embeddings and not {TABLE, OUTPUT}.isdisjoint((*self._pairs, *self._replaced))
        self.args = replace(base.args, tied_embeddings=False) if unties else base.args
        self._sources = {OUTPUT: TABLE} if unties else {}

    def names(self) -> Collection[str]:
        return dict.fromkeys((*self.base.names(), *self._sources)).keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._source(name))

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape(name)[dim] if stop is None else stop
        _, reading = self._base_reads_as(name, dim, start, stop)
        if name in self._replaced:
            values = self._replaced[name].narrow(dim, start, stop - start)
        else:
            values = self.base.read(self._source(name), dim, start, stop)
        if name not in self._pairs:
            return values
        values = values.to(torch.float32, copy=reading != "copy")
        return values.addmm_(*reversed(self.low_rank(name, dim, start, stop)))

    def low_rank(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Return a (r, in) and b (out, r), fp32, of what all adapters add to [start, stop) along `dim` of a matrix.

        r is the sum of their ranks.
        """
        stop = self.shape(name)[dim] if stop is None else stop
        a, b = [], []
        for pair in self._pairs[name]:
            a.append((pair.a if dim == 0 else pair.a[:, start:stop]).float())
            b.append((pair.b[start:stop] if dim == 0 else pair.b).float() * pair.factor)
        return torch.cat(a), torch.cat(b, dim=1)

    def rank_beside(self, name: str, held: BlockType | None) -> int:
        """Return the rank of what stays beside a matrix that is held in blocks: 0 where nothing does."""
        stays = held is not None and self.block_type(name) == held
        return sum(len(pair.a) for pair in self._pairs.get(name, ())) if stays else 0

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        dtype, reading = self._base_reads_as(name, dim, start, stop)
        return (torch.float32, "copy") if name in self._pairs else (dtype, reading)

    @property
    def rounding(self) -> float:
        return self.base.rounding

    def stored_as(self, name: str) -> str:
        replaced = self._replaced.get(name)
        return self.base.stored_as(self._source(name)) if replaced is None else dtype_name(replaced.dtype)

    def block_type(self, name: str) -> BlockType | None:
        if name in self._replaced or (name in self._pairs and not self._keeps_blocks):
            return None
        return self.base.block_type(self._source(name))

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        assert name not in self._replaced, name
        return self.base.read_blocks(self._source(name), dim, start, stop)

    def release(self, name: str) -> None:
        self.base.release(self._source(name))

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def _source(self, name: str) -> str:
        """Return the base's name of a tensor."""
        return self._sources.get(name, name)

    def _base_reads_as(self, name: str, dim: int, start: int, stop: int | None) -> tuple[torch.dtype, Reading]:
        """Return the same as `reads_as`, before anything is added."""
        if name in self._replaced:
            return self._replaced[name].dtype, "strided" if dim else "zero_copy"
        return self.base.reads_as(self._source(name), dim, start, stop)


def adapters_of(checkpoint: Checkpoint) -> Sequence[Adapter]:
    """Return the adapters that are in what a checkpoint reads."""
    return checkpoint.adapters if isinstance(checkpoint, AdaptedCheckpoint) else ()
