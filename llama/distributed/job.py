"""The job: torchrun's ranks or this process alone, and the control group (gloo) that carries their errors and words.

Knows nothing of devices, of models or of the groups that carry activations.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama.distributed.threads import share_cores
from llama.errors import in_one_line

# A chat may wait for its user over a weekend: see D1.
CONTROL_TIMEOUT = timedelta(days=7)


def local_rank() -> int:
    """Return this process's number on its host; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many processes of the job run on this host; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_job() -> None:
    """Create the control group of torchrun's ranks, or of this process alone, unless there is one already."""
    share_cores(local_world_size())
    if dist.is_initialized():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=CONTROL_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it among its exports
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def mute_later_ranks() -> None:
    """Let this process print nothing from here on, if it is one of torchrun's ranks and not its host's first.

    That is what Meta's code does in a build, so that scripts in which every rank prints show each result once.
    """
    if local_world_size() > 1 and local_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the process lives


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Raise an error of the code inside on every rank where one rank has it, so that no rank waits for one that failed.

    Errors are those that users cause: ValueError, OSError and a lack of memory, in one line whatever they quote. Every
    rank must enter the same `agree` contexts in the same order, and none may contain a collective operation (see D2).
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as caught:
        error = in_one_line(caught)
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def from_first_rank(value: Any) -> Any:
    """Return on every rank the value of the job's first rank: a small object, sent through the control group."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order: small objects, sent through the control group."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
