"""Turn the rules of a GBNF grammar into Lark for llguidance, with the same texts and as few lexemes as keep them.

llguidance cuts a text into lexemes, each as long as it can be, before it looks at rules; GBNF knows characters alone.
A lexeme a character is always right, but masks then take milliseconds. So a part of a rule becomes one lexeme where
nothing else can be going on while it is read, and where it is never both going on and over: see D71.
"""

from __future__ import annotations

from llama.structured.gbnf import (
    EMPTY,
    SURROGATES,
    Chars,
    InTurn,
    OneOf,
    OneToken,
    Pattern,
    Repeated,
    RuleRef,
    in_turn,
    inner_patterns,
    references,
)
from llama.structured.places import MAX_PLACES, PatternNode, Places


def to_lark(rules: dict[str, Pattern]) -> str:
    """Return a Lark grammar for llguidance, of the same texts as `root` of these rules."""
    rules = {name: _without_tail_calls(name, pattern) for name, pattern in rules.items()}
    rules = _reachable(_inlined(_reachable(rules)))
    places = Places(rules)
    names = {name: "start" if name == "root" else f"rule{i}" for i, name in enumerate(rules)}
    return "".join(f"{names[name]}: {_lark(places.roots[name], places, names)}\n" for name in rules)


def _without_tail_calls(name: str, pattern: Pattern) -> Pattern:
    """Return a rule that calls itself at its ends alone as a loop: `ws ::= ([ ] ws)?` is a lexeme then."""
    loops, ends = _tails(name, pattern)
    if not loops or any(name in references(part) for part in (*loops, *ends)):
        return pattern
    return in_turn([Repeated(OneOf(tuple(loops)), 0, None), OneOf(tuple(ends))]) if ends else pattern


def _tails(name: str, pattern: Pattern) -> tuple[list[Pattern], list[Pattern]]:
    """Return what a pattern matches before it ends in a call of the rule, and what it matches else."""
    if pattern == RuleRef(name):
        return [EMPTY], []
    if isinstance(pattern, OneOf):
        pairs = [_tails(name, part) for part in pattern.parts]
        return [each for loops, _ in pairs for each in loops], [each for _, ends in pairs for each in ends]
    if isinstance(pattern, InTurn) and pattern.parts:
        *before, last = pattern.parts
        loops, ends = _tails(name, last)
        return [in_turn([*before, each]) for each in loops], [in_turn([*before, each]) for each in ends]
    if isinstance(pattern, Repeated) and (pattern.least, pattern.most) == (0, 1):
        loops, ends = _tails(name, pattern.part)
        return loops, [*ends, EMPTY]
    return [], [pattern]


def _inlined(rules: dict[str, Pattern]) -> dict[str, Pattern]:
    """Return the rules with those that call no rule in a circle put where they are called, if that is not too much."""
    order: list[str] = []  # those rules, each after what it calls
    sizes: dict[str, int] = {}
    left = {name: set(references(pattern)) for name, pattern in rules.items()}
    while ready := [name for name, calls in left.items() if calls <= sizes.keys()]:
        for name in ready:
            del left[name]
            sizes[name] = _size(rules[name], sizes)
            order.append(name)
    if sum(_size(pattern, sizes) for pattern in rules.values()) > MAX_PLACES:
        return rules
    done: dict[str, Pattern] = {}
    for name in order:
        done[name] = _replaced(rules[name], done)
    return {name: _replaced(pattern, done) for name, pattern in rules.items()}


def _size(pattern: Pattern, sizes: dict[str, int]) -> int:
    """Return how many parts a pattern has, with those of rules that have a size in their places."""
    if isinstance(pattern, RuleRef):
        return sizes.get(pattern.name, 1)
    return 1 + sum(_size(part, sizes) for part in inner_patterns(pattern))


def _replaced(pattern: Pattern, by_name: dict[str, Pattern]) -> Pattern:
    if isinstance(pattern, RuleRef):
        return by_name.get(pattern.name, pattern)
    if isinstance(pattern, InTurn):
        return in_turn([_replaced(part, by_name) for part in pattern.parts])
    if isinstance(pattern, OneOf):
        return OneOf(tuple(_replaced(part, by_name) for part in pattern.parts))
    if isinstance(pattern, Repeated):
        return Repeated(_replaced(pattern.part, by_name), pattern.least, pattern.most)
    return pattern


def _reachable(rules: dict[str, Pattern]) -> dict[str, Pattern]:
    found, left = {}, ["root"]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = rules[name]
            left += references(rules[name])
    return found


def _lark(node: PatternNode, places: Places, names: dict[str, str]) -> str:
    """Return a node in Lark's notation."""
    pattern = node.pattern
    if isinstance(pattern, RuleRef):
        return names[pattern.name]
    if isinstance(pattern, OneToken):
        return pattern.text
    if places.is_lexeme([node]):
        return _lexeme([node])
    if isinstance(pattern, InTurn):
        return " ".join(_parts_in_turn(node.children, places, names)) or '""'
    if isinstance(pattern, Repeated):
        counts = f"{{{pattern.least},{'' if pattern.most is None else pattern.most}}}"
        return f"({_lark(node.children[0], places, names)}){counts}"
    return "(" + " | ".join(_lark(child, places, names) for child in node.children) + ")"


def _parts_in_turn(children: list[PatternNode], places: Places, names: dict[str, str]) -> list[str]:
    """Return the parts of a sequence, with neighbours in one lexeme where they can be."""
    out, at = [], 0
    while at < len(children):
        stop = at + 1
        while stop < len(children) and places.is_lexeme(children[at : stop + 1]):
            stop += 1
        if stop > at + 1:
            out.append(_lexeme(children[at:stop]))
        else:
            out.append(_lark(children[at], places, names))
        at = stop
    return out


def _lexeme(nodes: list[PatternNode]) -> str:
    """Return neighbours as one regular expression between slashes; one that may match nothing is optional."""
    expression = "".join(_regex(node.pattern) for node in nodes)
    return f"/{expression}/"


def _regex(pattern: Pattern) -> str:
    if isinstance(pattern, Chars):
        return _char_class(pattern.ranges)
    if isinstance(pattern, InTurn):
        return "".join(map(_regex, pattern.parts))
    if isinstance(pattern, Repeated):
        counts = f"{{{pattern.least},{'' if pattern.most is None else pattern.most}}}"
        return f"(?:{_regex(pattern.part)}){counts}"
    assert isinstance(pattern, OneOf), pattern
    return "(?:" + "|".join(map(_regex, pattern.parts)) + ")"


def _char_class(ranges: tuple[tuple[int, int], ...]) -> str:
    """Return a character of these code points as an expression; surrogates, which no text has, are left out."""
    low, high = SURROGATES
    spans = []
    for first, last in ranges:
        pieces = ((first, min(last, low - 1)), (max(first, high + 1), last))
        spans += [f"{_escaped(a)}-{_escaped(b)}" if a < b else _escaped(a) for a, b in pieces if a <= b]
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1] and spans:
        return spans[0]
    return f"[{''.join(spans)}]" if spans else r"[^\x{0}-\x{10FFFF}]"


def _escaped(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"
