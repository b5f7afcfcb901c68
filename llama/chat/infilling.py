"""Code Llama's prompts for filling a gap between two texts (arXiv:2308.12950, section 2.3)."""

from __future__ import annotations

from llama.tokenizer import Tokenizer
from llama.tokenizer.meta_names import MIDDLE_TOKEN, PREFIX_TOKEN, SUFFIX_TOKEN

# Marks the gap in a prompt on the command line.
FILL_MARK = "<FILL>"


def can_infill(tokenizer: Tokenizer) -> bool:
    """Tell whether the tokenizer has the control tokens of infilling."""
    return None not in (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id)


def split_at_gap(text: str) -> tuple[str, str]:
    """Return what is before and what is after the mark of a gap; raise ValueError unless there is exactly one."""
    if text.count(FILL_MARK) != 1:
        raise ValueError(f"prompt {text!r} has {text.count(FILL_MARK)} marks {FILL_MARK}: each needs exactly one")
    before, _, after = text.partition(FILL_MARK)
    return before, after


def infilling_prompt_tokens(tokenizer: Tokenizer, pre: str, suf: str, suffix_first: bool = False) -> list[int]:
    """Encode a prompt for the text between pre and suf; raise ValueError unless the tokenizer can infill.

    suffix_first puts the suffix before the prefix: <PRE> <SUF> suffix <MID> prefix.
    """
    pre_id, suf_id, mid_id = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    if pre_id is None or suf_id is None or mid_id is None:
        raise ValueError(
            f"infilling needs the tokens {PREFIX_TOKEN}, {SUFFIX_TOKEN} and {MIDDLE_TOKEN}, which this tokenizer lacks"
        )
    before = tokenizer.encode(pre, bos=False, eos=False)
    after = tokenizer.encode_infilling(suf)
    if suffix_first:
        return [tokenizer.bos_id, pre_id, suf_id, *after, mid_id, *before]
    return [tokenizer.bos_id, pre_id, *before, suf_id, *after, mid_id]
