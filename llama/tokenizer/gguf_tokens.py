"""Check the tokenizer keys that both kinds of GGUF tokenizer share. Knows metadata, not files."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from llama.tokenizer.vocab import default_template

log = logging.getLogger("llama")

TOKENIZER_KEY = "tokenizer.ggml."
MODELS = ("gpt2", "llama")
NONE_ID = 0xFFFFFFFF  # -1 as some converters wrote it
# Keys that are read, and those about what no LLaMA tokenizer does, or about tokens that text generation never needs.
_IDS = ("bos", "eos", "eot", "eom", "padding", "unknown", "seperator", "cls", "mask", "prefix", "suffix", "middle")
_FIM_IDS = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
_OTHERS = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_space_prefix",
    "remove_extra_whitespaces", "add_eos_token", "add_sep_token", "token_type_count", "eos_token_ids",
)  # fmt: skip
KNOWN_TOKENIZER_KEYS = {
    TOKENIZER_KEY + name for name in (*(f"{name}_token_id" for name in (*_IDS, *_FIM_IDS)), *_OTHERS)
}


class TokenType(IntEnum):
    """The values of tokenizer.ggml.token_type, the same as SentencePiece's piece types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GGUFTokens:
    """The vocabulary of a GGUF file. An id is -1 when there is none; the texts are unique and never empty."""

    model: str
    texts: list[str]
    types: list[int]
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    stops: tuple[int, ...]  # the tokens that end a turn and a message
    add_bos: bool | None  # None when the file does not say
    chat_template: str | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "GGUFTokens":
        """Read the keys; ValueError names one that is missing or does not fit, and its value."""
        model = metadata.get(TOKENIZER_KEY + "model")
        if model not in MODELS:
            raise ValueError(f"{TOKENIZER_KEY}model is {model!r}: supported are {', '.join(MODELS)}")
        # SentencePiece takes no empty text; the substitute is llama.cpp's.
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(array(metadata, "tokens", (str,)))]
        types = array(metadata, "token_type", (int,), len(texts))
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{TOKENIZER_KEY}tokens is no valid Unicode: {error}") from None
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            if first.setdefault(text, i) != i:
                raise ValueError(f"{TOKENIZER_KEY}tokens has {text!r} twice, as ids {first[text]} and {i}")

        def special(name: str, default: int = -1) -> int:
            """Return an id; one beyond the vocabulary is left out, as llama.cpp does."""
            key = f"{TOKENIZER_KEY}{name}_token_id"
            token = metadata.get(key, default)
            if type(token) is not int:
                raise ValueError(f"{key} is {token!r}: expected a token id")
            if token in (-1, NONE_ID):
                return -1
            if not 0 <= token < len(texts):
                default = default if default < len(texts) else -1
                instead = f"{default} is taken" if default >= 0 else "it is left out"
                log.warning("%s is %d, but there are %d tokens: %s", key, token, len(texts), instead)
                return default
            return token

        # llama.cpp's defaults for SentencePiece; its default of 11 for gpt2 fits Falcon alone.
        bos, eos, unk = (1, 2, 0) if model == "llama" else (-1, -1, -1)
        if model == "llama" and TokenType.UNKNOWN in types:
            unk = types.index(TokenType.UNKNOWN)
        return cls(
            model=model,
            texts=texts,
            types=types,
            bos_id=special("bos", bos),
            eos_id=special("eos", eos),
            pad_id=special("padding"),
            unk_id=special("unknown", unk),
            stops=(special("eot"), special("eom")),
            add_bos=flag(metadata, "add_bos_token"),
            chat_template=_chat_template(metadata),
        )


def flag(metadata: Mapping[str, Any], name: str) -> bool | None:
    """Return a value of the metadata that is true or false, or None; ValueError names any other."""
    value = metadata.get(TOKENIZER_KEY + name)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{TOKENIZER_KEY}{name} is {value!r:.60}: expected true or false")
    return value


def _chat_template(metadata: Mapping[str, Any]) -> str | None:
    """Return the default template: a text, the first of a list, or that under a key which ends in its name."""
    key = "tokenizer.chat_template"
    named = {other.removeprefix(key + "."): text for other, text in metadata.items() if other.startswith(key + ".")}
    template = metadata.get(key)
    if isinstance(template, list):
        template = next(iter(template), None)
    template = default_template(named, "the GGUF file") if template is None else template
    return template if isinstance(template, str) else None


def array(metadata: Mapping[str, Any], name: str, kinds: tuple[type, ...], length: int | None = None) -> list[Any]:
    """Return an array of the metadata; ValueError names one that is missing, mistyped or of another length."""
    values = metadata.get(TOKENIZER_KEY + name)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{TOKENIZER_KEY}{name} is missing or empty: the file has no whole tokenizer")
    wrong = [value for value in values if type(value) not in kinds]
    if wrong:
        raise ValueError(
            f"{TOKENIZER_KEY}{name} holds {wrong[0]!r}: expected {' or '.join(kind.__name__ for kind in kinds)}"
        )
    if length is not None and len(values) != length:
        raise ValueError(f"{TOKENIZER_KEY}{name} has {len(values)} entries, {TOKENIZER_KEY}tokens has {length}")
    return values
