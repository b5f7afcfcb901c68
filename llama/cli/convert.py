"""`llama convert`: a checkpoint of any format becomes Meta's shards, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from llama.checkpoint import open_checkpoint, with_adapters
from llama.checkpoint.export.streaming_writers import check_new
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import Writer, write_checkpoint, writer
from llama.checkpoint.imatrix import read_imatrix
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
    pure: bool = False,
    imatrix: Path | None = None,
    lora: tuple[str, ...] = (),
    tokenizer_path: Path | None = None,
) -> None:
    """Convert the checkpoint SRC to DST, a new folder or GGUF file, which appears when it is complete.

    Args:
        src: a folder of Meta's or Hugging Face's format, a GGUF file, or a model's name.
        dst: the folder to make, which may be there if it is empty, or the file, for --format gguf.
        format: meta (consolidated.XX.pth and params.json), hf (safetensors and config.json) or gguf.
        shards: number of Meta's files, each an equal part of every weight.
        dtype: float32, bfloat16 or float16; default: as stored, and bfloat16 for quantized weights. For GGUF also q8_0,
            q4_k_m and what else llama.cpp's quantize has: q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q5_k_s, q5_k_m, q6_k,
            q4_0, q4_1, q5_0, q5_1, iq4_nl, iq4_xs; quantized weights keep their types by default.
        quantize: int8 or int4, for --format hf: linear weights in blocks of 32 values, of 8.5 or 5 bits each.
        pure: for --format gguf: have no tensor a finer type than the others.
        imatrix: what llama calibrate or llama.cpp's llama-imatrix has measured of this model: columns of weights that
            count more are rounded with more care.
        lora: adapter to merge, as PATH or PATH:SCALE, a folder of peft's or a GGUF file; may be given several times.
        tokenizer_path: tokenizer.model or tokenizer.json, or a model's name; default: the one beside or inside the
            weights.

    Examples:
        llama convert Llama-2-13b-hf Llama-2-13b --format meta --shards 2
        llama convert model.gguf Llama-2-13b-int4 --format hf --quantize int4
        llama convert Llama-3.2-1B-Instruct Llama-3.2-1B-Instruct.Q4_K_M.gguf --format gguf --dtype q4_k_m
        llama convert Llama-3.2-1B 1B.Q2_K.gguf --format gguf --dtype q2_k --imatrix 1b.imatrix.gguf
    """
    check_new(dst)
    check_suffix(dst, format)
    if pure and format != "gguf":
        raise ValueError(f"--pure is for --format gguf alone, got --format {format}")
    if pure and dtype is None:
        raise ValueError(
            "--pure has nothing to do without --dtype, which names the type: give --dtype q4_k, for example"
        )
    checkpoint = with_adapters(open_checkpoint(src), lora, requantizes=True)
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
        is_pure=pure,
        importance=None if imatrix is None else read_imatrix(imatrix),
        reopen=lambda: with_adapters(open_checkpoint(checkpoint.path), lora, requantizes=True),
    )
    if checkpoint.is_quantized and dtype is None and quantize is None and format != "gguf":
        log.info("the weights are quantized: they are written in bfloat16, unless --dtype or --quantize says otherwise")
    for left in sorted(dst.parent.glob(f"{dst.name}.partial-*")):
        log.info("%s is what a conversion that was killed has left, unless one is running: it can be removed", left)
    write(made, dst)


def check_suffix(path: Path, format: str) -> None:
    """Raise ValueError for a GGUF file of another name, and for a folder of such a name."""
    if format == "gguf" and path.suffix != ".gguf":
        raise ValueError(f"{path} must end in .gguf: this format is one file")
    if format != "gguf" and path.suffix == ".gguf":
        raise ValueError(
            f"{path} ends in .gguf, and --format {format} makes a folder: give --format gguf, or another name"
        )


def write(made: Writer, path: Path) -> None:
    """Write a checkpoint with a bar of its progress, and say what was written; nothing stays of one that is stopped."""
    bar = tqdm(total=made.nbytes, unit="B", unit_scale=True, desc=path.name, file=sys.stderr, disable=None)
    with signals_raise(), bar:
        write_checkpoint(made, path, bar.update)
    log.info("%s: %.1f MB of weights", path, made.nbytes / 1e6)
