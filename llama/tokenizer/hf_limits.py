"""What a `tokenizer.json` from a stranger may not make the `tokenizers` library do: take all memory, or hours.

The limits lie far above what released models have. They are checked before the library sees a part of the file.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MAX_NODES = 2000  # values in one part of a pipeline; the longest known has some 100
MAX_STEPS = 32  # of one part; the longest known has 10
MAX_TEXT = 10_000  # characters of a pattern, or of another text in a part; the longest known has some 500
MAX_GROWTH = 128  # characters that a character of a text may become before BPE; the most known are 18 * 2 * 2
MAX_PIECES = 1 << 21  # in a vocabulary, and merges; the most known are 1 and half a million
MAX_PIECE = 4096  # characters, the longest known has 512; the library goes down a Unigram piece by recursion
MAX_PIECES_TEXT = 1 << 22  # characters of all pieces together; the most known are some 2 million
MAX_ADDED_TEXT = 1 << 20  # characters of all added tokens together; the most known are some 100 thousand

# The most characters that one becomes in a step, by its type; those of a file's own texts are added below. No other
# types are known in models of this kind.
GROWTH = dict.fromkeys(("Strip", "StripAccents", "Nmt", "Prepend", "Replace", "Precompiled"), 1)
GROWTH |= {"Lowercase": 2, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 5, "Metaspace": 2}
GROWTH |= dict.fromkeys(("Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "UnicodeScripts"), 1)

CLASS_OR_ESCAPE = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]", re.DOTALL)
REPEAT = r"[*+]|\{\d*,\}|\{\d*,?\d{3,}\}"  # without a limit, or a hundred times and more
REGEX_GROUP = re.compile(rf"\(([^()]*)\)({REPEAT})?")
REPEATS = re.compile(rf"(?:{REPEAT})[?+]?")
OPTIONAL = re.compile(r"[^?]\?")


def check_part(part: Any) -> None:
    """Raise ValueError for a part of a pipeline, in parsed JSON, that is no released model's by its size alone.

    Or that has a regex which could take too long, or a map of characters that is longer than its text.
    """
    for n, (key, value) in enumerate(_walk("", part)):
        if n >= MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values")
        if key == "precompiled_charsmap" and isinstance(value, str):
            longest_in_charsmap(value)
        elif isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"it has a text of {len(value)} characters, {value[:20]!r}...: the limit is {MAX_TEXT}")
        elif key == "Regex" and isinstance(value, str):
            check_pattern(value)


def _walk(key: Any, node: Any) -> Iterator[tuple[Any, Any]]:
    yield key, node
    for inner, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _walk(inner, value)


def check_steps(steps: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for more steps than a released model's part has."""
    if len(steps) > MAX_STEPS:
        raise ValueError(f"it has {len(steps)} steps: the limit is {MAX_STEPS}")


def check_growth(steps: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError where a text could become much longer on its way through all steps before the model."""
    growth = 1.0
    for step in steps:
        kind = step["type"]
        if kind not in GROWTH:
            raise ValueError(f"it has a step of type {kind!r:.60}: supported are {', '.join(GROWTH)}")
        growth *= GROWTH[kind]
        if kind == "Prepend":
            growth *= 1 + len(step["prepend"])
        elif kind == "Precompiled":
            growth *= longest_in_charsmap(step["precompiled_charsmap"])
        elif kind == "Replace":
            length = len(step["pattern"].get("String", ""))  # a regex may match nothing, before every character
            growth *= max(1.0, len(step["content"]) / length if length else 1 + len(step["content"]))
    if growth > MAX_GROWTH:
        raise ValueError(f"its steps could make a text {growth:.0f} times as long: the limit is {MAX_GROWTH}")


def longest_in_charsmap(encoded: str) -> int:
    """Return the most characters that a character becomes by a `Precompiled` map.

    That is in base64 the length of a trie in bytes, the trie, and the texts that it leads to, each ended by a zero.
    """
    data = base64.b64decode(encoded)
    length = int.from_bytes(data[:4], "little")
    if length % 4 or length > len(data) - 4:
        raise ValueError(f"its charsmap says that {length} bytes follow, but has {len(data)}")
    return max(1, *(len(text.decode(errors="replace")) for text in data[4 + length :].split(b"\0")))


def check_pattern(regex: str) -> None:
    """Raise ValueError for a regex that could take time which grows faster than the square of a text's length.

    That is exponentially: a group that is repeated without limit and repeats or chooses inside, as in "(a+)+" or
    "(a|b)*". Or by a higher power: more than two repeats in turn, or two and something after them that may not match.
    """
    flat = CLASS_OR_ESCAPE.sub("a", regex)
    while group := REGEX_GROUP.search(flat):  # an innermost one, which is its repeats to those around it
        inside, repeated = group.groups("")
        varies = "|" in inside or REPEATS.search(inside) is not None
        if _may_be_slow(inside) or (repeated and varies):
            break
        n_repeats = max(len(REPEATS.findall(one)) for one in inside.split("|"))
        flat = flat[: group.start()] + ("a+" * n_repeats or "a" + repeated) + flat[group.end() :]
    if group or _may_be_slow(flat):
        raise ValueError(f"its pattern {regex[:80]!r} could take exponential time, or one much like it")


def _may_be_slow(flat: str) -> bool:
    """Tell whether one of the alternatives of a regex without groups repeats too often to be tried everywhere."""
    for one in flat.split("|"):
        repeats = list(REPEATS.finditer(one))
        if len(repeats) > 2 or (len(repeats) == 2 and OPTIONAL.sub("", one[repeats[1].end() :])):
            return True
    return False


def check_pieces(pieces: Iterable[str], what: str, most_text: int = MAX_PIECES_TEXT) -> None:
    """Raise ValueError for more or longer texts of tokens than any released model has; `what` names them."""
    lengths = [len(text) for text in pieces]
    limits = (len(lengths), MAX_PIECES), (max(lengths, default=0), MAX_PIECE), (sum(lengths), most_text)
    for (size, limit), unit in zip(limits, ("entries", "characters in one", "characters in all"), strict=True):
        if size > limit:
            raise ValueError(f"{what} {size} {unit}: the limit is {limit}")
