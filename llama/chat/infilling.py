"""Code Llama's prompts for filling a gap between two texts (arXiv:2308.12950, section 2.3)."""

from __future__ import annotations

from llama.tokenizer import Tokenizer

PREFIX_TOKEN, SUFFIX_TOKEN, MIDDLE_TOKEN = "▁<PRE>", "▁<SUF>", "▁<MID>"

# Marks the gap in a prompt on the command line.
FILL_MARK = "<FILL>"


def can_infill(tokenizer: Tokenizer) -> bool:
    """Tell whether the tokenizer has the control tokens of infilling."""
    return all(token in tokenizer.special_tokens for token in (PREFIX_TOKEN, SUFFIX_TOKEN, MIDDLE_TOKEN))


def split_at_gap(text: str) -> tuple[str, str]:
    """Return what is before and what is after the mark of a gap; raise ValueError unless there is exactly one."""
    if text.count(FILL_MARK) != 1:
        raise ValueError(f"prompt {text!r} has {text.count(FILL_MARK)} marks {FILL_MARK}: each needs exactly one")
    before, _, after = text.partition(FILL_MARK)
    return before, after


def infilling_tokens(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
    """Encode a prompt for the text between prefix and suffix; raise ValueError unless the tokenizer can infill.

    suffix_first puts the suffix before the prefix: <PRE> <SUF> suffix <MID> prefix.
    """
    if not can_infill(tokenizer):
        raise ValueError(
            f"infilling needs the tokens {PREFIX_TOKEN}, {SUFFIX_TOKEN} and {MIDDLE_TOKEN}, which this tokenizer lacks"
        )
    pre, suf, mid = (tokenizer.special_tokens[token] for token in (PREFIX_TOKEN, SUFFIX_TOKEN, MIDDLE_TOKEN))
    # The suffix continues a text: it gets no space before its first word.
    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = tokenizer.encode(suffix, bos=False, eos=False, add_prefix_space=False)
    if suffix_first:
        return [tokenizer.bos_id, pre, suf, *after, mid, *before]
    return [tokenizer.bos_id, pre, *before, suf, *after, mid]
