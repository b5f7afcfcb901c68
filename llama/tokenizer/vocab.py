"""What every kind of tokenizer gives to `Tokenizer`, and the names of tokens that mean something to all kinds."""

from typing import Protocol


class Vocab(Protocol):
    """One loaded tokenizer. Ids passed in are in range; strings passed in are valid Unicode."""

    n_words: int
    bos_id: int  # -1: none, as for the next two
    eos_id: int
    pad_id: int
    add_bos: bool
    special_tokens: dict[str, int]

    def encode(self, s: str) -> list[int]:
        """Ids of plain text: never one of `special_tokens`, whatever s spells."""
        ...

    def token_bytes(self, token: int, at_start: bool) -> bytes: ...


# A control token of one of these names ends a generation.
END_TOKENS = frozenset(
    {
        "</s>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|EOT|>",
        "<EOT>",
        "▁<EOT>",  # Code Llama
        "<｜end▁of▁sentence｜>",
    }
)

# Control tokens by use, although some files store them as ordinary or user-defined pieces, which typed text reaches.
MARKERS = END_TOKENS | {"▁<PRE>", "▁<MID>", "▁<SUF>", "<step>", "<|im_start|>"}
