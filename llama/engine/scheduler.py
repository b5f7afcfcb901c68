"""Which tokens of which sequences the next step computes, and in which pages they are.

Knows nothing of tensors, of sampling or of text.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from llama.cache import PAGE_SIZE, KVCache, pages_for
from llama.config import ModelArgs
from llama.engine.metrics import Metrics
from llama.engine.page_pool import Match, PagePool
from llama.engine.sequence import Chunk, Sequence
from llama.rope_scaling import LengthScaling

# Most pages of a completion for which a sequence claims a place next to its prompt: 256 tokens.
MOST_CLAIMED = 256 // PAGE_SIZE

# Pages that nobody holds are kept for as many texts as long as the longest so far, or as USUAL_TEXT tokens.
KEPT_TEXTS, USUAL_TEXT = 2, 2048


class Scheduler:
    """Sequences that wait and that run, each at its own length.

    A sequence that waits runs as soon as there is a row and pages for its prompt. Where pages run out, the youngest is
    set back to the queue: its tokens are computed again later, and its text is the same.
    """

    def __init__(self, args: ModelArgs, metrics: Metrics) -> None:
        """Make a scheduler of sequences within the limits of args; it runs when it is given pages by `restart`."""
        self.metrics = metrics
        self.max_rows, self.most_pages = args.max_batch_size, pages_for(args.max_seq_len)
        scaling = args.rope_scaling
        # Beyond its context, such scaling rotates keys by the length of their text: others cannot use them.
        self._longest_shared = scaling.old_context_len if isinstance(scaling, LengthScaling) else args.max_seq_len
        self.most_kept = KEPT_TEXTS * min(self.most_pages, pages_for(USUAL_TEXT))
        self.pool, self.caches = PagePool(0, 0), list[KVCache]()
        self.requests: dict[int, Sequence] = {}  # those that wait or run, by id
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.is_consistent = True  # whether all this would be, should an interrupt come now
        self._admitted: list[Sequence] = []  # in this step
        # The first that waits, if there were not enough pages for it, and how many there were.
        self._refused: tuple[Sequence, int] | None = None

    @property
    def can_admit(self) -> bool:
        """Whether a sequence waits, there is a row for it, and maybe pages: more than when it was refused last."""
        if not self.waiting or len(self.running) >= self.max_rows:
            return False
        return self._refused != (self.waiting[0], self.pool.n_available)

    def shares_pages(self, sequence: Sequence) -> bool:
        """Tell whether cached keys stay valid as their text grows, and in other texts that begin alike: see D28."""
        return sequence.max_len <= self._longest_shared

    def schedule(self, budget: int) -> list[Chunk]:
        """Return the chunks of the next step: the newest token of all that generate, and `budget` tokens of prompts."""
        chunks: list[Chunk] = []
        self._admitted = []
        self.running.sort(key=lambda each: each.id)  # whoever is set back is the last, and was not given a chunk yet
        row = 0
        while row < len(self.running):
            sequence, row = self.running[row], row + 1
            n = len(sequence.tokens) - sequence.n_cached
            if sequence.is_reading:
                n = min(n, budget)
                budget -= n
            if n and self._make_room(sequence, sequence.n_cached + n):
                chunks.append(self._chunk(sequence, n))
        while budget > 0 and self.can_admit and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self._admitted.append(sequence)
            n = min(len(sequence.tokens) - sequence.n_cached, budget)
            budget -= n
            self._grow(sequence, sequence.n_cached + n)
            chunks.append(self._chunk(sequence, n))
        return chunks

    def try_grow(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence pages for `length` positions, if it may have as many and nobody holds them."""
        n_pages = pages_for(length)
        if n_pages > self.most_pages or n_pages - len(sequence.pages) > self.pool.n_available:
            return False
        before, self.is_consistent = self.is_consistent, False
        self._grow(sequence, length)
        self.is_consistent = before
        return True

    def add(self, sequence: Sequence) -> None:
        """Have a sequence wait for a row and pages."""
        self.is_consistent = False
        self.requests[sequence.id] = sequence
        self.waiting.append(sequence)
        self.is_consistent = True

    def adopt(self, sequence: Sequence) -> list[int]:
        """Have a waiting sequence run with pages for all of its tokens, as if they were cached; return the pages.

        There must be as many available. The caller writes the keys, and only then is the scheduler consistent again.
        """
        self.is_consistent = False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.begin(self.most_pages)
        self._grow(sequence, len(sequence.tokens))
        sequence.n_cached = len(sequence.tokens)
        return sequence.pages

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence that waits or runs; what it has cached is kept for texts that begin alike."""
        before, self.is_consistent = self.is_consistent, False
        del self.requests[sequence.id]
        sequence.finished = True
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        self.is_consistent = before

    def step_failed(self) -> None:
        """Set back what a step had begun that did not end: nothing is known of what it has written."""
        self.is_consistent = False
        self.pool.written(done=False)
        for sequence in reversed(self.running.copy()):
            if sequence in self._admitted or sequence.n_named * PAGE_SIZE > sequence.n_cached:
                self._set_back(sequence)
        self.is_consistent = True

    def restart(self, pool: PagePool, caches: list[KVCache]) -> None:
        """Set back all sequences, to begin again with another pool of pages, all free, and the caches that have them.

        caches: of the model, and of a draft model, which has its keys in the same pages of a cache of its own.
        """
        self.pool, self.caches = pool, caches
        self.waiting, self.running = deque(self.requests[id] for id in sorted(self.requests)), []
        self.is_consistent = True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._name(sequence, sequence.n_cached, is_written=True)
        n_full = sequence.n_cached // PAGE_SIZE
        rest = sequence.tokens[n_full * PAGE_SIZE : sequence.n_cached]
        if rest and sequence.n_named == n_full and self.shares_pages(sequence):
            self.pool.name(sequence.pages[n_full], sequence.name, rest, is_written=True)
        self._release(sequence)

    def _name(self, sequence: Sequence, stop: int, is_written: bool = False) -> None:
        """Have others find the full pages of a sequence up to a position."""
        while (sequence.n_named + 1) * PAGE_SIZE <= stop and self.shares_pages(sequence):
            number = sequence.n_named
            tokens = sequence.tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
            sequence.name = self.pool.name(sequence.pages[number], sequence.name, tokens, is_written)
            sequence.n_named += 1

    def _chunk(self, sequence: Sequence, n: int) -> Chunk:
        """Return a chunk of the next n tokens of a sequence, whose full pages others can find from here on."""
        start = sequence.n_cached
        stop = start + n
        self._name(sequence, stop)
        is_last = stop == len(sequence.tokens)
        return Chunk(sequence, start, sequence.tokens[start:stop], int(is_last and sequence.max_new_tokens > 0))

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages that hold its beginning, if there are pages for the rest of its tokens."""
        pool, tokens = self.pool, sequence.tokens
        match = pool.find(tokens[:-1]) if self.shares_pages(sequence) and not sequence.is_scored else Match()
        pool.hold(match.pages)
        source = [match.partial] if match.partial is not None else []
        pool.hold(source)
        # A page more for each that runs, so that none is set back at once.
        needed = pages_for(len(tokens)) - len(match.pages) + len(self.running)
        if needed > pool.n_available and source:  # the page to copy from may be one that is needed
            pool.release(source)
            source, match = [], replace(match, partial=None, partial_len=0)
        if needed > pool.n_available:
            pool.release(match.pages)
            self._refused = sequence, pool.n_available
            return False
        sequence.begin(self.most_pages)
        for page in match.pages:
            sequence.add_page(page)
        sequence.name, sequence.n_named = match.name, len(match.pages)
        if match.partial is not None:
            self._grow(sequence, match.n_tokens)
            for cache in self.caches:
                cache.copy_page(match.partial, sequence.pages[-1], match.partial_len)
            pool.release(source)
        sequence.n_cached = match.n_tokens
        sequence.drafted = tokens[: match.n_tokens]
        if len(tokens) == len(sequence.prompt):  # else it was set back
            self.metrics.reused_tokens += match.n_tokens
        return True

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence pages for `length` positions; set back the youngest where they run out, maybe it."""
        while not self.try_grow(sequence, length):
            youngest = self.running[-1]
            self._set_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, length: int) -> None:
        pages = sequence.pages
        while len(pages) * PAGE_SIZE < length:
            if not pages:
                sequence.n_claimed = pages_for(len(sequence.prompt)) + min(
                    MOST_CLAIMED, pages_for(sequence.max_new_tokens)
                )
            sequence.add_page(self.pool.allocate(pages[-1] if pages else None, sequence.n_claimed))

    def _set_back(self, sequence: Sequence) -> None:
        self.metrics.set_back += 1
        self._stop(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.most_kept = self.pool.most_kept = max(self.most_kept, KEPT_TEXTS * len(sequence.pages))
        self.pool.release(sequence.pages, sequence.n_claimed)
        sequence.begin(self.most_pages)
