"""Write a checkpoint in another format, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from llama.checkpoint.base import Checkpoint, dtype_name
from llama.checkpoint.export.gguf import TYPES, GGUFFileWriter
from llama.checkpoint.export.huggingface import HuggingFaceWriter
from llama.checkpoint.export.meta import MetaWriter
from llama.checkpoint.export.plan import ExportPlan, usual_context_len
from llama.checkpoint.export.streaming_writers import Progress, new_path
from llama.checkpoint.export.tokenizer import TokenizerSource
from llama.checkpoint.gguf import GGUFCheckpoint, split_files
from llama.checkpoint.gguf_header import read_header
from llama.checkpoint.huggingface import HuggingFaceCheckpoint
from llama.checkpoint.load import check_weights
from llama.config import ModelArgs
from llama.distributed.device import DTYPES
from llama.quantization.gguf_blocks import QUANTIZE

log = logging.getLogger("llama")

FORMATS = ("meta", "hf", "gguf")


class Writer(Protocol):
    @property
    def nbytes(self) -> int:
        """Of the weights that it will write."""
        ...

    def write(self, path: Path, progress: Progress) -> None: ...


def writer(
    checkpoint: Checkpoint,
    tokenizer: TokenizerSource,
    format: str,
    *,
    shards: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    context_len: int | None = None,
    reopen: Callable[[], Checkpoint] | None = None,
) -> Writer:
    """What writes the checkpoint in that format; ValueError when the format cannot express it, or weights are wrong.

    dtype: None is what the weights are stored in. quantize: None leaves linear weights in that dtype, too.
    context_len: None is what the checkpoint says, or its kind implies.
    reopen: opens the same checkpoint, where that releases memory.
    """
    if format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    dtypes = TYPES if format == "gguf" else DTYPES
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)} for --format {format}, got {dtype!r}")
    if shards != 1 and format != "meta":
        raise ValueError(f"--shards {shards} is for --format meta alone")
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    if quantize is not None and format != "hf":
        raise ValueError(f"--quantize {quantize} is for --format hf alone, got --format {format}")
    name = dtype or dtype_name(checkpoint.dtype)
    plan = ExportPlan(
        checkpoint=checkpoint,
        reopen=reopen or (lambda: checkpoint),
        args=_args(checkpoint, tokenizer.tokenizer.n_words, padded=format == "hf"),
        tokenizer=tokenizer,
        dtype=DTYPES.get(name, torch.float32),
        context_len=context_len or _context_len(checkpoint),
    )
    if format == "meta":
        return MetaWriter(plan, shards)
    return HuggingFaceWriter(plan, quantize) if format == "hf" else GGUFFileWriter(plan, name)


def write_checkpoint(writer: Writer, path: Path, progress: Progress) -> None:
    """Write to a path that does not exist; it appears when all is there. FileExistsError when something is there."""
    with new_path(path) as partial:
        writer.write(partial, progress)


def _args(checkpoint: Checkpoint, n_words: int, padded: bool) -> ModelArgs:
    """The architecture, with ties that the file does not tell: Meta's releases repeat the table as the output.

    padded: whether embeddings may have more rows than there are tokens; else those are left out.
    """
    args = checkpoint.args
    if args.vocab_size == -1:
        args = dataclasses.replace(args, vocab_size=n_words)
    check_weights(checkpoint, args)
    if args.vocab_size != n_words:
        may_differ = isinstance(checkpoint, HuggingFaceCheckpoint) and args.vocab_size > n_words
        if not may_differ:
            raise ValueError(
                f"the tokenizer has {n_words} tokens, but the weights in {checkpoint.path} have {args.vocab_size}: "
                "give the model's own with --tokenizer_path"
            )
        if not padded:
            log.info("the last %d rows of the embedding are for no token: left out", args.vocab_size - n_words)
            args = dataclasses.replace(args, vocab_size=n_words)
    if not args.tied_embeddings and _equal(checkpoint, "tok_embeddings.weight", "output.weight"):
        args = dataclasses.replace(args, tied_embeddings=True)
    return args


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if not torch.equal(checkpoint.read(a, 0, 0, 1), checkpoint.read(b, 0, 0, 1)):
        return False  # without reading them whole
    return torch.equal(checkpoint.read(a), checkpoint.read(b))


def _context_len(checkpoint: Checkpoint) -> int:
    stored = None
    if isinstance(checkpoint, GGUFCheckpoint):
        stored = read_header(split_files(checkpoint.path)[0]).metadata.get("llama.context_length")
    elif (checkpoint.path / "config.json").is_file():
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
        stored = config.get("max_position_embeddings")
    return stored if isinstance(stored, int) and stored > 0 else usual_context_len(checkpoint.args)
