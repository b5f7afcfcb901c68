"""SentencePiece: the `tokenizer.model` of Llama 1, Llama 2 and Code Llama, and GGUF's "llama" kind turned into one.

A model is a protobuf message. The few fields needed are read and written by hand: sentencepiece's generated module
cannot be imported in a process that has imported transformers' copy of it (the descriptor pool refuses the second).
"""

import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, GGUFTokens, TokenType, array, flag
from llama.tokenizer.vocab import CONTROL_TOKENS

SPACE = "▁"
BEFORE = "☺"  # merges with no character after it
# Field numbers of sentencepiece_model.proto.
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # in ModelProto
PIECE, SCORE, TYPE = 1, 2, 3  # in ModelProto.SentencePiece
MODEL_TYPE, BYTE_FALLBACK = 3, 35  # in TrainerSpec
SPECIAL_PIECES = {"unk_id": 45, "bos_id": 46, "eos_id": 47, "pad_id": 48}  # their texts, in TrainerSpec
ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 3, 4  # in NormalizerSpec
BPE = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class SentencePieceVocab:
    """Encode and decode as the sentencepiece library, but for `CONTROL_TOKENS`, which text never reaches."""

    def __init__(self, proto: bytes, name: str, control: Collection[int] = ()) -> None:
        """name: where the proto comes from, for errors. control: ids to make control pieces, out of reach for text."""
        import sentencepiece

        try:
            proto, spec = _prepare(proto, control)
            self.sp_model = sentencepiece.SentencePieceProcessor()
            self.sp_model.LoadFromSerializedProto(proto)
            self.ids = {self.sp_model.id_to_piece(i): i for i in range(self.sp_model.vocab_size())}
            self.unk_id = self.sp_model.unk_id()
            self._unk = {self.unk_id: self.sp_model.decode([self.unk_id]).encode()}
        except (ValueError, RuntimeError, IndexError) as error:  # the last where no piece is the unknown one
            why = str(error).splitlines()[0] if str(error) else "damaged"
            raise ValueError(f"{name} is no whole SentencePiece model: {why}") from None
        self.n_words = self.n_trained = self.sp_model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = self.sp_model.bos_id(), self.sp_model.eos_id(), self.sp_model.pad_id()
        self.add_bos = self.prefix_space_after_special = True
        self.special_tokens = {text: i for text, i in self.ids.items() if self.sp_model.is_control(i)}
        # Both default to true.
        self._puts_prefix_space = bool(spec.get(ADD_DUMMY_PREFIX, 1) or spec.get(REMOVE_EXTRA_WHITESPACES, 1))

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        """Return the ids of s. Without a prefix space, it is encoded as in Meta's Code Llama.

        That is after a character that merges with no other, whose ids are then taken away again.
        """
        if add_prefix_space:
            return self.sp_model.encode(s)
        return self.sp_model.encode(BEFORE + s)[len(self.sp_model.encode(BEFORE)) :]

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return a token's bytes; a control token has none."""
        if self.sp_model.is_control(token):
            return b""
        if token in self._unk:
            return self._unk[token]
        piece = self.sp_model.id_to_piece(token)
        if self.sp_model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if strip_prefix_space and self._puts_prefix_space:
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode()


def proto_from_gguf(tokens: GGUFTokens, metadata: Mapping[str, Any]) -> bytes:
    """Return the SentencePiece model that a GGUF file's tokens, scores and types came from."""
    scores = array(metadata, "scores", (float, int), len(tokens.texts))
    # SentencePiece takes one unknown piece. llama.cpp hides others from text as it does control tokens; converters once
    # wrote [PAD32000] and the like so, where weights have more rows than there are tokens.
    types = [TokenType.CONTROL if kind == TokenType.UNKNOWN else kind for kind in tokens.types]
    if tokens.unk_id >= 0:
        types[tokens.unk_id] = TokenType.UNKNOWN
    try:
        packed = [struct.pack("<f", score) for score in scores]
    except OverflowError as error:
        raise ValueError(f"{TOKENIZER_KEY}scores: {error}") from None
    known = frozenset(TokenType)
    pieces = [
        _field(PIECE, text.encode())
        + _tag(SCORE, FIXED32)
        + score
        + _field(TYPE, kind if kind in known else TokenType.NORMAL)
        for text, score, kind in zip(tokens.texts, packed, types, strict=True)
    ]
    trainer = _field(MODEL_TYPE, BPE) + _field(BYTE_FALLBACK, TokenType.BYTE in types)
    ids = {number: getattr(tokens, name) for name, number in SPECIAL_PIECES.items()}
    trainer += b"".join(_field(number, tokens.texts[i].encode()) for number, i in ids.items() if i >= 0)
    normalizer = _field(ADD_DUMMY_PREFIX, flag(metadata, "add_space_prefix") is not False)
    normalizer += _field(REMOVE_EXTRA_WHITESPACES, flag(metadata, "remove_extra_whitespaces") is True)
    body = b"".join([_field(PIECES, piece) for piece in pieces])
    return body + _field(TRAINER_SPEC, trainer) + _field(NORMALIZER_SPEC, normalizer)


def _prepare(proto: bytes, control: Collection[int]) -> tuple[bytes, dict[int, int]]:
    """Return the model with some pieces made control pieces, and the one-byte values of its normalizer spec by field.

    Those pieces are `CONTROL_TOKENS` and the ids in control. Code Llama's are ordinary pieces with merges that lead to
    them, so that typed text would become control ids.
    Raises ValueError when the message is cut off or lacks its specs, without which SentencePiece takes the defaults:
    another algorithm.
    """
    fields = tuple(_field(PIECE, text.encode()) for text in CONTROL_TOKENS)
    as_control = _field(TYPE, TokenType.CONTROL)
    parts, copied, piece = [], 0, -1
    specs: dict[int, dict[int, int]] = {}
    for number, begin, start, end in _fields(proto, 0, len(proto)):
        piece += number == PIECES
        if number == PIECES and (proto.startswith(fields, start, end) or piece in control):
            # The last value of a field counts, so that appending the type sets it.
            parts += [proto[copied:begin], _field(PIECES, proto[start:end] + as_control)]
            copied = end
        elif number in (TRAINER_SPEC, NORMALIZER_SPEC):
            specs[number] = {field: proto[at] for field, _, at, stop in _fields(proto, start, end) if stop - at == 1}
    missing = [name for n, name in ((TRAINER_SPEC, "trainer"), (NORMALIZER_SPEC, "normalizer")) if n not in specs]
    if missing:
        raise ValueError(f"it ends before its {missing[0]} spec")
    return b"".join([*parts, proto[copied:]]), specs[NORMALIZER_SPEC]


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, begin, start, end) of each field in data[at:end]: its tag begins at begin, its value at start."""
    while at < end:
        begin = at
        tag, at = _read_varint(data, at, end)
        wire, start = tag & 7, at
        if wire == VARINT:
            _, at = _read_varint(data, at, end)
        elif wire in (FIXED64, FIXED32):
            at += 8 if wire == FIXED64 else 4
        elif wire == BYTES:
            length, start = _read_varint(data, at, end)
            at = start + length
        else:
            raise ValueError(f"no protobuf field at byte {begin}")
        if at > end:
            raise ValueError(f"it is cut off at byte {end}")
        yield tag >> 3, begin, start, at


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the number that begins at data[at], and the index after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError(f"it is cut off at byte {end}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protobuf number at byte {at}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _tag(number, BYTES) + _varint(len(value)) + value
    return _tag(number, VARINT) + _varint(value)
