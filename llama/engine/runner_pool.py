"""Steps that outlive a stream: a conversation's cache, and graphs, which are recorded for one cache.

Knows nothing of what is run on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llama.engine.build import check_room
from llama.engine.context import Context
from llama.engine.cuda_graph_runner import CudaGraphs, GraphSteps, can_record
from llama.engine.runner import PlainSteps, Steps
from llama.memory.estimate import Job
from llama.model import Transformer

# Positions of a cache that recorded steps run on are a multiple of it: the next job may be a little longer.
LENGTHS = 256


@dataclass
class Entry:
    """Steps of the model and of a draft model, and what ran the layers when they were made."""

    steps: list[Steps]
    fused: list[object]

    def has_room(self, job: Job) -> bool:
        return all(each.context.has_room(job.bsz, job.length) for each in self.steps)


class Kept:
    """The steps of the last streams: of a conversation, and of the others where they are recorded."""

    def __init__(self, model: Transformer, draft: Transformer | None) -> None:
        self.model, self.draft = model, draft
        self.entries: dict[bool, Entry] = {}  # by whether it is a conversation's

    def take(self, job: Job, keep: bool) -> list[Steps]:
        """Steps with room for a batch: those of the last such stream, which no other then has, or new ones.

        keep: a conversation goes on, and what its last stream read is still held. Otherwise all is read anew, so that
        no result depends on calls before. ValueError, on every rank if on one, where memory is too short.
        """
        recorded = [can_record(model) for model in self._models]
        if any(recorded):
            length = -(-job.length // LENGTHS) * LENGTHS
            job = dataclasses.replace(job, length=max(job.length, min(self.model.args.max_seq_len, length)))
        entry = self.entries.pop(keep, None)
        if entry is not None and any(
            was is not model.fused for was, model in zip(entry.fused, self._models, strict=True)
        ):
            entry = None  # the model was changed, or moved, since
        if entry is not None and not keep and not entry.has_room(job):
            entry = None
        held = [] if entry is None else [each.context for each in entry.steps]
        try:
            check_room(self.model, job, sum(context.bytes_in_use for context in held), self.draft)
        except ValueError:
            if entry is not None:
                self.entries[keep] = entry
            raise
        if entry is None:
            contexts = [Context(model, job.bsz, job.length) for model in self._models]
            return self._steps(contexts, recorded)
        if not keep:
            for context in held:
                context.forget([0] * len(context.held))
        elif not entry.has_room(job):
            entry.steps.clear()  # graphs know the cache where it was
            for context in held:
                context.make_room(job.length)
            return self._steps(held, recorded)
        return entry.steps

    def give_back(self, steps: list[Steps], keep: bool) -> None:
        """Keep steps for the next stream, if it goes on with what this one read or can use their graphs."""
        if keep or any(each.runs_ahead for each in steps):
            self.entries[keep] = Entry(steps, [model.fused for model in self._models])

    @property
    def _models(self) -> list[Transformer]:
        return [self.model] if self.draft is None else [self.model, self.draft]

    def _steps(self, contexts: list[Context], recorded: list[bool]) -> list[Steps]:
        record = CudaGraphs(self.model.device) if any(recorded) else None
        return [
            GraphSteps(context, record) if graphed and record else PlainSteps(context)
            for context, graphed in zip(contexts, recorded, strict=True)
        ]
