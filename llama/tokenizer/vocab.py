"""What every kind of tokenizer gives to `Tokenizer`, and the names of tokens that mean something to all kinds."""

from functools import cache
from typing import Protocol


class Vocab(Protocol):
    """One loaded tokenizer. Ids passed in are in range; strings passed in are valid Unicode."""

    n_words: int
    bos_id: int  # -1: none, as for the next two
    eos_id: int
    pad_id: int
    add_bos: bool
    restarts: bool
    special_tokens: dict[str, int]

    def encode(self, s: str, continues: bool) -> list[int]:
        """Ids of plain text: never one of `special_tokens`, whatever s spells. continues: see `Tokenizer.encode`."""
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
        "<step>",  # Code Llama 70B Instruct
        "<｜end▁of▁sentence｜>",
    }
)

# Control tokens by use, although some files store them as ordinary or user-defined pieces, which typed text reaches.
MARKERS = END_TOKENS | {"▁<PRE>", "▁<MID>", "▁<SUF>", "<step>", "<|im_start|>"}


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters to bytes: printable ones stand for themselves, the n-th other byte is chr(256 + n)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
