"""Characters that stand for others of a text, and occur in it nowhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def choose_placeholders(texts: list[str], characters: frozenset[str], used: set[str]) -> dict[str, str]:
    """Choose an unused character for each character of texts that is one of `characters`, in lower or upper case.

    Letters are replaced by letters of rare scripts, so that a change of case changes the placeholder alike.
    """
    used = used | characters
    pairs, singles = _unused_letters(used), unused_characters(used)
    placeholders: dict[str, str] = {}
    for char in sorted(set("".join(texts))):
        forms = {char, *char.lower(), *char.upper(), *char.title()}
        if char in placeholders or char.isspace() or not forms & characters:
            continue
        lower, upper = char.lower(), char.upper()
        if lower != upper and lower.upper() == upper and upper.lower() == lower:
            placeholders[lower], placeholders[upper] = next(pairs, None) or (next(singles), next(singles))
        else:
            placeholders[char] = next(singles)
    return placeholders


def _unused_letters(used: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the lower and upper cases of letters of rare scripts that are not in use, Deseret's first."""
    for upper in map(chr, range(0x10400, 0x1E944)):
        lower = upper.lower()
        if lower != upper and lower.upper() == upper and not {lower, upper} & used:
            yield lower, upper


def unused_characters(used: set[str]) -> Iterator[str]:
    """Yield private-use characters that are not in use; raise ValueError when there are no more."""
    for char in map(chr, itertools.chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))):
        if char not in used:
            yield char
    raise ValueError("a dialog uses all private-use characters of Unicode: leave out some")
