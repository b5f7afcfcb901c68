"""Tokenizer files: damage and hostility in a tokenizer.json, a SentencePiece model and a tiktoken file."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

from tests.fuzz.damage import damage_bytes, damage_json, dump

MANY = 1_000_000
PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def hostile_step(rng: Random) -> dict[str, Any]:
    """Return a step of a pipeline that makes a text very long, takes very long, or is not what it seems."""
    regex = rng.choice(
        ("", "(a+)+$", "(?<=a)*", "[", "\\p{Zzzz}", "(?R)", "a{1,100000}", ".*?" * 50, "(" * 300 + ")" * 300, "\\1")
    )
    step: dict[str, Any] = rng.choice(
        (
            _replace({"String": rng.choice(("", "e", " ", "▁"))}, rng.choice(("", "ee", "e" * MANY))),
            _replace({"Regex": regex}, "x"),
            {"type": "Prepend", "prepend": "x" * rng.choice((0, 1, MANY))},
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(rng.randbytes(rng.choice((0, 3, 8, 64)))).decode(),
            },
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7f" * 4).decode()},
            {"type": "Strip", "content": "x", "start": 2**40, "stop": 2**40},
            {
                "type": "Split",
                "pattern": {"Regex": regex},
                "behavior": rng.choice(("Isolated", "Removed", "x")),
                "invert": True,
            },
            {"type": "FixedLength", "length": rng.choice((0, 1, 2**63))},
            {
                "type": "Metaspace",
                "replacement": rng.choice(("▁", "", "ab", "\x00")),
                "prepend_scheme": "always",
                "split": True,
            },
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {
                    "<s>": {"id": "<s>", "ids": [rng.choice((1, 99999))] * rng.choice((1, 2, MANY)), "tokens": ["<s>"]}
                },
            },
            {
                "type": rng.choice(
                    ("ByteLevel", "ByteFallback", "NFKC", "BertNormalizer", "CTC", "WordPiece", "Fuse", "Digits")
                )
            },
        )
    )
    return step


def damage_tokenizer_json(rng: Random, data: bytes) -> bytes:
    """Change values, or put hostile steps into the pipeline, or hostile pieces and merges into the model."""
    kind = rng.randrange(6)
    if kind > 2:
        return damage_json(rng, data)
    content = json.loads(data)
    if kind < 2:
        part = rng.choice(list(PARTS))
        steps = [content.get(part)] * bool(content.get(part)) + [
            hostile_step(rng) for _ in range(rng.choice((1, 1, 2, 4)))
        ]
        steps = steps * rng.choice((1, 1, 1, 30))
        rng.shuffle(steps)
        content[part] = {"type": "Sequence", PARTS[part]: steps}
        return dump(content)
    model, long = content["model"], "a" * rng.choice((10, 1000, 300_000))
    if model["type"] == "Unigram":
        model["vocab"] += rng.choice(
            ([[long, 0.0]], [["a", 1e308]], [["", 0.0]], [["b", "c"]], [[long[:i], 0.0] for i in range(1000)])
        )
        model["unk_id"] = rng.choice((0, 1, 2**40, None))
        return dump(content)
    size = len(model["vocab"])
    if rng.random() < 0.5:
        model["vocab"][rng.choice((long, "", "\x00", "<0x0A>", "Ġ" * 50))] = rng.choice(
            (size, size + 1, 0, 2**23, 2**31)
        )
    else:
        # Each merge joins what the one before made.
        names = ["a" * (i + 1) for i in range(rng.choice((5, 800)))]
        model["vocab"] |= {name: size + i for i, name in enumerate(names) if name not in model["vocab"]}
        model["merges"] += [[name, "a"] for name in names[:-1]] * rng.choice((1, 3))
    return dump(content)


def damage_sentencepiece(rng: Random, data: bytes) -> bytes:
    """Change fields of the protobuf message: drop, repeat, move, lengthen or retype one, or change its bytes."""
    if rng.random() < 0.2:
        return damage_bytes(rng, data)
    fields = _protobuf_fields(data)
    for _ in range(rng.choice((1, 1, 2))):
        # The specs come last, and say more than a piece does.
        i = rng.choice((rng.randrange(len(fields)), len(fields) - 1 - rng.randrange(2)))
        (tag, value), kind = fields[i], rng.randrange(7)
        if kind == 0 and len(fields) > 2:
            del fields[i]
        elif kind == 1:
            fields.insert(rng.randrange(len(fields)), fields[i])
        elif kind == 2:
            fields[i] = rng.choice((b"\x0a", b"\x12", b"\x1a", b"\x7a", b"\x0d", b"\x0b")), value
        elif kind == 3:
            fields[i] = tag, value[: rng.randrange(len(value) + 1)]
        else:
            fields[i] = tag, damage_bytes(rng, value)
    wrong = [0] * len(fields)
    wrong[rng.randrange(len(fields))] = rng.choice((0, 0, 0, 0, 1, -1))
    return b"".join(
        tag + _varint(max(0, len(value) + error)) + value for (tag, value), error in zip(fields, wrong, strict=True)
    )


def _protobuf_fields(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return tags and values of a message all of whose fields are bytes."""
    fields, at = [], 0
    while at < len(data):
        tag, at, length, shift = data[at : at + 1], at + 1, 0, 0
        while True:
            byte = data[at]
            at, length, shift = at + 1, length | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        fields.append((tag, data[at : at + length]))
        at += length
    return fields


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def damage_tiktoken(rng: Random, data: bytes) -> bytes:
    """Change lines of a token in base64 and its id."""
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    lines = data.splitlines()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    token, number = lines[i].split()
    odd = (b"", b"-1", b"1e3", b"\xd9\xa3", b"9" * 20, b"9" * 5000, number + b" 5", b"%d" % (int(number) + 1))
    lines[i : i + 1] = rng.choice(
        (
            [],
            [lines[i]] * 2,
            [lines[j]],
            [token + b" " + rng.choice(odd)],
            [b"=" + token + b" " + number],
            [b"YWI= " + number],
            [b""],
            [lines[i], b"YWI= 256"],
        )
    )
    return b"\n".join(lines) + b"\n"
