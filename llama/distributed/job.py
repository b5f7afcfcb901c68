"""The job: torchrun's ranks or this process alone, and what they tell each other through the control group (gloo).

Knows nothing of devices, of models or of the groups that carry activations.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama.distributed.threads import share_cores

# A chat may wait for its user over a weekend: see D1.
CONTROL_TIMEOUT = timedelta(days=7)


def local_rank() -> int:
    """This process's number on its host; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the job this host runs; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_job() -> None:
    """Make the control group: torchrun's ranks, or this process alone. One that exists already is used."""
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=CONTROL_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it among its exports
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    share_cores(local_world_size())


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Make a user's error on any rank an error on every rank, so that none waits for one that gave up.

    Every rank must pass through the same `agree` blocks, and no block may hold a collective operation.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as caught:
        error = caught
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def from_first_rank(value: Any) -> Any:
    """The job's first rank's value, on every rank: a small object, sent through the control group."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in rank order: small objects, sent through the control group."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
