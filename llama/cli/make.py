"""`llama make`: a checkpoint of a released model's shape with random weights and a working tokenizer, in any format.

For trying out loading, resharding and speed where the real weights are not at hand.
"""

from __future__ import annotations

from pathlib import Path

from llama.checkpoint.export.streaming_writers import check_new
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import writer
from llama.cli.convert import write
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint


def main(
    dst: Path,
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
        preset: whose shape: tiny, smollm2-135m, llama-3.1-8b, qwen3-8b and others; any other word lists them all.
        format: meta, hf or gguf.
        shards: number of Meta's files.
        dtype: float32, bfloat16 or float16; for GGUF also q8_0, q5_1, q5_0, q4_1, q4_0, q6_k, q5_k, q4_k, q3_k, q2_k,
            iq4_nl or iq4_xs.
        seed: the same seed gives the same weights, in every format.

    Examples:
        llama make tiny --preset tiny --shards 4
        llama make random.gguf --preset llama-3.2-1b --format gguf --dtype q8_0
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if seed < 0:
        raise ValueError(f"--seed must not be negative, got {seed}")
    check_new(dst)
    if format == "gguf" and dst.suffix != ".gguf":
        raise ValueError(f"{dst} must end in .gguf: this format is one file")
    checkpoint = RandomCheckpoint(preset, PRESETS[preset], seed)
    made = writer(checkpoint, tokenizer_source(checkpoint), format, shards=shards, dtype=dtype)
    write(made, dst)
