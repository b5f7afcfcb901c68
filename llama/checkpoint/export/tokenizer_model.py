"""Meta's tokenizer.model, of both kinds, to and from the tokenizer keys of a GGUF file's metadata."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama.tokenizer import Tokenizer
from llama.tokenizer.gguf_bpe_vocab import PRE_RULES
from llama.tokenizer.gguf_tokens import PREFIX, GGUFTokens, TokenType
from llama.tokenizer.sentencepiece_vocab import SPACE, proto_from_gguf
from llama.tokenizer.tiktoken_vocab import N_SPECIAL, NAMED_SPECIAL, PATTERN
from llama.tokenizer.vocab import byte_alphabet

# Of sentencepiece_model.proto: trainer_spec in ModelProto, texts of special pieces in TrainerSpec.
TRAINER_SPEC = 2
SPECIAL_PIECES = {"unk_id": 45, "bos_id": 46, "eos_id": 47, "pad_id": 48}
LENGTH_DELIMITED = 2

# Those that mean something: releases differ in the names of the others.
USED_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL_TOKENS = (*NAMED_SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(2, N_SPECIAL - 10)))


def metadata_of(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary of a tokenizer.model as GGUF would store it."""
    with path.open("rb") as file:
        is_sentencepiece = file.read(1) == b"\n"  # field 1 of a protobuf message
    metadata = _from_sentencepiece(path, tokenizer) if is_sentencepiece else _from_ranks(tokenizer)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    metadata |= {f"{PREFIX}{name}_token_id": number for name, number in ids.items() if number >= 0}
    metadata[PREFIX + "add_bos_token"] = tokenizer.add_bos
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
        PREFIX + "model": "llama",
        PREFIX + "tokens": [sp.id_to_piece(i) for i in ids],
        PREFIX + "scores": [sp.get_score(i) for i in ids],
        PREFIX + "token_type": [int(kind(i)) for i in ids],
        PREFIX + "unknown_token_id": sp.unk_id(),
        PREFIX + "add_space_prefix": sp.encode("x", out_type=str)[0].startswith(SPACE),
    }


def _from_ranks(tokenizer: Tokenizer) -> dict[str, Any]:
    n_ranks = tokenizer.n_words - N_SPECIAL
    ranks = {tokenizer.token_bytes(i): i for i in range(n_ranks)}
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    texts = {token: "".join([char_of[byte] for byte in token]) for token in ranks}
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    pre = next(name for name, rule in PRE_RULES.items() if rule.splits == (PATTERN,) and rule.ignore_merges)
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": pre,
        PREFIX + "tokens": [*texts.values(), *special],
        PREFIX + "token_type": [int(TokenType.NORMAL)] * n_ranks + [int(TokenType.CONTROL)] * N_SPECIAL,
        PREFIX + "merges": [f"{texts[a]} {texts[b]}" for a, b in merges_of(ranks)],
    }


def merges_of(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merges of BPE in their order, from the order of what they lead to.

    All pairs that make up a token are merges, because which pair meets first depends on the text around it.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        yield from sorted(
            (pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )


def ranks_model(tokenizer: Tokenizer) -> bytes | None:
    """A tokenizer of Llama 3's kind as its tokenizer.model has it, ranks alone; None when it is of another kind."""
    n_ranks = tokenizer.n_words - N_SPECIAL
    special = tokenizer.special_tokens
    if set(special.values()) != set(range(n_ranks, tokenizer.n_words)):
        return None
    if any(special.get(text) != n_ranks + SPECIAL_TOKENS.index(text) for text in USED_SPECIAL):
        return None
    return b"".join(base64.b64encode(tokenizer.token_bytes(i)) + b" %d\n" % i for i in range(n_ranks))


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """A SentencePiece model that knows its special pieces, as the GGUF file does."""
    tokens = GGUFTokens.from_metadata(metadata)
    spec = b""
    for name, field in SPECIAL_PIECES.items():
        number = getattr(tokens, name)
        if number >= 0:
            spec += _field(field, tokens.texts[number].encode())
    # A message that comes twice is merged.
    return proto_from_gguf(tokens, metadata) + _field(TRAINER_SPEC, spec)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([byte | 0x80 for byte in low[:-1]] + low[-1:])
