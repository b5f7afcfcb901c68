"""Pages are counted right whatever happens, and a page is found by the text that it holds and by nothing else."""

from __future__ import annotations

import random

import pytest

from llama.cache import PAGE_SIZE
from llama.engine.page_pool import ROOT, PagePool


def text(*parts: str) -> list[int]:
    """Tokens of pages, one for each letter; a letter in parentheses, as in "(a)", is half a page."""
    return [ord(letter) for part in parts for letter in part for _ in range(PAGE_SIZE)]


def held(pool: PagePool, tokens: list[int], run: int = 1) -> list[int]:
    """Pages with these tokens, as a sequence gets them: what is found, and new ones."""
    match = pool.find(tokens)
    pool.hold(match.pages)
    pages, name = list(match.pages), match.name
    while len(pages) * PAGE_SIZE < len(tokens):
        pages.append(pool.allocate(pages[-1] if pages else None, run))
        name = pool.name(pages[-1], name, tokens[(len(pages) - 1) * PAGE_SIZE : len(pages) * PAGE_SIZE])
    return pages


def test_a_text_is_found_by_all_that_precedes_it() -> None:
    """The same tokens after others are another page."""
    pool = PagePool(20, 20)
    pages = held(pool, text("abc"))
    pool.written()
    assert pool.find(text("abcd")).pages == pages
    assert pool.find(text("abd")).pages == pages[:2]
    assert pool.find(text("bc")).pages == pool.find(text("c")).pages == []


def test_the_beginning_of_a_page_is_found_to_be_copied() -> None:
    pool = PagePool(20, 20)
    first, second = held(pool, text("ab"))
    last = pool.allocate(second, 1)
    pool.name(last, pool.find(text("ab")).name, [7, 8, 9])
    unwritten = pool.find([*text("ab"), 7, 8, 5])
    assert unwritten.pages == [first, second] and unwritten.partial is None, "it is not written yet"
    pool.written()
    match = pool.find([*text("ab"), 7, 8, 5])
    assert (match.pages, match.partial, match.partial_len) == ([first, second], last, 2)
    assert match.n_tokens == 2 * PAGE_SIZE + 2
    match = pool.find([*text("a"), *[ord("b")] * 5, 1])
    assert (match.pages, match.partial, match.partial_len) == ([first], second, 5)


def test_what_is_held_by_nobody_is_kept_until_pages_run_out_the_oldest_first_and_from_its_end() -> None:
    pool = PagePool(1 + 6, 6)
    old, new = held(pool, text("abc")), held(pool, text("xyz"))
    pool.written()
    pool.release(old)
    pool.release(new)
    assert pool.n_available == 6 and pool.n_held == 0
    assert [pool.allocate(None, 1) for _ in range(2)] == [old[2], old[1]]
    assert pool.find(text("abc")).pages == old[:1] and pool.find(text("xyz")).pages == new
    pool.hold(old[:1])
    pool.release(old[:1])  # used again: now it is the newest
    assert [pool.allocate(None, 1) for _ in range(3)] == new[::-1]


def test_no_more_pages_are_kept_than_was_said() -> None:
    pool = PagePool(20, 2)
    pages = held(pool, text("abcd"))
    pool.written()
    pool.release(pages)
    assert pool.find(text("abcd")).pages == pages[:2]
    assert pool.n_free == 19 - 2


def test_a_page_that_was_given_up_is_not_found_through_a_later_one() -> None:
    """The page after it was once found behind whatever the page came to hold next."""
    pool = PagePool(1 + 3, 3)
    a, b = held(pool, text("ab"))
    pool.written()
    twin = held(pool, text("a"))
    assert twin == [a]
    pool.release([a, b])
    pool.release(twin)
    taken = [pool.allocate(None, 1) for _ in range(3)]
    assert sorted(taken) == [1, 2, 3]
    pool.name(a, ROOT, text("q"))
    pool.written()
    assert pool.find(text("qb")).pages == [a]


def test_a_step_that_failed_has_named_nothing() -> None:
    pool = PagePool(20, 20)
    pages = held(pool, text("ab"))
    pool.written()
    more = held(pool, text("abc"))
    assert more[:2] == pages
    pool.written(done=False)
    assert pool.find(text("abc")).pages == pages
    pool.release(more)
    assert pool.n_held == 2


def test_a_text_lies_in_one_run_where_there_is_room() -> None:
    pool = PagePool(1 + 12, 0)
    one, other = pool.allocate(None, 4), pool.allocate(None, 4)
    rows = [[one], [other]]
    for _ in range(3):
        for row in rows:
            row.append(pool.allocate(row[-1], 4))
    assert [row == list(range(row[0], row[0] + 4)) for row in rows] == [True, True]
    third = pool.allocate(None, 8)  # there are not as many next to each other
    pool.release(rows[0], 4)
    assert pool.allocate(None, 4) == one
    assert third not in rows[0] + rows[1]


def test_free_pages_are_told_once_so_that_their_memory_can_go() -> None:
    pool = PagePool(1 + 12, 12)
    kept, gone = held(pool, text("ab")), [pool.allocate(None, 1) for _ in range(4)]
    pool.written()
    pool.release(kept)
    pool.release(gone)
    assert pool.take_free_runs() == [(gone[0], gone[-1] + 1)]
    assert pool.take_free_runs() == []
    again = pool.allocate(None, 1)
    pool.release([again])
    assert pool.take_free_runs() == [(again, again + 1)]


def test_a_limit_takes_kept_pages_and_then_no_more() -> None:
    """What is beyond it is not allocated, though free; a page that is given up is used again itself."""
    pool = PagePool(1 + 12, 12)
    one, other = held(pool, text("abcd")), held(pool, text("xyz"))
    pool.written()
    pool.release(one)
    pool.limit(1 + 5)
    assert (pool.n_used, pool.n_held, pool.n_available) == (6, 3, 2)
    assert pool.find(text("abcd")).pages == one[:2]
    assert [pool.allocate(None, 1), pool.allocate(None, 1)] == [one[1], one[0]]
    assert pool.n_available == 0
    pool.limit(100)
    assert pool.n_available == 12 - 3 - 2
    pool.release(other)


@pytest.mark.parametrize("seed", range(8))
def test_pages_are_never_lost_nor_given_twice(seed: int) -> None:
    """Texts of a few letters begin alike, end, fail and are given up at random."""
    choose = random.Random(seed)
    pool = PagePool(1 + 24, choose.choice([0, 5, 24]))
    texts: list[tuple[list[int], list[int]]] = []
    for _ in range(600):
        if texts and choose.random() < 0.5:
            _, pages = texts.pop(choose.randrange(len(texts)))
            pool.release(pages, choose.choice([0, 4]))
        tokens = text("".join(choose.choice("ab") for _ in range(choose.randint(1, 6))))
        if pool.n_available >= 6:
            pages = held(pool, tokens, choose.choice([1, 4]))
            if choose.random() < 0.1:
                pool.written(done=False)
                pool.release(pages)
                continue
            pool.written()
            texts.append((tokens, pages))
        live = {page for _, pages in texts for page in pages}
        assert pool.n_held == len(live) and 0 not in live
        by_page: dict[int, list[int]] = {}
        for tokens, pages in texts:
            for i, page in enumerate(pages):  # a page means the same in every text that holds it
                assert by_page.setdefault(page, tokens[: (i + 1) * PAGE_SIZE]) == tokens[: (i + 1) * PAGE_SIZE]
    for _, pages in texts:
        pool.release(pages)
    assert pool.n_held == 0 and pool.n_available == 24
