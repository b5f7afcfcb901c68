"""Ray Data: a class for `Dataset.map_batches`, whose actors complete the rows of a data set.

The queue, the retries and the files are Ray's, which is imported by the actors alone. An actor is the first rank of its
model; the others are processes that it starts. Knows nothing of the cluster but the GPUs that the actor was given.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llama.engine.options import BuildOptions
from llama.generation import Llama
from llama.integrations.rows import RESULT_COLUMNS, check_columns, complete_rows, follow_rows
from llama.sampling import SamplingParams

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("llama")


class Completer:
    """Completes batches of rows, by a model that each of Ray's actors builds once.

    Give `map_batches` `batch_format="pyarrow"` and, on GPUs, as many `num_gpus` as ranks are to share one model.

    A row has an `index`, an integer of its own, and a `prompt` to continue, `messages` to answer, or `tokens`. Columns
    `temperature`, `top_p`, `max_gen_len` and `seed`, where not null, are that row's own. It comes back with
    `generation`, `finish_reason`, `prompt_tokens`, `completion_tokens` and, where asked for, `logprobs`; or with an
    `error`.
    """

    def __init__(self, options: BuildOptions, params: SamplingParams | None = None) -> None:
        """Build the model, split over the actor's GPUs; raise ValueError where their number is not that of its ranks.

        options: model_parallel_size is by default the number of GPUs; an actor without any computes on the CPU.
        params: for what rows do not choose; without a seed it is that of `options`.
        """
        import ray

        gpus = len(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
        ranks = options.model_parallel_size or max(1, gpus)
        if gpus not in (0, ranks):
            raise ValueError(f"model_parallel_size is {ranks}, the actor has {gpus} GPUs: give num_gpus={ranks}")
        device = options.device or ("cuda" if gpus else "cpu")
        options = replace(options, model_parallel_size=ranks, device=device)
        self.params = params or SamplingParams()
        port = _free_port()
        self.followers = [_start_rank(options, _environment(rank, ranks, port)) for rank in range(1, ranks)]
        os.environ.update(_environment(0, ranks, port))
        self.llm = Llama.from_options(options)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Return the rows with what was generated; raise ValueError where their columns do not allow it."""
        import pyarrow as pa

        text, count, scores = pa.string(), pa.int64(), pa.list_(pa.float32())
        types = dict(zip(RESULT_COLUMNS, (text, text, count, count, scores, text), strict=True))
        if not self.params.logprobs:
            del types["logprobs"]
        if not isinstance(rows, pa.Table):
            raise ValueError(f'a batch is a {type(rows).__name__}: give map_batches batch_format="pyarrow"')
        check_columns(rows.column_names)
        try:
            results = complete_rows(self.llm, rows.to_pylist(), self.params)
        except ConnectionError as error:
            log.error("error: %s: Ray starts this actor anew", error)
            os._exit(1)  # an actor that raises would live on, without a rank
        for name, kind in types.items():
            rows = rows.append_column(pa.field(name, kind), pa.array([each.get(name) for each in results], kind))
        return rows

    def __del__(self) -> None:
        """End the other ranks; Ray deletes what an actor holds when there is no more to do."""
        for follower in getattr(self, "followers", ()):
            follower.kill()
            follower.join()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun would set for a rank of one host."""
    numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _start_rank(options: BuildOptions, environment: Mapping[str, str]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_be_rank, args=(options, environment), daemon=True)
    process.start()
    return process


def _be_rank(options: BuildOptions, environment: Mapping[str, str]) -> None:
    """Do what the actor does, as one of its other ranks, until it ends."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_actor, daemon=True).start()
    with contextlib.suppress(ValueError, OSError):  # the actor has them, too
        follow_rows(Llama.from_options(options))


def _end_with_actor() -> None:
    actor = multiprocessing.parent_process()
    assert actor is not None
    actor.join()
    os._exit(1)  # at once, as the actor that Ray starts in its place needs this GPU's memory
