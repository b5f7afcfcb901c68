"""The pages of a cache: which are free, which sequences hold, and which are kept as the beginning of a later text.

Knows pages by number and texts by token ids; nothing of tensors, of sequences or of when they run.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llama.cache import PAGE_SIZE

# Stands for the page before a text's first one.
ROOT = 0

# States of a page: nobody's, nobody's but a text will need it next to its own, and held or kept.
FREE, CLAIMED, USED = b"\0", b"\1", b"\2"


@dataclass(frozen=True)
class Match:
    """Pages that hold the beginning of a text: full ones, and the first positions of one more, to be copied."""

    pages: list[int] = field(default_factory=list)
    name: int = ROOT  # of the last full page
    partial: int | None = None
    partial_len: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.pages) * PAGE_SIZE + self.partial_len


class PagePool:
    """Pages with reference counts; one that nobody holds any more is kept for its content until it is needed.

    A page whose content is known has a name, a number that is never used again, and is found by the name of the page
    before it and its tokens: equal beginnings of texts are computed once. Of the kept pages, the least recently used is
    given up first, the end of a text before its beginning.
    """

    def __init__(self, n_pages: int, most_kept: int) -> None:
        """Make a pool of free pages, which keeps at most `most_kept` pages that nobody holds.

        Page 0 is nobody's: what has no page of its own, as a row that only pads a CUDA graph, writes there.
        """
        self.n_pages, self.most_kept = 0, most_kept
        self.most_used = 0  # pages that may be held or kept, page 0 included
        self.n_free = 0
        self.n_touched = 0  # pages up to the last one that may have been written
        self._states = bytearray()
        self._references: list[int] = []
        self._kept: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._contents: dict[int, tuple[int, tuple[int, ...]]] = {}  # of named pages: the name before, and the tokens
        self._names: dict[int, int] = {}
        self._last_name = ROOT
        self._found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # by the name before, the first token
        self._unwritten: set[int] = set()  # pages named by a step that has not ended yet
        if n_pages:
            self.grow(n_pages)
            self._states[0] = USED[0]
            self.n_free -= 1

    def grow(self, n_pages: int) -> None:
        """Add free pages, up to n_pages."""
        more = n_pages - self.n_pages
        self._states += FREE * more
        self._references += [0] * more
        self.n_free += more
        self.n_pages = self.most_used = n_pages

    def limit(self, n_pages: int) -> None:
        """Have at most n_pages held or kept from here on; kept ones beyond are given up."""
        self.most_used = min(n_pages, self.n_pages)
        while self.n_used > n_pages and self._kept:
            self._free(self._give_up())

    @property
    def n_used(self) -> int:
        """Pages that are held or kept, page 0 included."""
        return self.n_pages - self.n_free

    @property
    def n_available(self) -> int:
        """Pages that can be allocated: those that are free, up to the limit, and those that are only kept."""
        return self.most_used - self.n_used + len(self._kept)

    @property
    def n_held(self) -> int:
        """Pages that sequences hold."""
        return max(0, self.n_used - 1) - len(self._kept)

    def find(self, tokens: Sequence[int]) -> Match:
        """Find the longest beginning of a text that is in pages; they are not held for the caller yet.

        Full pages are found even in the step that writes them: a pass writes all its keys before it reads any.
        """
        pages: list[int] = []
        name = ROOT
        while True:
            rest = tuple(tokens[len(pages) * PAGE_SIZE :][:PAGE_SIZE])
            begin_alike = self._found.get((name, rest[0]), []) if rest else []
            full = [page for page in begin_alike if len(rest) == PAGE_SIZE and self._contents[page][1] == rest]
            if not full:
                break
            pages.append(full[0])
            name = self._names[full[0]]
        common = {
            page: common_prefix_len(self._contents[page][1], rest)
            for page in begin_alike
            if page not in self._unwritten
        }
        partial = max(common, key=common.__getitem__, default=None)
        return Match(pages, name, partial, 0 if partial is None else common[partial])

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that were found, once more each."""
        for page in pages:
            self._references[page] += 1
            self._kept.pop(page, None)

    def allocate(self, after: int | None, run: int) -> int:
        """Return a page for new content, held once; there must be one available.

        after: the page before it in its text, next to which it lies if that is free; None: it begins a text, which is
        given `run` pages next to each other for later, if there are as many that nobody has claimed.
        """
        page = self._take_free(after, run) if self.n_used < self.most_used else self._give_up()
        self._references[page] = 1
        self.n_touched = max(self.n_touched, page + 1)
        return page

    def release(self, pages: Sequence[int], run: int = 0) -> None:
        """Let go of the pages of a text, in order, which are held once for it, and of its claim on `run` pages."""
        if pages:
            claimed = slice(pages[0] + len(pages), pages[0] + run)
            self._states[claimed] = self._states[claimed].replace(CLAIMED, FREE)
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._names:
                self._kept[page] = None
            else:
                self._free(page)
        while len(self._kept) > self.most_kept:
            self._free(self._give_up())

    def take_free_runs(self) -> list[tuple[int, int]]:
        """Return the runs of free pages, [start, stop), that may have been written.

        The run behind all others is returned once, until one of its pages is allocated again.
        """
        runs = [match.span() for match in re.finditer(rb"[\0\1]+", self._states[: self.n_touched])]
        if runs and runs[-1][1] == self.n_touched:
            self.n_touched = runs[-1][0]
        return runs

    def name(self, page: int, before: int, tokens: Sequence[int], is_written: bool = False) -> int:
        """Have a held page found by its content, at most PAGE_SIZE tokens after the page with the name `before`.

        Returns the name of the page with that content, which may be another one. Unless it is written already, nothing
        is copied from it until `written`.
        """
        content = before, tuple(tokens)
        for other in self._found[before, tokens[0]]:
            if self._contents[other] == content:
                return self._names[other]
        self._last_name += 1
        self._contents[page], self._names[page] = content, self._last_name
        self._found[before, tokens[0]].append(page)
        if not is_written:
            self._unwritten.add(page)
        return self._last_name

    def written(self, done: bool = True) -> None:
        """End a step; not done: it failed, and pages that were named in it are found no more."""
        if not done:
            for page in self._unwritten:
                self._forget(page)
                if self._kept.pop(page, 0) is None:
                    self._free(page)
        self._unwritten.clear()

    def _take_free(self, after: int | None, run: int) -> int:
        page = -1
        if after is not None and after + 1 < self.n_pages and self._states[after + 1] != USED[0]:
            page = after + 1
        elif after is None:
            page = self._states.find(FREE * run)
            if page >= 0:
                self._states[page : page + run] = CLAIMED * run
        for state in (FREE, CLAIMED):
            page = page if page >= 0 else self._states.find(state)
        self.n_free -= 1
        self._states[page] = USED[0]
        return page

    def _give_up(self) -> int:
        """Forget the content of the least recently used page that is kept, and return it."""
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        before, tokens = self._contents.pop(page)
        del self._names[page]
        alike = self._found[before, tokens[0]]
        alike.remove(page)
        if not alike:
            del self._found[before, tokens[0]]

    def _free(self, page: int) -> None:
        self._states[page] = FREE[0]
        self.n_free += 1


def common_prefix_len(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that both texts begin with."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
