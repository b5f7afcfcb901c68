"""Fill a model built on the meta device with this rank's part of a checkpoint, strictly and one tensor at a time."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.base import (
    SHARD_DIM,
    Checkpoint,
    StoredCheckpoint,
    dtype_name,
    quantized_type,
    shard_dim,
    some_of,
)
from llama.checkpoint.lora import AdaptedCheckpoint
from llama.checkpoint.names import module_name, stored_name
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import set_quantized_weight, tie_output
from llama.model import Transformer
from llama.quantization.gguf_blocks import F8_E4M3, BlockType, quantize
from llama.quantization.k_quants import quantize_blocks
from llama.quantization.planar import Fp8Weight
from llama.quantization.weights import BlockWeight, LowRank, QuantizedWeight, Weight
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

# What wrappers of a model put into its tensors' names: whose that is, and what to do.
_PEFT = ("a peft adapter", "save model.merge_and_unload(), or the adapter alone, which --lora reads")
WRAPPERS = {
    "_orig_mod.": ("torch.compile", "save the state of model._orig_mod"),
    "base_model.model.": _PEFT,
    "lora_": _PEFT,
    "_fsdp_wrapped_module.": ("FullyShardedDataParallel", "save its full state dict"),
    "module.": ("DistributedDataParallel", "save the state of model.module"),
}
_progress = logging.getLogger("llama.progress")  # shown on terminals by the command line


@dataclass(frozen=True)
class WeightFormat:
    """Say what a rank holds its weights in: floats of `dtype`, or quantized blocks."""

    dtype: torch.dtype
    quantize: str | None = None  # int8, int4 or fp8: what floats, and larger blocks, become
    weight_cls: type[QuantizedWeight] = BlockWeight  # holds quantized weights
    keeps_stored_blocks: bool = False  # whether quantized blocks of a file stay blocks unless asked
    # What columns of a whole matrix of this name and shape count where it is quantized, as ImportanceMatrix.of says.
    column_weights: Callable[[str, Sequence[int]], Tensor | None] | None = None

    def block_type(self, checkpoint: StoredCheckpoint, name: str, parallel: ModelParallel) -> BlockType | None:
        """Return the block type that this rank holds its part of a tensor in, or None for floats."""
        stored, shape = checkpoint.block_type(name), checkpoint.shape(name)
        if len(shape) != 2 or module_name(name) not in SHARD_DIM:  # what chooses experts is floats
            return None
        asked = quantized_type(name, shape, self.quantize) if self.quantize else None
        keeps = self.keeps_stored_blocks or self.quantize
        held = stored if keeps and stored is not None and self.weight_cls.holds(stored) else None
        if asked is not None and (held is None or asked.size * held.elements < held.size * asked.elements):
            held = asked
        if held is None or shard_dim(name) != 1 or parallel.size == 1:
            return held
        # Ranks cut rows only between blocks.
        return held if part_length(name, shape[1], parallel) % held.elements == 0 else None

    def check_column_weights(self, checkpoint: StoredCheckpoint) -> bool:
        """Tell whether a matrix is quantized at all; raise ValueError where what columns count does not fit those."""
        assert self.column_weights is not None
        held = {name: self.block_type(checkpoint, name, ModelParallel()) for name in checkpoint.names()}
        made = [name for name, block_type in held.items() if block_type not in (None, checkpoint.block_type(name))]
        for name in made:
            self.column_weights(name, checkpoint.shape(name))
        return bool(made)

    def with_ffn_multiple(self, checkpoint: StoredCheckpoint, parallel: ModelParallel) -> ModelParallel:
        """Return the ranks with hidden features split so that w2's rows are cut between blocks: see D33."""
        names = [name for name in checkpoint.names() if module_name(name) == "w2"]
        types = [self.block_type(checkpoint, name, ModelParallel()) for name in names]
        return dataclasses.replace(parallel, ffn_multiple=max((held.elements for held in types if held), default=1))


def load_weights(
    model: Transformer, checkpoint: StoredCheckpoint, device: torch.device, weight_format: WeightFormat
) -> Counter[tuple[str, str]]:
    """Assign every parameter of a meta-device model; raise ValueError for missing, unexpected or mis-shaped tensors.

    Host memory peaks at this rank's part plus one tensor: pages of the file that were copied are released. A part that
    is a view of the mapped file, in the dtype asked for, is used where it lies. Return how many matrices were stored as
    one thing and are held as another.
    """
    changes: Counter[tuple[str, str]] = Counter()
    shapes = check_weights(checkpoint, model.args)
    doing = "quantizing" if weight_format.quantize else "loading"
    for i, (name, shape) in enumerate(shapes.items(), 1):
        _progress.debug("%s weights: %d of %d", doing, i, len(shapes))
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        block_type = weight_format.block_type(checkpoint, name, model.parallel)
        parameter = getattr(module, attribute)
        held: Weight
        if block_type is None:
            part = read_part(checkpoint, name, model.args, model.parallel)
            part = part.to(device, weight_format.dtype).contiguous()
            if part.data_ptr() % part.element_size():  # a view of a file whose header has an odd length
                part = part.clone()
            held = torch.nn.Parameter(part, requires_grad=False)
            setattr(module, attribute, held)
        else:
            held = _read_quantized(checkpoint, name, model, device, weight_format, block_type)
            low_rank = _read_low_rank(checkpoint, name, model, device, weight_format.dtype, block_type)
            set_quantized_weight(module, held, low_rank)
        checkpoint.release(name)
        assert held.shape == parameter.shape, (name, held.shape, parameter.shape)
        if len(shape) > 1:
            held_as = block_type.name if block_type else dtype_name(weight_format.dtype)
            changes[checkpoint.stored_as(name), held_as] += 1
    if model.args.tied_embeddings:
        tie_output(model.output, model.tok_embeddings)
    model.to(device)  # what is computed and not loaded: the rotary frequencies
    return Counter({change: count for change, count in changes.items() if change[0] != change[1]})


def _read_quantized(
    checkpoint: StoredCheckpoint,
    name: str,
    model: Transformer,
    device: torch.device,
    weight_format: WeightFormat,
    block_type: BlockType,
) -> QuantizedWeight:
    """Return this rank's part of a tensor in blocks: as stored, or quantized from its values."""
    if checkpoint.block_type(name) == block_type:
        blocks = read_part(checkpoint, name, model.args, model.parallel, block_type).to(device)
    else:
        values = read_part(checkpoint, name, model.args, model.parallel).to(device)  # a GPU is quick to quantize
        if block_type == F8_E4M3:
            return Fp8Weight.of(values)
        weights = None
        if weight_format.column_weights is not None:
            weights = weight_format.column_weights(name, checkpoint.shape(name))
        if weights is None:
            blocks = quantize(values, block_type)
        else:
            weights = part_of_columns(weights, name, model.parallel).to(device)
            blocks = quantize_blocks(values.float(), block_type, weights)
    return weight_format.weight_cls(blocks, block_type)


def _read_low_rank(
    checkpoint: StoredCheckpoint,
    name: str,
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype,
    block_type: BlockType,
) -> LowRank | None:
    """Return this rank's part of what adapters add beside a matrix in blocks; None where they add nothing, or inside.

    Where ranks split the rows of the matrix, they split those of b, and where its columns, those of a.
    """
    if not isinstance(checkpoint, AdaptedCheckpoint) or not checkpoint.rank_beside(name, block_type):
        return None
    splits = 0 if shard_dim(name) == 1 else 1  # a or b
    parts = list(checkpoint.low_rank(name))
    parts[splits] = _part(
        lambda *part: checkpoint.low_rank(*part)[splits], checkpoint, name, model.args, model.parallel
    )
    a, b = (part.to(device, dtype).contiguous() for part in parts)
    return LowRank(a, b)


def check_vocab_size(checkpoint: Checkpoint, tokenizer: Tokenizer) -> int:
    """Return how many rows the embedding has.

    Raise ValueError where there are other rows than tokens, unless the format pads its embeddings, or the tokens
    without a row were added after training, as fine-tunes add a <pad>: the model never makes those.
    """
    n_words, vocab_size = tokenizer.n_words, checkpoint.args.vocab_size
    if vocab_size == -1:
        known = "tok_embeddings.weight" in checkpoint.names()
        vocab_size = next(iter(checkpoint.shape("tok_embeddings.weight") if known else ()), n_words)
    if tokenizer.n_trained <= vocab_size < n_words:
        log.info("tokens %d to %d have no row in the weights: no prompt may hold them", vocab_size, n_words - 1)
    elif vocab_size != n_words and not (checkpoint.pads_vocab and vocab_size > n_words):
        raise ValueError(
            f"the tokenizer has {n_words} tokens, but the weights in {checkpoint.path} have {vocab_size}: "
            "give the model's own with --tokenizer_path"
        )
    return vocab_size


def check_weights(checkpoint: Checkpoint, args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the whole tensors; raise ValueError unless they are as the configuration asks."""
    expected = global_shapes(args)
    _check_names(checkpoint, expected)
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise ValueError(
                f"{checkpoint.path}: {stored_name(name, checkpoint.naming)} has shape {checkpoint.shape(name)}, its "
                f"configuration asks for {shape}: weights and configuration do not belong together, or some files are "
                "missing"
            )
    return expected


def _check_names(checkpoint: Checkpoint, expected: Collection[str]) -> None:
    """Raise ValueError when the checkpoint lacks a tensor, or has one that the model would silently ignore."""
    found = checkpoint.names()
    missing = [stored_name(name, checkpoint.naming) for name in expected if name not in found]
    unexpected = [stored_name(name, checkpoint.naming) for name in found if name not in expected]
    for part, (whose, fix) in WRAPPERS.items():
        wrapped = [name for name in unexpected if re.search(rf"(?<!\w){re.escape(part)}", name)]
        if wrapped:
            raise ValueError(f"{checkpoint.path} has tensors of {whose}, such as {wrapped[0]}: {fix}")
    if missing:
        raise ValueError(f"{checkpoint.path} lacks tensors {some_of(missing)}: its configuration asks for them")
    if unexpected:
        raise ValueError(
            f"{checkpoint.path} has unexpected tensors {some_of(unexpected)}: the configuration does not describe it"
        )


def part_of_columns(weights: Tensor, name: str, parallel: ModelParallel) -> Tensor:
    """Return what this rank's columns of a matrix count, of what all count; those that only pad it count 1."""
    if shard_dim(name) != 1 or parallel.size == 1:
        return weights
    start, stop = part_span(name, len(weights), parallel)
    return F.pad(weights[start:stop], (0, part_length(name, len(weights), parallel) - (stop - start)), value=1.0)


def part_length(name: str, total: int, parallel: ModelParallel) -> int:
    """Return the rows, or columns, of each rank's part of a tensor that is split."""
    return parallel.part(total, _multiple(name, parallel))


def part_span(name: str, total: int, parallel: ModelParallel) -> tuple[int, int]:
    """Return the [start, stop) of this rank's rows, or columns, without padding."""
    return parallel.span(total, _multiple(name, parallel))


def _multiple(name: str, parallel: ModelParallel) -> int:
    return parallel.ffn_multiple if module_name(name) in ("w1", "w2", "w3") else 1


def read_part(
    checkpoint: StoredCheckpoint,
    name: str,
    args: ModelArgs,
    parallel: ModelParallel,
    block_type: BlockType | None = None,
) -> Tensor:
    """Return this rank's part of a tensor, padded with zeros where the ranks do not divide it.

    With the block_type that it is stored in, return the raw blocks: uint8 (rows, row_bytes).
    """
    if block_type is None:
        return _part(checkpoint.read, checkpoint, name, args, parallel)
    return _part(checkpoint.read_blocks, checkpoint, name, args, parallel, block_type)


def _part(
    read: Callable[..., Tensor],
    checkpoint: StoredCheckpoint,
    name: str,
    args: ModelArgs,
    parallel: ModelParallel,
    block_type: BlockType | None = None,
) -> Tensor:
    """Return this rank's part of what `read` returns for slices of a tensor, as a checkpoint's `read` does."""
    dim = shard_dim(name)
    if dim is None or parallel.size == 1 or _is_norm_of_a_head(name, args):
        return read(name)
    if module_name(name) in ("wk", "wv", "k_norm"):
        return _read_kv_heads(read, name, args, parallel)
    total = checkpoint.shape(name)[dim]
    start, stop = part_span(name, total, parallel)
    part = read(name, dim, start, stop)
    padding = part_length(name, total, parallel) - (stop - start)
    if dim == 1 and block_type is not None:
        padding = padding // block_type.elements * block_type.size  # blocks of zeros are zeros
    return F.pad(part, (0, 0) * (part.dim() - 1 - dim) + (0, padding)) if padding else part


def _is_norm_of_a_head(name: str, args: ModelArgs) -> bool:
    """Tell whether a tensor is what all heads' queries, or keys, are normalised with."""
    return module_name(name) in ("q_norm", "k_norm") and args.qk_norm != "all heads"


def _read_kv_heads(read: Callable[..., Tensor], name: str, args: ModelArgs, parallel: ModelParallel) -> Tensor:
    """Return the rows of this rank's KV heads, some of which may repeat."""
    heads = parallel.kv_heads(args.n_heads, args.n_kv_heads)
    first, last = heads[0], heads[-1]
    rows = read(name, 0, first * args.head_dim, (last + 1) * args.head_dim)
    if heads == list(range(first, last + 1)):
        return rows
    picked = torch.tensor([head - first for head in heads], device="cpu")
    return rows.unflatten(0, (-1, args.head_dim))[picked].flatten(0, 1)
