"""Makes files like tokenizer.json whose parts would take all memory, or hours: silly on purpose, and seeded."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Callable
from typing import Any

LETTERS = "abcdefgh"
BPE = {"type": "BPE", "vocab": {c: i for i, c in enumerate([*LETTERS, "ab", "▁"])}, "merges": ["a b"]}
UNIGRAM = {"type": "Unigram", "vocab": [["<unk>", 0.0], *([c, -1.0] for c in [*LETTERS, "▁"])], "unk_id": 0}


def sequence(part: str, steps: list[Any]) -> dict[str, Any]:
    keys = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
    return {"type": "Sequence", keys.get(part, "decoders"): steps}


def nested(part: str, step: Any, times: int) -> Any:
    """Sequences in sequences, each with the one inside twice."""
    for _ in range(times):
        step = sequence(part, [step, step])
    return step


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def charsmap(rng: random.Random) -> str:
    """A `Precompiled` map: the length of a trie, the trie, and texts that it points to."""
    text = b"a" * rng.choice([3, 2**16]) + b"\0"
    trie = struct.pack("<256I", *(rng.randrange(2**32) for _ in range(256)))
    length = rng.choice([len(trie), 2**32 - 4, 2**31, 2**28, len(trie) + 4096])
    return base64.b64encode(struct.pack("<I", length) + trie[: rng.choice([0, 10, 1024])] + text).decode()


def template(rng: random.Random) -> dict[str, Any]:
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    token = {"SpecialToken": {"id": "a", "type_id": 0}}
    n = rng.choice([1, 3, 300, 8000])
    single = rng.choice([[a, a], [token] * n + [a], [a] * n])
    special = {"a": {"id": "a", "ids": [0] * n, "tokens": ["a"] * n}}
    return {"type": "TemplateProcessing", "single": single, "pair": [a, b], "special_tokens": special}


def growing_normalizer(rng: random.Random) -> dict[str, Any]:
    n, times = rng.choice([2, 1000, 10**6]), rng.choice([1, 3, 12, 40])
    letter = rng.choice(LETTERS)
    steps: list[Any] = [
        replace("", letter * n),
        replace(letter, letter * n),
        replace("(?=.)", letter, "Regex"),
        replace("x*", "x" * n, "Regex"),
        replace(".", letter * n, "Regex"),
        {"type": "Prepend", "prepend": letter * n},
        {"type": "ByteLevel"},
        {"type": "Precompiled", "precompiled_charsmap": charsmap(rng)},
        sequence("normalizer", [replace("a", "\ufdfa"), {"type": "NFKD"}, replace("ص", "a")]),
    ]
    chosen = rng.choice(steps)
    if times == 12:
        return {"model": BPE, "normalizer": nested("normalizer", chosen, times)}
    return {"model": rng.choice([BPE, UNIGRAM]), "normalizer": sequence("normalizer", [chosen] * times)}


def growing_pre_tokenizer(rng: random.Random) -> dict[str, Any]:
    spaces = [
        step
        for i in range(40)
        for step in (
            {"type": "Metaspace", "replacement": chr(0x4E00 + i), "prepend_scheme": "always", "split": False},
            split("."),
        )
    ]
    steps = rng.choice(
        [
            [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}] * 40,
            [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}] * 100_000,
            spaces,
            [split("a")] * 50_000,
        ]
    )
    return {"model": BPE, "pre_tokenizer": sequence("pre_tokenizer", steps)}


def slow_pattern(rng: random.Random) -> dict[str, Any]:
    part = rng.choice(["a", ".", r"\w", "[a-z]", "[^b]", "(?:a)", "(?:ab|.)", r"\p{L}"])
    repeat = rng.choice(["*", "+", "{1,}", "{0,200}", "*?", "{2,900}"])
    regex = (part + repeat) * rng.randint(1, 4) + rng.choice(["Z", "$", "(?=Z)", r"\d", "(?!.)", ""])
    if rng.random() < 0.3:
        regex = f"(?:{regex})" + rng.choice(["", "*", "+", "{2,}", "{1,50}", "?Z"])
    where = rng.choice(["pre_tokenizer", "normalizer"])
    step = split(regex) if where == "pre_tokenizer" else replace(regex, rng.choice(["", "a"]), "Regex")
    return {"model": BPE, where: sequence(where, [step] * rng.choice([1, 5]))}


def long_vocab(rng: random.Random) -> dict[str, Any]:
    n = rng.choice([3000, 6000])
    runs = {"a" * i: i - 1 for i in range(1, n)}
    kind = rng.randrange(5)
    if kind == 0:  # merges that chain
        return {"model": {"type": "BPE", "vocab": runs, "merges": [["a" * i, "a"] for i in range(1, n - 1)]}}
    if kind == 1:
        return {"model": {"type": "Unigram", "vocab": [[text, -1.0] for text in runs], "unk_id": 0}}
    if kind == 2:
        return {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b" * 10**7, -1.0]], "unk_id": 0}}
    if kind == 3:  # the same merge over and over
        return {"model": BPE | {"merges": ["a b"] * 2_000_000}}
    return {"model": {"type": "BPE", "vocab": {"a": 0, "z" * 10**7: 1}, "merges": []}}


def many_added(rng: random.Random) -> dict[str, Any]:
    n, length = rng.choice([(1, 2 * 10**7), (3000, 5000), (300_000, 20)])
    added = [
        {"id": 10 + i, "content": f"{i}<".rjust(length, rng.choice(LETTERS)), "special": False, "normalized": True}
        for i in range(n)
    ]
    return {"model": BPE, "added_tokens": added}


def silly_decoder(rng: random.Random) -> dict[str, Any]:
    n = rng.choice([1, 40, 100_000])
    steps = [
        replace("a", "b"),
        replace("a" * 100, "b" * 100),
        replace("a", "b" * (10**6 if n == 1 else 10)),
        replace("", "a"),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ]
    steps = rng.choices(steps, k=min(n, 3)) * -(-n // 3)
    return {"model": BPE, "decoder": sequence("decoder", steps)}


def silly_post_processor(rng: random.Random) -> dict[str, Any]:
    return {"model": BPE, "post_processor": sequence("post_processor", [template(rng)] * rng.choice([1, 40]))}


KINDS: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    growing_normalizer,
    growing_pre_tokenizer,
    slow_pattern,
    long_vocab,
    many_added,
    silly_decoder,
    silly_post_processor,
)
