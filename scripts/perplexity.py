"""Perplexity of a text: what a change of dtype or quantization costs, in one number.

The protocol, so that figures can be compared: the whole file is encoded once, as UTF-8 and without special tokens. It
is cut into windows that do not overlap, of --window tokens each; the last may be shorter. Where the tokenizer begins
texts with BOS, so does each window, and the BOS counts as one of its tokens. Every token of a window but the first is
scored, given those before it in the window: the logarithm of its softmax over fp32 logits. Perplexity is exp of minus
the mean over all scored tokens of all windows. A longer window gives a lower figure, so compare at the same one.
"""

from __future__ import annotations

import json as json_format
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama import Llama
from llama.cli import flags as cli

ROOT = Path(__file__).resolve().parents[1]
MOST_NATS = 700  # of which exp is still a number


def main(
    *,
    text: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a text file under a model, in windows that do not overlap; alone or under torchrun.

    Args:
        text: a file of UTF-8 text.
        ckpt_dir: as for the examples; default: the demo model.
        tokenizer_path: as for the examples; default: the one beside or inside the weights.
        window: tokens that are read at once, the first of which is not scored.
        max_tokens: read so many tokens of the text and no more.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        quantize: form of the weights in memory, as for Llama.build; default: dtype.
        json: print one JSON object.
    """
    if window < 2:
        raise ValueError(f"--window must be at least 2, got {window}: its first token is not scored")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"--max_tokens must be at least 2, got {max_tokens}: the first is not scored")
    content = read_text(Path(text))
    path = ckpt_dir if ckpt_dir is not None else cli.demo_model(ROOT)
    build: dict[str, Any] = {} if quantize is None else {"quantize": quantize}
    llm = Llama.build(path, tokenizer_path, window, 1, device=device, dtype=dtype, **build)
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
    if cli.is_first_rank():
        said = "perplexity {perplexity:.4f}: {tokens} tokens scored in {windows} windows".format(**result)
        print(json_format.dumps({**result, "window": window}) if json else f"{said} of up to {window}")


def read_text(path: Path) -> str:
    """The text of a file, byte for byte. ValueError when there is none in it, or when it is not UTF-8."""
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 from byte {error.start} on: convert it, with iconv for example"
        ) from None


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


if __name__ == "__main__":
    cli.run(main)
