"""Where a reader of a grammar's characters can be, and which parts of its rules can be read whole, as lexemes.

A part is one lexeme where nothing else can be going on while it is read, and where it is never both going on and over
at one character.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from llama.structured.gbnf import Chars, InTurn, OneToken, Pattern, Repeated, RuleRef, inner_patterns

# Beyond these, characters stay lexemes of their own. Known grammars have some hundreds of each.
MAX_PLACES = 5_000
MAX_PAIRS = 300_000  # of places that follow each other, counted again in each state: under a second
TOKEN_RANGE = ((0x110000, 0x110000),)  # a token stands for no character


@dataclass(eq=False)
class PatternNode:
    """A part of a rule, and where it lies: its places are range(start, stop), its nodes range(number, last)."""

    pattern: Pattern
    children: list[PatternNode]
    parent: int = -1
    number: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0
    nullable: bool = False
    first: set[int] = field(default_factory=set)
    end: set[int] = field(default_factory=set)  # places where it may be over

    @property
    def is_regular(self) -> bool:
        """Whether it can be a regular expression."""
        return not isinstance(self.pattern, RuleRef | OneToken) and all(each.is_regular for each in self.children)


class Places:
    """Where a reader of characters can be in the rules: each character or token of a rule is a place.

    A rule's places are the same wherever it is called from, so that more seems possible than is: what this finds safe
    is safe.
    """

    def __init__(self, rules: dict[str, Pattern]) -> None:
        self._nodes: list[PatternNode] = []
        self._by_pattern: dict[Pattern, list[PatternNode]] = {}
        self._known: dict[tuple[Pattern, ...], bool] = {}  # whether they can be a lexeme
        self._ranges: list[tuple[tuple[int, int], ...]] = []
        self.roots = {name: self._add(pattern) for name, pattern in rules.items()}
        self.is_small = len(self._ranges) <= MAX_PLACES
        # By place: the places that may come next, and the nodes that say so.
        self._next: list[dict[int, set[int]]] = [{} for _ in self._ranges]
        self._crowded: list[frozenset[int]] = []  # states of several places
        self._forks: list[tuple[frozenset[int], set[int]]] = []  # steps that several nodes allow
        if self.is_small:
            self._find_ends()
            self.is_small = self._find_next() and self._find_states()

    def _add(self, pattern: Pattern, parent: int = -1) -> PatternNode:
        node = PatternNode(pattern, [], parent, number=len(self._nodes), start=len(self._ranges))
        self._nodes.append(node)
        self._by_pattern.setdefault(pattern, []).append(node)
        if isinstance(pattern, Chars | OneToken):
            self._ranges.append(pattern.ranges if isinstance(pattern, Chars) else TOKEN_RANGE)
            node.first, node.end = {node.start}, {node.start}
        node.children = [self._add(part, node.number) for part in inner_patterns(pattern)]
        node.last, node.stop = len(self._nodes), len(self._ranges)
        return node

    def _find_ends(self) -> None:
        """Find where each node may begin and be over: again and again, as rules call each other."""
        changed = True
        while changed:
            changed = False
            for node in reversed(self._nodes):  # parts before the whole
                before = node.nullable, len(node.first), len(node.end)
                pattern, parts = node.pattern, node.children
                if isinstance(pattern, RuleRef):
                    parts = [self.roots[pattern.name]]
                if isinstance(pattern, InTurn):
                    node.nullable = all(part.nullable for part in parts)
                    node.first |= _union(parts, lambda part: part.first)
                    node.end |= _union(parts[::-1], lambda part: part.end)
                elif parts:
                    node.nullable = any(part.nullable for part in parts)
                    node.first = node.first.union(*(part.first for part in parts))
                    node.end = node.end.union(*(part.end for part in parts))
                if isinstance(pattern, Repeated):
                    node.nullable |= pattern.least == 0
                changed |= before != (node.nullable, len(node.first), len(node.end))

    def _find_next(self) -> bool:
        """Find which places follow each other; return whether they are not too many."""
        left = MAX_PAIRS
        for node in self._nodes:
            for one, other in _neighbours(node):
                left -= 1 + len(one.end) * len(other.first)
                if left < 0:
                    return False
                for place in one.end:
                    for after in other.first:
                        self._next[place].setdefault(after, set()).add(node.number)
        return True

    def _find_states(self) -> bool:
        """Find the sets of places that a reader can be at, after any text; return whether they are not too many."""
        root = self.roots["root"]
        found: set[frozenset[int]] = set()
        to_do = [state for state, _ in self._steps({place: set() for place in root.first})]
        left = MAX_PAIRS
        while to_do:
            state = to_do.pop()
            if state in found:
                continue
            found.add(state)
            after: dict[int, set[int]] = {}
            for place in state:
                for other, nodes in self._next[place].items():
                    after.setdefault(other, set()).update(nodes)
            left -= 1 + sum(len(self._next[place]) for place in state)
            left -= sum(len(self._ranges[place]) for place in after)
            if left < 0:
                return False
            for target, nodes in self._steps(after):
                to_do.append(target)
                if len(nodes) > 1:
                    self._forks.append((state, nodes))
        self._crowded = [state for state in found if len(state) > 1]
        return True

    def _steps(self, after: dict[int, set[int]]) -> list[tuple[frozenset[int], set[int]]]:
        """Return the states that any one character leads to, of these places, and the nodes that allow each."""
        cuts = sorted({cut for place in after for first, last in self._ranges[place] for cut in (first, last + 1)})
        targets: dict[frozenset[int], set[int]] = {}
        at_cut: list[set[int]] = [set() for _ in cuts]
        index = {cut: i for i, cut in enumerate(cuts)}
        for place in after:
            for first, last in self._ranges[place]:
                for i in range(index[first], index[last + 1]):
                    at_cut[i].add(place)
        for places in map(frozenset, at_cut):
            if places and places not in targets:
                targets[places] = set().union(*(after[place] for place in places))
        return list(targets.items())

    def is_lexeme(self, nodes: list[PatternNode]) -> bool:
        """Tell whether neighbours, or one node, can be one lexeme wherever the rules have them.

        Where several occurrences are read at once, in step with each other, they are the same lexeme, and no harm.
        """
        if not all(node.is_regular for node in nodes):
            return False
        if len(nodes) == 1 and isinstance(nodes[0].pattern, Chars):
            return True
        if not self.is_small or nodes[0].start == nodes[-1].stop:
            return False
        patterns = tuple(node.pattern for node in nodes)
        if patterns not in self._known:
            self._known[patterns] = self._can_be_lexeme(patterns)
        return self._known[patterns]

    def _can_be_lexeme(self, patterns: tuple[Pattern, ...]) -> bool:
        occurrences = list(self._occurrences(patterns))
        offsets = {
            place: (each[0].start, place - each[0].start)
            for each in occurrences
            for place in range(each[0].start, each[-1].stop)
        }
        for state in self._crowded:
            read: dict[int, set[int]] = {}
            for place in state & offsets.keys():
                start, offset = offsets[place]
                read.setdefault(start, set()).add(offset)
            in_step = len({frozenset(each) for each in read.values()}) <= 1
            if read and not (in_step and state <= offsets.keys()):
                return False
        inside = {number for each in occurrences for number in range(each[0].number, each[-1].last)}
        parents = {each[0].parent for each in occurrences if len(each) > 1}
        return not any(
            state & offsets.keys() and (allowed_by & parents or (allowed_by & inside and allowed_by - inside))
            for state, allowed_by in self._forks
        )

    def _occurrences(self, patterns: tuple[Pattern, ...]) -> Iterator[list[PatternNode]]:
        """Yield the nodes, or the neighbours, that have these patterns."""
        for node in self._by_pattern[patterns[0]]:
            siblings = self._nodes[node.parent].children if len(patterns) > 1 else [node]
            at = next(i for i, each in enumerate(siblings) if each is node)
            found = siblings[at : at + len(patterns)]
            if tuple(each.pattern for each in found) == patterns:
                yield found


def _neighbours(node: PatternNode) -> Iterator[tuple[PatternNode, PatternNode]]:
    """Yield the parts of a node of which the second may follow the first."""
    if isinstance(node.pattern, Repeated) and node.pattern.most != 1:
        yield node.children[0], node.children[0]
    elif isinstance(node.pattern, InTurn):
        for i, part in enumerate(node.children):
            for later in node.children[i + 1 :]:
                yield part, later
                if not later.nullable:
                    break


def _union(parts: Iterable[PatternNode], places: Callable[[PatternNode], set[int]]) -> set[int]:
    """Return the places of the first of these parts, and of the later ones as far as those before may be empty."""
    found: set[int] = set()
    for part in parts:
        found |= places(part)
        if not part.nullable:
            break
    return found
