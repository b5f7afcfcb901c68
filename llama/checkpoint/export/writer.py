"""Write a checkpoint in another format, whole or not at all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from llama.checkpoint.base import Checkpoint, Progress, dtype_name, same_matrix
from llama.checkpoint.context import trained_context_len
from llama.checkpoint.export.gguf import AS_STORED, GGUFFileWriter
from llama.checkpoint.export.gguf_types import GGUF_FILE_TYPES
from llama.checkpoint.export.huggingface import HuggingFaceWriter
from llama.checkpoint.export.meta import MetaWriter
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.export.streaming_writers import new_path
from llama.checkpoint.export.tokenizer import TokenizerSource
from llama.checkpoint.imatrix import ImportanceMatrix
from llama.checkpoint.load import check_vocab_size, check_weights
from llama.config import ModelArgs
from llama.distributed.device import DTYPES
from llama.quantization.gguf_blocks import QUANTIZE
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

EXPORT_FORMATS = ("meta", "hf", "gguf")


class Writer(Protocol):
    """Write one checkpoint in one format."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of the weights that it will write."""
        ...

    def write(self, path: Path, progress: Progress) -> None:
        """Write to a path that does not exist; tell progress the bytes of each tensor that is written."""
        ...


def writer(
    checkpoint: Checkpoint,
    tokenizer: TokenizerSource,
    format: str,
    *,
    shards: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    is_pure: bool = False,
    context_len: int | None = None,
    importance: ImportanceMatrix | None = None,
    reopen: Callable[[], Checkpoint] | None = None,
) -> Writer:
    """Return what writes the checkpoint in that format, one of EXPORT_FORMATS.

    shards: number of Meta's files.
    dtype: None is what the weights are stored in: for GGUF the type of each, for others bfloat16 in place of blocks.
    quantize: int8 or int4, for Hugging Face's format; None leaves linear weights in that dtype, too.
    is_pure: whether all matrices of a GGUF file get the type that a mixture is mostly of.
    context_len: None is what the checkpoint says, or its kind implies.
    importance: what columns count where weights are quantized.
    reopen: opens the same checkpoint again, where that releases memory.
    Raise ValueError when the format cannot express the checkpoint, or weights are missing or mis-shaped.
    """
    if checkpoint.args.experts is not None and checkpoint.args.experts.router == "sigmoid of input":
        raise ValueError(f"{checkpoint.path} is a Llama 4, which cannot be written: use its files as they are")
    if checkpoint.args.experts is not None and format == "meta":
        raise ValueError("Meta's format cannot express a mixture of experts: use --format hf")
    if format not in EXPORT_FORMATS:
        raise ValueError(f"--format must be one of {', '.join(EXPORT_FORMATS)}, got {format!r}")
    dtypes = GGUF_FILE_TYPES if format == "gguf" else DTYPES
    if dtype is not None and format == "gguf":
        dtype = dtype.lower()  # llama.cpp writes Q4_K_M
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)} for --format {format}, got {dtype!r}")
    if shards != 1 and format != "meta":
        raise ValueError(f"--shards {shards} is for --format meta alone")
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    if quantize is not None and format != "hf":
        raise ValueError(f"--quantize {quantize} is for --format hf alone, got --format {format}")
    if importance is not None and format == "meta":
        raise ValueError(f"--imatrix {importance.path} is for weights that are quantized, --format meta has none")
    name = dtype or (AS_STORED if format == "gguf" and checkpoint.is_quantized else dtype_name(checkpoint.dtype))
    plan = ExportPlan(
        checkpoint=checkpoint,
        reopen=reopen or (lambda: checkpoint),
        args=_args(checkpoint, tokenizer.tokenizer, pads_vocab=format == "hf"),
        tokenizer=tokenizer,
        dtype=DTYPES.get(name, torch.float32),
        context_len=context_len or trained_context_len(checkpoint),
        importance=importance,
    )
    if format == "meta":
        return MetaWriter(plan, shards)
    return HuggingFaceWriter(plan, quantize) if format == "hf" else GGUFFileWriter(plan, name, is_pure=is_pure)


def write_checkpoint(writer: Writer, path: Path, progress: Progress) -> None:
    """Write to a path that does not exist; it appears when all is there. Raise OSError where it cannot."""
    with new_path(path, writer.nbytes) as partial:
        writer.write(partial, progress)


def _args(checkpoint: Checkpoint, tokenizer: Tokenizer, pads_vocab: bool) -> ModelArgs:
    """Return the architecture, with ties that the file does not tell: Meta's releases repeat the table as the output.

    pads_vocab: whether embeddings may have more rows than there are tokens; else those are left out.
    """
    n_words = tokenizer.n_words
    args = dataclasses.replace(checkpoint.args, vocab_size=check_vocab_size(checkpoint, tokenizer))
    check_weights(checkpoint, args)
    if args.vocab_size > n_words and not pads_vocab:
        log.info("the last %d rows of the embedding are for no token: left out", args.vocab_size - n_words)
        args = dataclasses.replace(args, vocab_size=n_words)
    if not args.tied_embeddings and same_matrix(checkpoint, "tok_embeddings.weight", "output.weight"):
        args = dataclasses.replace(args, tied_embeddings=True)
    return args
