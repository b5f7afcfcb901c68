"""llama.cpp's grammar notation, GBNF: its text becomes rules as trees of what they match. Knows no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

LAST_CHAR = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # code points that are no characters
MAX_REPEATS = 10_000
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {char: char for char in '"\\[]'}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN = re.compile(r"(!?)<(?:\[([0-9]+)\]|([^<>\[\]\s]+))>")
_COUNTS = re.compile(r"\{\s*([0-9]+)\s*(?:(,)\s*([0-9]*)\s*)?\}")
_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)


@dataclass(frozen=True)
class Chars:
    """One character; ranges: first and last code points of those it may be, sorted, apart from each other."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class OneToken:
    """One token of the tokenizer, by its text or id, as llguidance writes it: <|name|> or <[128010]>."""

    text: str


@dataclass(frozen=True)
class RuleRef:
    name: str


@dataclass(frozen=True)
class InTurn:
    """Several things, one after another; none is the empty text."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True)
class OneOf:
    parts: tuple[Pattern, ...]


@dataclass(frozen=True)
class Repeated:
    part: Pattern
    least: int
    most: int | None  # None is any number


Pattern = Chars | OneToken | RuleRef | InTurn | OneOf | Repeated
EMPTY = InTurn(())


def is_gbnf(text: str) -> bool:
    """Tell whether a grammar is in GBNF, whose rules are `name ::= ...`; Lark's are `name: ...`."""
    return _RULE.search(text) is not None


def parse_gbnf(text: str) -> dict[str, Pattern]:
    """Return the rules by name; ValueError tells the line and column of what is wrong.

    As in llama.cpp, a rule may be given several times, and the last one counts.
    """
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise ValueError(f"it has no rule named root, where every text begins: its rules are {', '.join(rules)}")
    for name, pattern in rules.items():
        missing = sorted({each for each in references(pattern) if each not in rules})
        if missing:
            raise ValueError(f"the rule {name} refers to {missing[0]}, which is no rule")
    return rules


def references(pattern: Pattern) -> Iterator[str]:
    """Yield the names of rules that a pattern refers to."""
    if isinstance(pattern, RuleRef):
        yield pattern.name
    for part in inner_patterns(pattern):
        yield from references(part)


def inner_patterns(pattern: Pattern) -> tuple[Pattern, ...]:
    """Return what a pattern is made of."""
    if isinstance(pattern, Repeated):
        return (pattern.part,)
    return pattern.parts if isinstance(pattern, InTurn | OneOf) else ()


def in_turn(parts: list[Pattern]) -> Pattern:
    """Return parts one after another, as flat as can be."""
    flat: list[Pattern] = []
    for part in parts:
        flat += part.parts if isinstance(part, InTurn) else [part]
    return flat[0] if len(flat) == 1 else InTurn(tuple(flat))


class _Reader:
    """Reads a grammar by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def rules(self) -> dict[str, Pattern]:
        found: dict[str, Pattern] = {}
        self._skip(_BLANK_LINES)
        while self._at < len(self._text):
            name = self._name()
            self._skip(_BLANK)
            if not self._take("::="):
                self._fail(f"expected ::= after the name of the rule {name}")
            self._skip(_BLANK_LINES)
            found[name] = self._alternatives(nested=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                self._fail("expected the end of the rule")
            self._skip(_BLANK_LINES)
        return found

    def _alternatives(self, nested: bool) -> Pattern:
        options = [self._sequence(nested)]
        while self._take("|"):
            self._skip(_BLANK_LINES)
            options.append(self._sequence(nested))
        return options[0] if len(options) == 1 else OneOf(tuple(options))

    def _sequence(self, nested: bool) -> Pattern:
        parts: list[Pattern] = []
        space = _BLANK_LINES if nested else _BLANK
        while (part := self._part()) is not None:
            self._skip(space)
            while (counts := self._counts()) is not None:
                part = Repeated(part, *counts)
                self._skip(space)
            parts.append(part)
        return in_turn(parts)

    def _part(self) -> Pattern | None:
        """Return what comes next, without its counts; None at the end of a sequence."""
        if self._take('"'):
            return in_turn([Chars(((code, code),)) for code in self._literal()])
        if self._take("["):
            return self._char_class()
        if self._take("."):
            return Chars(((0, LAST_CHAR),))
        if self._take("("):
            self._skip(_BLANK_LINES)
            inner = self._alternatives(nested=True)
            if not self._take(")"):
                self._fail("expected )")
            return inner
        if token := _TOKEN.match(self._text, self._at):
            return self._token(token)
        return RuleRef(self._name()) if _NAME.match(self._text, self._at) else None

    def _literal(self) -> Iterator[int]:
        while not self._take('"'):
            yield self._char('a "')

    def _char_class(self) -> Chars:
        negated, ranges = self._take("^"), []
        while not self._take("]"):
            first = last = self._char("a ]")
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                last = self._char("a ]")
            if last < first:
                self._fail(f"the range from {chr(first)!r} to {chr(last)!r} goes backwards")
            ranges.append((first, last))
        joined = _joined(ranges)
        return Chars(_others(joined) if negated else joined)

    def _char(self, end: str) -> int:
        """Return the code point of a character or of an escape; end: what is missing where the text ends."""
        if self._at >= len(self._text):
            self._fail(f"expected {end}")
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ord(char)
        kind = self._text[self._at : self._at + 1]
        digits = self._text[self._at + 1 : self._at + 1 + _HEX_DIGITS.get(kind, 0)]
        if kind in _HEX_DIGITS and re.fullmatch(rf"[0-9A-Fa-f]{{{_HEX_DIGITS[kind]}}}", digits):
            self._at += 1 + len(digits)
            if int(digits, 16) <= LAST_CHAR:
                return int(digits, 16)
        elif kind in _ESCAPES:
            self._at += 1
            return ord(_ESCAPES[kind])
        self._fail(f"unknown escape \\{kind}{digits}")

    def _token(self, found: re.Match[str]) -> OneToken:
        negated, number, name = found.groups()
        if negated and name:
            self._fail(f"!<{name}> is not supported: give the token's id, as in !<[1000]>")
        self._at = found.end()
        return OneToken(f"<{name}>" if name else f"<[{'^' * bool(negated)}{number}]>")

    def _counts(self) -> tuple[int, int | None] | None:
        """Return how often what was read comes, at least and at most, where the text says so."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        found = _COUNTS.match(self._text, self._at)
        if found is None:
            if self._text.startswith("{", self._at):
                self._fail("expected a number of times, as in {3}, {3,} or {3,5}")
            return None
        least = int(found[1])
        most = least if found[2] is None else int(found[3]) if found[3] else None
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            self._fail(f"{found[0]} must be at most {MAX_REPEATS} times, and no fewer at most than at least")
        self._at = found.end()
        return least, most

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            self._fail("expected the name of a rule")
        self._at = found.end()
        return found[0]

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _skip(self, space: re.Pattern[str]) -> None:
        found = space.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _fail(self, message: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - self._text.rfind("\n", 0, self._at)
        rest = self._text[self._at : self._at + 20]
        raise ValueError(
            f"line {line}, column {column}: {message}, before {rest!r}" if rest else f"at its end: {message}"
        )


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ranges of code points sorted, with those joined that touch."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return tuple(joined)


def _others(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the code points that are in none of these ranges."""
    starts = [0, *(last + 1 for _, last in ranges)]
    stops = [*(first - 1 for first, _ in ranges), LAST_CHAR]
    return tuple((start, stop) for start, stop in zip(starts, stops, strict=True) if start <= stop)
