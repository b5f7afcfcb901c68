"""Write Meta's format: any number of even shards, params.json and the tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.base import Progress, shard_dim
from llama.checkpoint.context import recognised
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.export.streaming_writers import PickleFile, TensorEntry, write_json
from llama.checkpoint.export.tokenizer import write_tokenizer
from llama.checkpoint.names import module_name
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.rope_scaling import Llama3Scaling
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

MAX_SHARDS = 100  # their numbers have two digits

# Fields of ModelArgs that a params.json has under their names.
PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
# Multipliers and rounding of released models, so that a params.json reads like theirs.
FFN_RULES = ((None, 256), (1.3, 1024), (1.3, 4096), (1.2, 4096), (1.5, 256), (1.0, 256), (None, 64), (None, 16))


class MetaWriter:
    """Write a Meta folder. Making the writer raises ValueError for what the format or the shards cannot express."""

    def __init__(self, plan: ExportPlan, shards: int) -> None:
        self.plan, self.shards = plan, shards
        plan.check_plain("Meta's format")
        self.params = meta_params(plan.args)
        # As Meta's code wants it: Llama 2's splits the table by feature, Llama 3's by token.
        self.embedding_dim = 1 if plan.tokenizer.is_sentencepiece else 0
        _check_shards(plan.args, shards, self.embedding_dim)
        # Meta's releases repeat the table of a tied model as its output; their code knows no ties.
        self.args = dataclasses.replace(plan.args, tied_embeddings=False)

    @property
    def nbytes(self) -> int:
        shapes = (self._shard_shape(name, shape) for name, shape in global_shapes(self.args).items())
        return self.shards * sum(TensorEntry(shape, self.plan.dtype).nbytes for shape in shapes)

    def write(self, folder: Path, progress: Progress) -> None:
        folder.mkdir()
        write_tokenizer(self.plan.tokenizer, folder, "meta")
        wanted = self.plan.tokenizer.tokenizer.stop_tokens | self.plan.checkpoint.stop_tokens
        lost = wanted - Tokenizer(folder).stop_tokens
        if lost:
            log.warning(
                "Meta's format cannot say that these tokens end a generation: %s", ", ".join(map(str, sorted(lost)))
            )
        shapes = global_shapes(self.args)
        entries = {name: TensorEntry(self._shard_shape(name, shape), self.plan.dtype) for name, shape in shapes.items()}
        files = [PickleFile(folder / f"consolidated.{i:02d}.pth", entries) for i in range(self.shards)]
        tied = {"output.weight": "tok_embeddings.weight"} if self.plan.args.tied_embeddings else {}
        names = [tied.get(name, name) for name in shapes]
        for name, (_, tensor) in zip(shapes, self.plan.read_all(names), strict=True):
            # Rows that only pad an embedding are left out.
            tensor = self.plan.as_dtype(name, tensor.narrow(0, 0, shapes[name][0]), self.plan.dtype)
            for i, file in enumerate(files):
                file.add(self._shard(name, tensor, i))
                progress(entries[name].nbytes)
        for file in files:
            file.close()
        # Last, because without it a folder cannot be opened.
        write_json(folder / "params.json", self.params)

    def _shard(self, name: str, tensor: Tensor, number: int) -> Tensor:
        """Return what shard `number` has of a whole tensor."""
        dim = self._split_dim(name)
        if dim is None:
            return tensor
        size = self._shard_shape(name, tuple(tensor.shape))[dim]
        # Shards that outnumber the KV heads repeat each of them.
        pieces = tensor.shape[dim] // size
        return tensor.narrow(dim, number * pieces // self.shards * size, size)

    def _split_dim(self, name: str) -> int | None:
        return self.embedding_dim if module_name(name) == "tok_embeddings" else shard_dim(name)

    def _shard_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = self._split_dim(name)
        if dim is None:
            return shape
        pieces = min(self.shards, self.args.n_kv_heads) if module_name(name) in ("wk", "wv") else self.shards
        return (*shape[:dim], shape[dim] // pieces, *shape[dim + 1 :])


def meta_params(args: ModelArgs) -> dict[str, Any]:
    """Return the params.json of an architecture; raise ValueError when Meta's format cannot express it."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(args, name):
            raise ValueError(f"Meta's format cannot express {name} {getattr(args, name)}: use --format hf")
    if args.rotary_dim is not None or args.score_factor != 1.0:
        raise ValueError(
            f"Meta's format cannot express rotary_dim {args.rotary_dim} and score_factor "
            f"{args.score_factor}: use --format hf"
        )
    multiplier, multiple_of = _ffn_rule(args)
    params: dict[str, Any] = {name: getattr(args, name) for name in PARAMS} | {"multiple_of": multiple_of}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if args.dim != args.head_dim * args.n_heads:
        params["head_dim"] = args.head_dim
        log.warning("head_dim %d is not dim / n_heads: only this package reads that in params.json", args.head_dim)
    if args.sliding_window is not None:
        params["sliding_window"] = args.sliding_window
        log.warning("sliding_window %d in params.json is read as by Mistral's code, not by Meta's", args.sliding_window)
    return params | _scaling_params(args)


def _scaling_params(args: ModelArgs) -> dict[str, Any]:
    scaling = recognised(args)
    if scaling is None:
        return {}
    if not isinstance(scaling, Llama3Scaling) or scaling.low_freq_factor != 1 or scaling.old_context_len != 8192:
        raise ValueError(f"Meta's format knows Llama 3.1's RoPE scaling alone, not {scaling}: use --format hf")
    implied = dataclasses.replace(args, use_scaled_rope=True, rope_scaling=None).rope_scaling
    if scaling == implied:
        return {"use_scaled_rope": True}
    factors = {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
    return {"use_scaled_rope": True} | factors


def _ffn_rule(args: ModelArgs) -> tuple[float | None, int]:
    """Return the ffn_dim_multiplier and multiple_of that lead to hidden_dim, of a released model if one fits."""

    def leads(multiplier: float | None, multiple_of: int) -> bool:
        other = ModelArgs(dim=args.dim, n_heads=1, head_dim=2, ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
        return other.hidden_dim == args.hidden_dim

    for rule in ((args.ffn_dim_multiplier, args.multiple_of), *FFN_RULES):
        if leads(*rule):
            return rule
    multiple_of = next(power for power in (256, 128, 64, 32, 16, 8, 4, 2, 1) if args.hidden_dim % power == 0)
    # Rounded up, anything above the multiple before leads to hidden_dim: half-way is safe from float arithmetic.
    multiplier = (args.hidden_dim - (multiple_of / 2 if multiple_of > 1 else -0.5)) / (2 * 4 * args.dim // 3)
    assert leads(multiplier, multiple_of), (multiplier, multiple_of, args)
    return multiplier, multiple_of


def _check_shards(args: ModelArgs, shards: int, embedding_dim: int) -> None:
    """Raise ValueError unless that many shards can be equal."""
    counts = {"heads": args.n_heads, "hidden features": args.hidden_dim, "tokens": args.vocab_size}
    if embedding_dim == 1:
        counts["embedding features"] = args.dim

    def fits(shards: int) -> bool:
        kv_fits = args.n_kv_heads % shards == 0 or shards % args.n_kv_heads == 0
        return kv_fits and all(count % shards == 0 for count in counts.values())

    if not 1 <= shards <= MAX_SHARDS or not fits(shards):
        sizes = ", ".join(f"{count} {what}" for what, count in counts.items())
        choices = ", ".join(str(n) for n in range(1, min(args.n_heads, MAX_SHARDS) + 1) if fits(n))
        raise ValueError(
            f"{shards} shards cannot hold equal parts of {sizes}, {args.n_kv_heads} KV heads: use one of {choices}"
        )
