"""Steps that outlive a stream: a conversation's cache, and graphs, which are recorded for one cache.

Knows nothing of what is run on them.
"""

from __future__ import annotations

import dataclasses

from llama.build import check_room
from llama.context import Context
from llama.footprint import Job
from llama.graphs import CudaGraphs, GraphSteps, can_record
from llama.model import Transformer
from llama.steps import PlainSteps, Steps

# Positions of a cache that recorded steps run on are a multiple of it: the next job may be a little longer.
LENGTHS = 256


class Kept:
    """The steps of the last stream, of the model and of a draft model."""

    def __init__(self, model: Transformer, draft: Transformer | None) -> None:
        self.model, self.draft = model, draft
        self.steps: list[Steps] | None = None

    def take(self, job: Job, keep: bool) -> list[Steps]:
        """Steps with room for a batch: those of the last stream, which no other then has, or new ones.

        keep: what the last stream read is still held. Otherwise all is read anew, so that no result depends on calls
        before. ValueError, on every rank if on one, where memory is too short.
        """
        models = [self.model] if self.draft is None else [self.model, self.draft]
        recorded = [can_record(model) for model in models]
        steps: list[Steps] | None = None
        if keep or any(recorded):
            steps, self.steps = self.steps, None
        if any(recorded):
            length = -(-job.length // LENGTHS) * LENGTHS
            job = dataclasses.replace(job, length=max(job.length, min(self.model.args.max_seq_len, length)))
        if steps is not None and not keep:
            for each in steps:
                each.context.forget([0] * len(each.context.held))
            if not all(each.context.has_room(job.bsz, job.length) for each in steps):
                steps = None
        check_room(self.model, job, sum(each.context.bytes_in_use for each in steps or []), self.draft)
        if steps is None:
            record = CudaGraphs() if any(recorded) else None
            contexts = [Context(model, job.bsz, job.length) for model in models]
            return [
                GraphSteps(context, record) if graphed and record else PlainSteps(context)
                for context, graphed in zip(contexts, recorded, strict=True)
            ]
        for each in steps:
            each.context.make_room(job.length)
        return steps

    def give_back(self, steps: list[Steps], keep: bool) -> None:
        """Keep steps for the next stream, if it goes on with what this one read or can use their graphs."""
        if keep or any(each.runs_ahead for each in steps):
            self.steps = steps
