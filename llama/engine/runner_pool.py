"""Runners that outlive a run: a conversation's, whose cache goes on, and those with CUDA graphs for one cache.

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

# Positions of a cache that graphs are made for are a multiple of it: the next batch may be a little longer.
CACHE_LEN_MULTIPLE = 256


@dataclass
class PooledRunners:
    """Runners of the model and of a draft model, and the backends that computed when they were made."""

    runners: list[Runner]
    backends: list[Backend]

    def has_room(self, shape: BatchShape) -> bool:
        return all(each.context.has_room(shape.bsz, shape.length) for each in self.runners)


class RunnerPool:
    """The runners of the last runs: of a conversation, and of the others where they are graphs."""

    def __init__(self, model: Transformer, draft: Transformer | None) -> None:
        self.model, self.draft = model, draft
        self._models = [model] if draft is None else [model, draft]
        self.pooled: dict[bool, PooledRunners] = {}  # by whether they are a conversation's

    def take(self, shape: BatchShape, keep_cache: bool) -> list[Runner]:
        """Return runners with room for a batch: those of the last such run, which no other then has, or new ones.

        keep_cache: a conversation goes on, and what its last run read is still cached. Otherwise all is read anew, so
        that no result depends on calls before. ValueError, on every rank if on one, where memory is too short.
        """
        backends = [backend_of(model) for model in self._models]
        if any(backend.captures_graphs for backend in backends):
            length = -(-shape.length // CACHE_LEN_MULTIPLE) * CACHE_LEN_MULTIPLE
            longest = max(shape.length, min(self.model.args.max_seq_len, length))
            shape = dataclasses.replace(shape, length=longest)
        pooled = self.pooled.pop(keep_cache, None)
        if pooled is not None and any(was is not now for was, now in zip(pooled.backends, backends, strict=True)):
            pooled = None  # the model was changed, or moved, since
        if pooled is not None and not keep_cache and not pooled.has_room(shape):
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
        elif not pooled.has_room(shape):
            pooled.runners.clear()  # graphs know the cache where it was
            for context in contexts:
                context.grow(shape.length)
            return self._make_runners(contexts)
        return pooled.runners

    def give_back(self, runners: list[Runner], keep_cache: bool) -> None:
        """Keep runners for the next run, if it goes on with what this one cached or can use their graphs."""
        if keep_cache or any(each.runs_ahead for each in runners):
            self.pooled[keep_cache] = PooledRunners(runners, [backend_of(model) for model in self._models])

    def _make_runners(self, contexts: list[Context]) -> list[Runner]:
        runners: list[Runner] = []
        for context in contexts:
            backend = backend_of(context.model)
            graphs = backend.captures_graphs
            runners.append(CudaGraphRunner(context, backend.graph_capture()) if graphs else EagerRunner(context))
        return runners
