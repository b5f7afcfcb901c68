"""Turn tokenizer.model, of both kinds, and tekken.json into the tokenizer keys of a GGUF file's metadata, and back."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama.tokenizer import Tokenizer
from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, GGUFTokens, TokenType
from llama.tokenizer.pre_rules import PRE_RULES, TEKKEN
from llama.tokenizer.sentencepiece_vocab import SPACE, proto_from_gguf
from llama.tokenizer.tiktoken_vocab import N_SPECIAL, PATTERN, SPECIAL_TOKENS
from llama.tokenizer.vocab import byte_alphabet

# Those that mean something: releases differ in the names of the others.
USED_SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def metadata_of(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the vocabulary of a tokenizer.model or a tekken.json as GGUF would store it."""
    with path.open("rb") as file:
        first = file.read(1)
    if first == b"\n":  # field 1 of a protobuf message
        metadata = _from_sentencepiece(path, tokenizer)
    else:
        metadata = _from_byte_strings(tokenizer, TEKKEN if first == b"{" else PATTERN)
    n_tokens = len(metadata[TOKENIZER_KEY + "tokens"])
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    metadata |= {f"{TOKENIZER_KEY}{name}_token_id": number for name, number in ids.items() if 0 <= number < n_tokens}
    metadata[TOKENIZER_KEY + "add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _from_sentencepiece(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    control = set(tokenizer.special_tokens.values())

    def kind(i: int) -> TokenType:
        if i in control:
            return TokenType.CONTROL
        if sp.is_unknown(i):
            return TokenType.UNKNOWN
        if sp.is_unused(i):
            return TokenType.UNUSED
        return TokenType.BYTE if sp.is_byte(i) else TokenType.NORMAL

    ids = range(sp.vocab_size())
    return {
        TOKENIZER_KEY + "model": "llama",
        TOKENIZER_KEY + "tokens": [sp.id_to_piece(i) for i in ids],
        TOKENIZER_KEY + "scores": [sp.get_score(i) for i in ids],
        TOKENIZER_KEY + "token_type": [int(kind(i)) for i in ids],
        TOKENIZER_KEY + "unknown_token_id": sp.unk_id(),
        TOKENIZER_KEY + "add_space_prefix": sp.encode("x", out_type=str)[0].startswith(SPACE),
    }


def _from_byte_strings(tokenizer: Tokenizer, pattern: str) -> dict[str, Any]:
    special = {i: text for text, i in tokenizer.special_tokens.items()}
    priorities = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_words) if i not in special}
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    texts = {token: "".join([char_of[byte] for byte in token]) for token in priorities}
    tokens = special | {i: texts[token] for token, i in priorities.items()}
    pre = next(name for name, rule in PRE_RULES.items() if rule.splits == (pattern,) and rule.ignore_merges)
    ids = range(tokenizer.n_words)
    return {
        TOKENIZER_KEY + "model": "gpt2",
        TOKENIZER_KEY + "pre": pre,
        TOKENIZER_KEY + "tokens": [tokens[i] for i in ids],
        TOKENIZER_KEY + "token_type": [int(TokenType.CONTROL if i in special else TokenType.NORMAL) for i in ids],
        TOKENIZER_KEY + "merges": [f"{texts[a]} {texts[b]}" for a, b in merges_of(priorities)],
    }


def merges_of(priorities: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merges of BPE in their order, from the order of the tokens that they lead to, lowest number first.

    All pairs that make up a token are merges, because which pair meets first depends on the text around it.
    """
    for token in sorted(priorities, key=priorities.__getitem__):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        yield from sorted(
            (pair for pair in pairs if pair[0] in priorities and pair[1] in priorities),
            key=lambda pair: (priorities[pair[0]], priorities[pair[1]]),
        )


def tiktoken_model(tokenizer: Tokenizer) -> bytes | None:
    """Return the tokenizer.model of a tokenizer of Llama 3's kind; None when the tokenizer is of another kind."""
    n_plain = tokenizer.n_words - N_SPECIAL
    special = tokenizer.special_tokens
    if set(special.values()) != set(range(n_plain, tokenizer.n_words)):
        return None
    if any(special.get(text) != n_plain + SPECIAL_TOKENS.index(text) for text in USED_SPECIAL_TOKENS):
        return None
    return b"".join(base64.b64encode(tokenizer.token_bytes(i)) + b" %d\n" % i for i in range(n_plain))


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Return the SentencePiece model of a GGUF file's vocabulary."""
    return proto_from_gguf(GGUFTokens.from_metadata(metadata), metadata)
