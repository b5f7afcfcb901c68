"""`llama convert`: a checkpoint of any format becomes Meta's shards or a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from llama.checkpoint import open_checkpoint, with_adapters
from llama.checkpoint.export.streaming_writers import check_new
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import Writer, write_checkpoint, writer
from llama.checkpoint.lora import adapters_of
from llama.cli.signals import signals_raise
from llama.hub.find import local_path

log = logging.getLogger("llama")


def main(
    src: Path,
    dst: Path,
    *,
    format: str,
    shards: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    lora: tuple[str, ...] = (),
    tokenizer_path: Path | None = None,
) -> None:
    """Convert the checkpoint SRC to a new folder DST, which appears when it is complete.

    Args:
        src: a folder of Meta's or Hugging Face's format, a GGUF file, or a model's name.
        dst: the folder to make; one that exists must be empty.
        format: meta (consolidated.XX.pth and params.json) or hf (safetensors and config.json).
        shards: number of Meta's files, each an equal part of every weight.
        dtype: float32, bfloat16 or float16; default: as stored, and bfloat16 for quantized weights.
        quantize: int8 or int4, for --format hf: linear weights in blocks of 32 values, of 8.5 or 5 bits each.
        lora: adapter to merge, as PATH or PATH:SCALE, a folder of peft's or a GGUF file; may be given several times.
        tokenizer_path: tokenizer.model or tokenizer.json, or a model's name; default: the one beside or inside the
            weights.

    Examples:
        llama convert Llama-2-13b-hf Llama-2-13b --format meta --shards 2
        llama convert model.gguf Llama-2-13b-int4 --format hf --quantize int4
    """
    if format not in ("meta", "hf"):
        raise ValueError(f"--format must be meta or hf, got {format!r}")
    check_new(dst)
    checkpoint = with_adapters(open_checkpoint(src), lora)
    for adapter in adapters_of(checkpoint):
        log.info("lora %s", adapter)
    own = None if tokenizer_path is None else Path(local_path(tokenizer_path, tokenizer_only=True))
    tokenizer = tokenizer_source(checkpoint, own)
    made = writer(
        checkpoint,
        tokenizer,
        format,
        shards=shards,
        dtype=dtype,
        quantize=quantize,
        reopen=lambda: with_adapters(open_checkpoint(checkpoint.path), lora),
    )
    if checkpoint.is_quantized and dtype is None and quantize is None:
        log.info("the weights are quantized: they are written in bfloat16, unless --dtype or --quantize says otherwise")
    for left in sorted(dst.parent.glob(f"{dst.name}.partial-*")):
        log.info("%s is what a conversion that was killed has left, unless one is running: it can be removed", left)
    write(made, dst)


def write(made: Writer, path: Path) -> None:
    """Write a checkpoint with a bar of its progress, and say what was written; nothing stays of one that is stopped."""
    bar = tqdm(total=made.nbytes, unit="B", unit_scale=True, desc=path.name, file=sys.stderr, disable=None)
    with signals_raise(), bar:
        write_checkpoint(made, path, bar.update)
    log.info("%s: %.1f MB of weights", path, made.nbytes / 1e6)
