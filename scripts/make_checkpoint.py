"""Make a checkpoint of a released model's shape with random weights and a working tokenizer, in any format.

For trying out loading, resharding and speed where the real weights are not at hand.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from llama.checkpoint.export.streaming_writers import check_new
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.cli import flags as cli
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint

log = logging.getLogger("llama")


def main(
    dst: str,
    *,
    preset: str,
    format: str = "meta",
    shards: int = 1,
    dtype: str = "bfloat16",
    seed: int = 1,
) -> None:
    """Make DST, a folder or, for GGUF, a file, which appears when it is complete.

    Args:
        dst: what to make; it must not exist.
        preset: whose shape: tiny, smollm2-135m, llama-2-7b, llama-3.1-8b and others; any other word lists them all.
        format: meta, hf or gguf.
        shards: number of Meta's files.
        dtype: float32, bfloat16 or float16; for GGUF also q8_0, q5_1, q5_0, q4_1 or q4_0.
        seed: the same seed gives the same weights, in every format.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if seed < 0:
        raise ValueError(f"--seed must not be negative, got {seed}")
    path = Path(dst)
    check_new(path)
    if format == "gguf" and path.suffix != ".gguf":
        raise ValueError(f"{path} must end in .gguf: this format is one file")
    checkpoint = RandomCheckpoint(preset, PRESETS[preset], seed)
    made = writer(checkpoint, tokenizer_source(checkpoint), format, shards=shards, dtype=dtype)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    # An exception, so that what is incomplete is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tqdm(total=made.nbytes, unit="B", unit_scale=True, desc=path.name, file=sys.stderr, disable=None) as bar:
        write_checkpoint(made, path, bar.update)
    log.info("%s: %.1f MB of weights", path, made.nbytes / 1e6)


if __name__ == "__main__":
    cli.run(main)
