"""`llama calibrate`: an importance matrix, which tells quantizers which columns of weights count most.

What a matrix's column is multiplied by is a feature of the activations. Where that is large, an error of the column's
weights is, too: in expectation a rounding error counts by the feature's mean square. This command measures it over a
text; `llama convert --imatrix` minimises the sum of squared errors that count so.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from llama.checkpoint.export.streaming_writers import check_place, new_path
from llama.checkpoint.imatrix import check_measured, write_imatrix
from llama.cli.options import GENERATION, SIZES, build_flags
from llama.cli.perplexity import cut
from llama.cli.prompts import STDIN, on_first_rank, read_text
from llama.cli.runner import is_first_rank
from llama.cli.signals import signals_raise
from llama.distributed.job import agree
from llama.engine.activations import measure_squares
from llama.engine.build import build_model, with_local_files
from llama.engine.options import BuildOptions

log = logging.getLogger("llama")

FEW_TOKENS = 2000


def main(
    options: Annotated[BuildOptions, build_flags(*SIZES, *GENERATION, "quantize", "imatrix", "compile")],
    *,
    text: Path,
    output: Path = Path("imatrix.gguf"),
    window: int = 512,
    max_tokens: int | None = None,
) -> None:
    """Measure which columns of a model's weights count most for a text; alone or under torchrun.

    The file is llama.cpp's importance matrix: llama convert --imatrix reads it, and so does llama-quantize.

    Args:
        text: a file of UTF-8 text like what the model will read, or - for stdin; some 10,000 tokens are enough.
        output: the file to make, of GGUF.
        window: tokens that are read at once, as a text of its own.
        max_tokens: read so many tokens of the text and no more.

    Examples:
        llama calibrate --ckpt_dir Llama-3.2-1B-Instruct --text articles.txt --output 1b.imatrix.gguf
        torchrun --nproc_per_node 8 -m llama calibrate --ckpt_dir Llama-3.1-70B --text articles.txt
    """
    if window < 2:
        raise ValueError(f"--window must be at least 2, got {window}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max_tokens must be at least 2, got {max_tokens}")
    if output.suffix != ".gguf":
        raise ValueError(f"--output {output} must end in .gguf: that is its format")

    def read() -> str:
        check_place(output)
        return read_text(text)

    content = on_first_rank(read, options.timeout)
    options = with_local_files(dataclasses.replace(options, max_seq_len=window, max_batch_size=1))
    model, tokenizer, _ = build_model(options, by_modules=True)
    tokens = tokenizer.encode(content, bos=False, eos=False)[:max_tokens]
    windows = cut(tokens, window, [tokenizer.bos_id] if tokenizer.add_bos else [])
    if not windows:
        raise ValueError(f"{text} has {len(tokens)} token{'s' * (len(tokens) != 1)}: give a longer text")

    squares = measure_squares(
        model,
        windows,
        lambda own: tqdm(own, unit="window", file=sys.stderr, disable=None if is_first_rank() else True, leave=False),
    )
    check_measured(squares)
    with agree():
        if is_first_rank():
            name = "stdin" if text == Path(STDIN) else str(text)
            with signals_raise(), new_path(output) as partial:
                write_imatrix(partial, squares, [name], len(windows), window)
    read_tokens = sum(map(len, windows))
    count = f"{len(windows)} window{'s' * (len(windows) != 1)}"
    log.info("%s: %d matrices, over %d tokens in %s", output, len(squares), read_tokens, count)
    if read_tokens < FEW_TOKENS:
        log.warning("%d tokens are few: with %d or more, figures hang less on chance", read_tokens, FEW_TOKENS)
