"""The room that an engine has: caches with as many pages as memory allows, and the runners that compute in them.

Knows nothing of what sequences contain.
"""

from __future__ import annotations

import itertools
import mmap

from llama.backends.base import Backend, backend_of
from llama.cache import PAGE_SIZE, KVCache, pages_for
from llama.engine.cuda_graph_runner import CudaGraphRunner
from llama.engine.metrics import Metrics
from llama.engine.page_pool import PagePool
from llama.engine.runner import EagerRunner, Runner
from llama.engine.scheduler import KEPT_TEXTS, MOST_CLAIMED, Scheduler
from llama.engine.sequence import Sequence
from llama.memory.estimate import BatchShape
from llama.memory.plan import page_limit
from llama.model import Transformer

# A cache is made for as many of the tokens that a sequence may have beside its prompt; it grows when there are more.
USUAL_COMPLETION = 2048

# Where memory is taken as soon as it is allocated, a cache that is too small grows by this factor.
CACHE_GROWTH = 1.5


class Room:
    """Makes caches and runners when there is something to run, and larger ones when they are needed."""

    def __init__(self, model: Transformer, draft: Transformer | None, metrics: Metrics) -> None:
        self.model, self.draft = model, draft
        self._models = [model] if draft is None else [model, draft]
        self.scheduler = Scheduler(model.args, metrics)
        # Whether memory is taken when it is allocated, and not, as on a CPU, when it is written.
        self.grows = model.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE")
        self.runners: list[Runner] = []  # of the model and of the draft model
        self._backends: list[Backend] = []  # that the models had when the runners were made
        self._checked = BatchShape(0, 0, 0)  # the largest batch for which there was memory
        self._limit = 0  # pages that there is memory for

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of prompts that a step computes."""
        return min(backend_of(model).max_prefill_tokens for model in self._models)

    def check(self, sequence: Sequence, n_others: int, speculative: bool) -> None:
        """Raise ValueError, on every rank, where there is no memory for a sequence, beside n_others or alone.

        Those that ask for no length are shortened to what there is memory for.
        """
        others = self.scheduler.requests.values()
        rows = min(self.scheduler.max_rows, 1 << n_others.bit_length())
        before = self._checked if n_others else BatchShape(0, 0, 0)
        shape = BatchShape(
            max(rows, before.bsz),
            max(len(sequence.prompt), before.prompt_len),
            max(sequence.max_len, before.length),
            before.scored or sequence.is_scored,
            speculative,
        )
        if shape != before or pages_for(sequence.least_len) > self._limit:
            if n_others:  # else it was done when the last of them ended
                self.rest()
            pool = self.scheduler.pool
            pages = pool.n_pages if self.grows else pool.n_used
            least = max(each.least_len for each in (sequence, *others))
            self._limit = page_limit(self.model, shape, pages, self.draft, least)
            self._checked = shape
            if not self.grows:
                pool.limit(1 + self._limit)
            for other in others:
                other.shorten(self._limit * PAGE_SIZE)
        sequence.shorten(self._limit * PAGE_SIZE)

    def open(self) -> None:
        """Make caches and runners, or larger ones, if what waits and runs needs them; no step may be in flight."""
        backends = [backend_of(model) for model in self._models]
        pool = self.scheduler.pool
        if not self.runners or any(was is not now for was, now in zip(self._backends, backends, strict=True)):
            # The model has changed or moved since, and its keys with it.
            self._open_new(self._wanted(0))
            return
        wanted = self._wanted(pool.n_pages)
        if self.grows and wanted > pool.n_pages and wanted + pool.n_pages // 2 > self._limit:
            # There is no memory for the old cache beside the new one: begin again, with all there is.
            self.runners.clear()
            self.scheduler.restart(PagePool(0, 0), [])
            self._open_new(1 + self._limit)
        elif wanted > pool.n_pages:
            caches = [runner.cache for runner in self.runners]
            self.runners.clear()  # their graphs point at the old memory
            for cache in caches:
                cache.grow(wanted, pool.n_touched)
            pool.grow(wanted)
            self._make_runners(caches)

    def _open_new(self, n_pages: int) -> None:
        self.runners.clear()
        self._make_runners([model.new_cache(1, n_pages * PAGE_SIZE) for model in self._models])
        self._restart()

    def rest(self) -> None:
        """Give back memory of pages that nobody needs."""
        if not self.grows:
            for start, stop in self.scheduler.pool.take_free_runs():
                for cache in self.scheduler.caches:
                    cache.discard(start, stop)

    def reset(self) -> None:
        """Forget the steps in flight, after an error; and all that was cached, if the scheduler is not consistent."""
        for runner in self.runners:
            runner.reset()
        if self.scheduler.is_consistent:
            self.scheduler.step_failed()
        elif self.runners:
            self._restart()
        else:  # the caches are still to be made
            self.scheduler.restart(PagePool(0, 0), [])

    def _restart(self) -> None:
        caches = [runner.cache for runner in self.runners]
        for cache in caches:
            cache.discard(0, cache.n_pages)
        pool = PagePool(caches[0].n_pages, self.scheduler.most_kept)
        if not self.grows:
            pool.limit(1 + self._limit)
        self.scheduler.restart(pool, caches)

    def _wanted(self, n_pages: int) -> int:
        """Return how many pages the caches should have, page 0 included, where they have n_pages now."""
        scheduler = self.scheduler
        most = min((scheduler.max_rows + KEPT_TEXTS) * scheduler.most_pages, self._limit)
        next_ones = list(itertools.islice(scheduler.waiting, max(0, scheduler.max_rows - len(scheduler.running))))
        # Alone, each has to fit.
        lengths = (min(each.max_len, len(each.tokens) + USUAL_COMPLETION) for each in next_ones)
        least = pages_for(max(lengths, default=0))
        if not self.grows:
            # A cache that was made when there was little memory is made again when there is twice as much.
            return n_pages if n_pages > max(least, most // 2) else 1 + max(least, most)
        needed = 2 * len(scheduler.running) + sum(
            pages_for(len(sequence.tokens)) + min(MOST_CLAIMED, pages_for(sequence.max_new_tokens)) + 1
            for sequence in next_ones
        )
        if n_pages > least and needed <= scheduler.pool.n_available:
            return n_pages
        return max(n_pages, 1 + least, 1 + min(most, max(int(CACHE_GROWTH * n_pages), n_pages + needed)))

    def _make_runners(self, caches: list[KVCache]) -> None:
        """Make a runner for each model: of CUDA graphs, if its backend captures them."""
        self._backends, runners = [backend_of(model) for model in self._models], list[Runner]()
        captures = [backend.graph_capture() for backend in self._backends if backend.captures_graphs]
        for number, (model, cache, backend) in enumerate(zip(self._models, caches, self._backends, strict=True)):
            if backend.captures_graphs:
                # One capture for all, so that their graphs share one pool of memory.
                rows, width = self.scheduler.max_rows, self.scheduler.most_pages
                runners.append(CudaGraphRunner(model, cache, captures[0], rows, width, number > 0))
            else:
                runners.append(EagerRunner(model, cache, number > 0))
        self.runners = runners
