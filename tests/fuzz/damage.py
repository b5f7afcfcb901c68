"""Damage that any file can take: bytes that change, go or come; and values of JSON that become others."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[Random, bytes], bytes]

# Bytes that mean something in one of the formats.
TOKENS = (
    b"\x00", b"\xff", b"\x80", b"\n", b" ", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"9", b"e9", b"1e400",
    b"null", b"NaN", b"\\ud800", b"\xc3", b"{{", b"}}", b"{%", b"%}", b"|", b"(", b")", b"'", b".", b"PK",
    b"GGUF", b"<s>",
)  # fmt: skip
ENDS = 2500  # bytes at the start and the end of a file, where those are that say something about others

INTEGERS = [0, -1, 1, 2, 3, 7, 4096, 2**24, 2**31, 2**32 - 1, 2**63, 2**64, 10**400]
FLOATS = [0.0, -0.5, 0.5, 1e-320, 1e308, 3.4e38, float("nan"), float("inf")]
STRINGS = [
    "",
    " ",
    "8",
    "x" * 1000,
    "x" * 100_000,
    "<s>",
    "▁",
    "\ud800",
    "\x00",
    "\x1b[31m\nx",
    "é😀",
    "../../x",
    "(a+)+$",
]
DEEP = "a list of lists of lists"  # stands for what json.dumps cannot write
OTHERS: list[Any] = [None, True, False, [], [1], [[]], {}, {"a": {"b": []}}, {"content": "x"}, DEEP]
KINDS = (
    "Sequence", "Prepend", "Metaspace", "ByteLevel", "Replace", "Strip", "Precompiled", "NFC", "ByteFallback", "Fuse",
    "BPE", "Unigram", "WordPiece", "linear", "yarn", "llama3", "dynamic", "TemplateProcessing", "Split", "Digits",
)  # fmt: skip


class Twin(str):
    """A key that an object may have twice."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def damage_bytes(rng: Random, data: bytes) -> bytes:
    """Change, insert, repeat or cut a few bytes anywhere, most often near the ends."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        size = len(changed)
        at = rng.choice(
            (rng.randrange(size), rng.randrange(min(ENDS, size)), size - 1 - rng.randrange(min(ENDS, size)))
        )
        kind = rng.randrange(9)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice((rng.randrange(256), 0, 1, 127, 128, 255))
        elif kind == 2:
            changed[at] = (changed[at] + rng.choice((1, -1))) % 256
        elif kind == 3:
            del changed[at : at + rng.choice((1, 1, 2, 4, 8, 20))]
        elif kind == 4:
            changed[at:at] = rng.choice((rng.randbytes(rng.randint(1, 8)), rng.choice(TOKENS)))
        elif kind == 5:
            token = rng.choice(TOKENS)
            changed[at : at + len(token)] = token
        elif kind == 6:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
        elif kind == 7:
            changed[at : at + 8] = rng.choice((2**64 - 1, 2**32, 2**31, 0, size, size + 1)).to_bytes(8, "little")
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def damage_json(rng: Random, data: bytes) -> bytes:
    """Change a few values of a JSON file, and the bytes of a few."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = damage_value(rng, content)
    return dump(content, rng.choice((10, 120, 5000)))


def dump(content: Any, depth: int = 10) -> bytes:
    """Write JSON in which DEEP has become lists of that depth."""
    return json.dumps(content).replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode("utf-8", "surrogatepass")


def damage_value(rng: Random, value: Any) -> Any:
    """Return a value of JSON with one change at a random place of it."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        return _damage_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.9:
        return _damage_list(rng, value)
    if isinstance(value, bool) and rng.random() < 0.5:
        return not value
    if isinstance(value, int | float) and rng.random() < 0.5:
        halved = value / 2 if abs(value) < 2**60 else value // 2
        return rng.choice((value + 1, value - 1, value * 2, halved, -value, str(value)))
    if isinstance(value, str) and rng.random() < 0.5:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "x", "(", "\x00", "<s>", "+", value)) + value[at + rng.randrange(2) :]
    return rng.choice(
        (rng.choice(INTEGERS), rng.choice(FLOATS), rng.choice(STRINGS), *OTHERS, {"type": rng.choice(KINDS)})
    )


def _damage_object(rng: Random, value: dict[str, Any]) -> dict[str, Any]:
    key, other, kind = rng.choice(list(value)), rng.choice(list(value)), rng.randrange(20)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        new = rng.choice((key + "x", key[:-1], key.upper(), "", "type", "zzz"))
        return {new if k == key else k: v for k, v in value.items()}
    if kind == 2:
        return value | {key: value[other], other: value[key]}
    if kind == 3:
        return value | {Twin(key): damage_value(rng, value[key])}
    if kind == 4 and isinstance(value[key], str) and key == "type":
        return value | {key: rng.choice(KINDS)}
    return value | {key: damage_value(rng, value[key])}


def _damage_list(rng: Random, value: list[Any]) -> list[Any]:
    i, kind = rng.randrange(len(value)), rng.randrange(10)
    if kind == 0:
        return value[:i] + value[i + 1 :]
    if kind == 1:
        return value[:i] + [value[i]] * rng.choice((2, 3, 300)) + value[i + 1 :]
    if kind == 2:
        return value[::-1]
    return [*value[:i], damage_value(rng, value[i]), *value[i + 1 :]]
