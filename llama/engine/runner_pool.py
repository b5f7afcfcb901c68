"""Runners that later runs use again: in a conversation for their cache, otherwise for their CUDA graphs.

Knows nothing of what is run on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llama.backends.base import Backend, backend_of
from llama.engine.context import Context
from llama.engine.cuda_graph_runner import CudaGraphRunner
from llama.engine.runner import EagerRunner, Runner
from llama.memory.estimate import BatchShape
from llama.memory.plan import check_room
from llama.model import Transformer

# Caches that graphs are captured for have a multiple of this many positions, as the next batch may be a little longer.
CACHE_LEN_MULTIPLE = 256


@dataclass
class PooledRunners:
    """Runners of the model and of a draft model, and the backends that the models had when they were put back."""

    runners: list[Runner]
    backends: list[Backend]
    checked: BatchShape  # the last batch, for which there was memory

    def has_room(self, shape: BatchShape) -> bool:
        """Tell whether a batch fits into the caches, and takes no more memory beside them than the one checked."""
        prompts_fit = shape.prompt_len <= self.checked.prompt_len and shape.scored <= self.checked.scored
        return prompts_fit and self.fits(shape)

    def fits(self, shape: BatchShape) -> bool:
        """Tell whether a batch fits into the caches."""
        return all(each.context.has_room(shape.bsz, shape.length) for each in self.runners)


class RunnerPool:
    """The runners of a conversation's last run, and of the last other run, if they have graphs."""

    def __init__(self, model: Transformer, draft: Transformer | None) -> None:
        self.model, self.draft = model, draft
        self._models = [model] if draft is None else [model, draft]
        self.pooled: dict[bool, PooledRunners] = {}  # by keep_cache

    def take(self, shape: BatchShape, keep_cache: bool) -> list[Runner]:
        """Return runners with room for a batch: pooled ones, which leave the pool, or new ones.

        keep_cache: a conversation goes on, and the tokens of its last run stay cached. Otherwise the cache begins
        empty, so that no result depends on earlier calls. Raise ValueError, on every rank if on one, where memory is
        too short.
        """
        backends = [backend_of(model) for model in self._models]
        if any(backend.captures_graphs for backend in backends):
            length = -(-shape.length // CACHE_LEN_MULTIPLE) * CACHE_LEN_MULTIPLE
            longest = max(shape.length, min(self.model.args.max_seq_len, length))
            shape = dataclasses.replace(shape, length=longest)
        pooled = self.pooled.pop(keep_cache, None)
        if pooled is not None and any(was is not now for was, now in zip(pooled.backends, backends, strict=True)):
            pooled = None  # the model has changed or moved since
        if pooled is not None and not keep_cache and not pooled.fits(shape):
            pooled = None
        contexts = [] if pooled is None else [each.context for each in pooled.runners]
        if pooled is None or not pooled.has_room(shape):
            try:
                check_room(self.model, shape, sum(context.bytes_in_use for context in contexts), self.draft)
            except ValueError:
                if pooled is not None:
                    self.pooled[keep_cache] = pooled
                raise
        if pooled is None:
            contexts = [Context(model, shape.bsz, shape.length) for model in self._models]
            return self._make_runners(contexts)
        if not keep_cache:
            for context in contexts:
                context.truncate([0] * len(context.cached_tokens))
        elif not pooled.fits(shape):
            pooled.runners.clear()  # their graphs point at the old cache
            for context in contexts:
                context.grow(shape.length)
            return self._make_runners(contexts)
        return pooled.runners

    def give_back(self, runners: list[Runner], keep_cache: bool, shape: BatchShape) -> None:
        """Put runners of a batch of this shape back into the pool, if the next run can use their cache or graphs."""
        if keep_cache or any(each.runs_ahead for each in runners):
            backends = [backend_of(model) for model in self._models]
            self.pooled[keep_cache] = PooledRunners(runners, backends, shape)

    def _make_runners(self, contexts: list[Context]) -> list[Runner]:
        """Make a runner for each context: of CUDA graphs, if its model's backend captures them."""
        captures = [backend.graph_capture() for backend in map(backend_of, self._models) if backend.captures_graphs]
        return [
            # One capture for all, so that their graphs share one pool of memory.
            CudaGraphRunner(context, captures[0]) if backend_of(context.model).captures_graphs else EagerRunner(context)
            for context in contexts
        ]
