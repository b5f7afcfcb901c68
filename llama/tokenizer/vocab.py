"""What every kind of vocabulary gives to `Tokenizer`, and what several kinds share."""

import logging
from collections.abc import Container, Iterable, Mapping
from functools import cache
from typing import Any, Protocol

log = logging.getLogger("llama")


class Vocab(Protocol):
    """One loaded tokenizer file; its attributes are those of `Tokenizer`.

    The token ids that its methods get are in range, and the texts are valid Unicode.
    """

    n_words: int
    n_trained: int  # pieces of text and what was trained with them; later ids are of added tokens
    bos_id: int  # -1 when there is none, as for eos_id and pad_id
    eos_id: int
    pad_id: int
    add_bos: bool
    prefix_space_after_special: bool
    special_tokens: dict[str, int]

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        """Return the ids of s as plain text: never one of `special_tokens`, whatever s spells."""
        ...

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return the bytes that a token stands for, as `Tokenizer.token_bytes` does."""
        ...


# A control token with one of these names ends a generation.
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

# Tokens with these names are control tokens wherever they occur, although some files store them as ordinary or
# user-defined pieces, which typed text would reach.
CONTROL_TOKENS = END_TOKENS | {"▁<PRE>", "▁<MID>", "▁<SUF>", "<|im_start|>"}


def default_template(templates: Mapping[str, Any], where: str) -> Any:
    """Return the chat template that is called "default", else the one for tools, as llama.cpp does, else None.

    Where there are both, it is one that reads "tool_use" where tools are given, as transformers does.
    """
    if all(isinstance(templates.get(name), str) for name in ("default", "tool_use")):
        # Where a block begins or ends, jinja drops newlines, and at the end of a template one; {{ "" }} keeps them.
        plain, for_tools = (
            '{{ "" }}' + templates[name].removesuffix("\n") + '{{ "" }}' for name in ("default", "tool_use")
        )
        return "{% if tools %}" + for_tools + "{% else %}" + plain + "{% endif %}"
    for name in ("default", "tool_use"):
        if templates.get(name) is not None:
            return templates[name]
    if templates:
        log.warning("%s has chat templates, but none for plain dialogs: %s", where, ", ".join(sorted(templates)))
    return None


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in GPT-2's spelling of byte-level BPE.

    Printable characters stand for themselves, and chr(256 + n) for the n-th other byte.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def parse_merges(entries: Iterable[Any], pieces: Container[str], where: str) -> list[tuple[str, str]]:
    """Return BPE merges, each given as a list of two pieces or as a text with a space between them.

    Raises ValueError unless the two are pieces that join to a third: the `tokenizers` library panics on some others.
    """
    merges = []
    for entry in entries:
        pair = entry.partition(" ")[::2] if isinstance(entry, str) else tuple(entry)
        if len(pair) != 2 or "".join(pair) not in pieces or pair[0] not in pieces or pair[1] not in pieces:
            raise ValueError(f"{where} {entry!r:.60}: expected two pieces of the vocabulary that join to a third")
        merges.append(pair)
    return merges
