"""`llama perplexity`: what a change of dtype or quantization costs, in one number.

The protocol, so that figures can be compared: the whole file is encoded once, as UTF-8 and without special tokens. It
is cut into windows that do not overlap, of --window tokens each; the last may be shorter. Where the tokenizer begins
texts with BOS, so does each window, and the BOS counts as one of its tokens. Every token of a window but the first is
scored, given those before it in the window: the logarithm of its softmax over fp32 logits. Perplexity is exp of minus
the mean over all scored tokens of all windows. A longer window gives a lower figure, so compare at the same one, and
on the same text: without --text it is perplexity.txt, beside this file.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from llama import Llama
from llama.cli.options import GENERATION, SIZES, build_flags
from llama.cli.printing import json_line
from llama.cli.prompts import on_first_rank, read_text
from llama.cli.runner import is_first_rank
from llama.engine.options import BuildOptions

TEXT = Path(__file__).with_name("perplexity.txt")  # 27 kB of prose; a test pins its sha256
MOST_NATS = 700  # of which exp is still a number


def main(
    options: Annotated[BuildOptions, build_flags(*SIZES, *GENERATION, "compile")],
    *,
    text: Path = TEXT,
    window: int = 512,
    max_tokens: int | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a text file under a model, in windows that do not overlap; alone or under torchrun.

    Args:
        text: a file of UTF-8 text, or - for stdin; default: one that comes with this package and never changes.
        window: tokens that are read at once, the first of which is not scored.
        max_tokens: read so many tokens of the text and no more.
        json: print one JSON object.

    Examples:
        llama perplexity --quantize int8
        llama perplexity --text book.txt --ckpt_dir Llama-3.2-1B --quantize int4
    """
    if window < 2:
        raise ValueError(f"--window must be at least 2, got {window}: its first token is not scored")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max_tokens must be at least 2, got {max_tokens}: the first is not scored")
    content = on_first_rank(lambda: read_text(text), options.timeout)
    llm = Llama.from_options(dataclasses.replace(options, max_seq_len=window, max_batch_size=1))
    tokens = llm.tokenizer.encode(content, bos=False, eos=False)[:max_tokens]
    windows = cut(tokens, window, [llm.tokenizer.bos_id] if llm.tokenizer.add_bos else [])
    if not windows:
        raise ValueError(f"{text} has {len(tokens)} token{'s' * (len(tokens) != 1)}: the first cannot be scored")
    scores = list(scored(llm, windows))
    mean = statistics.fmean(scores)
    if not mean > -MOST_NATS:  # NaN is not, either
        raise ValueError(
            f"the mean log-probability is {mean}: the weights are damaged, or too large for this dtype (try --dtype "
            "float32)"
        )
    result = {"perplexity": math.exp(-mean), "tokens": len(scores), "windows": len(windows)}
    if is_first_rank():
        said = "perplexity {perplexity:.4f}: {tokens} tokens scored in {windows} windows".format(**result)
        print(json_line({**result, "window": window}) if json else f"{said} of up to {window}")


def cut(tokens: list[int], window: int, begin: list[int]) -> list[list[int]]:
    """Windows of at most `window` tokens, each after `begin`; one that has nothing to score is left out."""
    step = window - len(begin)
    windows = [begin + tokens[i : i + step] for i in range(0, len(tokens), step)]
    return [each for each in windows if len(each) > 1]


def scored(llm: Llama, windows: list[list[int]]) -> Iterator[float]:
    """Log-probabilities of all tokens but the first of each window."""
    first = -1  # the window whose first token has been seen
    steps = llm.stream(windows, max_gen_len=0, logprobs=True, echo=True)
    with tqdm(total=len(windows), unit="window", file=sys.stderr, disable=None, leave=False) as bar:
        for step in steps:
            if step.token is None:
                bar.update()
            elif step.index == first:
                assert step.logprob is not None
                yield step.logprob
            else:
                first = step.index
