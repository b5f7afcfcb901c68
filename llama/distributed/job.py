"""The job: a launcher's ranks or this process alone, and the control group (gloo) that carries their errors and words.

Knows nothing of devices, of models or of the groups that carry activations.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llama.distributed.threads import share_cores
from llama.distributed.torchrun_env import VARIABLES, TorchrunEnv, meeting_point, read_torchrun_env
from llama.distributed.watch import Watch
from llama.errors import in_one_line, is_caused_by_user

log = logging.getLogger("llama")

# A chat may wait for its user over a weekend; what hangs is found by the watch: see D1.
NO_TIMEOUT = timedelta(days=7)
# Seconds without a step, while a rank waits for others, after which the job ends: see D50.
TIMEOUT = 600.0
# How long a rank that torchrun did not start waits for others: they may never have been started.
SECONDS_TO_MEET = 120.0
# Ranks that wait for longer say so.
SECONDS_TO_SAY = 5.0

_watch: Watch | None = None  # of the job that this process has joined, if it has several ranks
_watched: Any = None  # its default group, which a user may destroy and make anew


def local_rank() -> int:
    """Return this process's number on its host; 0 if it is alone."""
    return read_torchrun_env().local_rank


def local_world_size() -> int:
    """Return how many processes of the job run on this host; 1 if this one is alone."""
    return read_torchrun_env().local_world_size


def watch_of_job() -> Watch | None:
    """Return what watches the job's ranks; None for a process alone, or before it has joined."""
    return _watch


def join_job(timeout: float = TIMEOUT) -> None:
    """Create the control group of the job's ranks, or of this process alone, unless there is one already.

    timeout: see `BuildOptions`. Raise ValueError where the environment contradicts itself, and ConnectionError where
    other ranks do not come.
    """
    global _watch, _watched
    env = read_torchrun_env()
    share_cores(env.local_world_size)
    if not dist.is_initialized():
        if _watch is not None:  # of a job that has ended
            _watch.stop()
        if env.ignored:
            log.warning("%s, as no launcher of ranks does: this process runs alone", env.ignored)
        _check_network_interface()
        if env.world_size > 1:
            store = _meet(env, timeout)
            _watch = Watch(store, env.rank, env.world_size, timeout, first_holds_store=not env.torchrun)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it among its exports
        rank, world_size = env.rank, env.world_size
        hook = sys.excepthook
        collective(dist.init_process_group, "gloo", timeout=NO_TIMEOUT, store=store, rank=rank, world_size=world_size)
        if world_size == 1:
            sys.excepthook = hook  # torch's puts the rank before each line of a traceback
    elif _watched is not dist.group.WORLD and dist.get_world_size() > 1:  # a user's own group
        if _watch is not None:
            _watch.stop()
        store = dist.distributed_c10d._get_default_store()
        _watch = Watch(store, dist.get_rank(), dist.get_world_size(), timeout, first_holds_store=True)
    elif _watch is not None:
        _watch.timeout = timeout
        return
    if _watch is not None:
        _watched = dist.group.WORLD
        _watch.listen()  # so that it can name them
        atexit.register(_leave)


def collective(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operation that waits for other ranks, watched; raise ConnectionError where one of them has ended.

    Compiled code is watched as a whole, as a compiler would compile it again for each count of the watch.
    """
    if torch.compiler.is_compiling():
        return operation(*args, **kwargs)
    watch = _watch
    if watch is None:
        return operation(*args, **kwargs)
    watch.calls += 1
    try:
        return operation(*args, **kwargs)
    except RuntimeError as error:
        text = str(error)
        is_of_connection = isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text
        if is_caused_by_user(error) or not is_of_connection:
            raise
        unknown = f"the connection to another rank was lost ({text.partition(chr(10))[0]})"
        raise ConnectionError(watch.lost() or unknown) from error
    finally:
        watch.calls += 1


def mute_later_ranks() -> None:
    """Let this process print nothing from here on, if it is one of torchrun's ranks and not its host's first.

    That is what Meta's code does in a build, so that scripts in which every rank prints show each result once.
    """
    if local_world_size() > 1 and local_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # open as long as the process lives


@contextlib.contextmanager
def ends_with_others() -> Iterator[None]:
    """Have this rank end where another one is lost while it is in this block, which need not wait for others."""
    watch = _watch
    if watch is not None:
        watch.needs_others = True
    try:
        yield
    finally:
        if watch is not None:
            watch.needs_others = False


@contextlib.contextmanager
def agree() -> Iterator[None]:
    """Raise an error of the code inside on every rank where one rank has it, so that no rank waits for one that failed.

    Errors are those that users cause (see `is_caused_by_user`), in one line whatever they quote. Every rank must enter
    the same `agree` contexts in the same order, and none may contain a collective operation (see D2).
    """
    error: Exception | None = None
    try:
        with ends_with_others():
            yield
    except Exception as caught:
        if not is_caused_by_user(caught):
            raise
        error = in_one_line(caught)
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors: list[Exception | None] = [None] * dist.get_world_size()
        collective(dist.all_gather_object, errors, error)
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


def from_first_rank(value: Any) -> Any:
    """Return on every rank the value of the job's first rank: a small object, sent through the control group."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    collective(dist.broadcast_object_list, values, src=0)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order: small objects, sent through the control group."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        collective(dist.all_gather_object, values, value)
    return values


def add_up(name: str, amount: int) -> int:
    """Add to a number that all ranks share, from 0 on, and return the sum: at once, whatever the other ranks do."""
    store = dist.distributed_c10d._get_default_store()
    total: int = collective(store.add, f"sum of {name}", amount)
    return total


def _meet(env: TorchrunEnv, timeout: float) -> Any:
    """Return the store of a job's ranks, once all have come to it; ConnectionError where they do not in time."""
    host, port = meeting_point()
    seconds = timeout if env.torchrun else min(timeout, SECONDS_TO_MEET)
    place = f"rank {env.rank} of {env.world_size} at {host}:{port}"
    fix = f"start all {env.world_size} ranks, or unset {', '.join(VARIABLES)} to run one process alone"
    timer = threading.Timer(SECONDS_TO_SAY, log.warning, ["%s waits for the others: %s", place, fix])
    timer.daemon = True
    timer.start()
    try:
        _wait_for_first_rank(env.rank, host, port, seconds)
        store = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
        return _unused_part(store, env, seconds) if env.torchrun else store
    except (RuntimeError, OSError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise ConnectionError(f"{place} did not meet the others in {seconds:g} s ({cause}): {fix}") from error
    finally:
        timer.cancel()


def _unused_part(store: Any, env: TorchrunEnv, seconds: float) -> Any:
    """Return a part of torchrun's store in which nobody has written, the same on all ranks: see D51.

    The store outlives ranks that are restarted, and what they have said would be taken for the word of the new ones.
    """
    if env.rank > 0:
        me = os.urandom(8).hex()
        store.set(f"rank {env.rank} is", me)
        store.wait([f"part of {me}"], timedelta(seconds=seconds))
        part = store.get(f"part of {me}").decode()
        store.add(f"in {part}", 1)
    else:
        part, told = os.urandom(8).hex(), set[str]()
        deadline = time.monotonic() + seconds
        while store.add(f"in {part}", 0) < env.world_size - 1:
            if time.monotonic() > deadline:
                raise TimeoutError("some did not come")
            for key in (f"rank {rank} is" for rank in range(1, env.world_size)):
                other = store.get(key).decode() if store.check([key]) else ""  # maybe one that has ended
                if other and other not in told:
                    told.add(other)
                    store.set(f"part of {other}", part)
            time.sleep(0.005)
    return dist.PrefixStore(part, store)  # type: ignore[attr-defined]  # torch does not list it among its exports


def _wait_for_first_rank(rank: int, host: str, port: int, seconds: float) -> None:
    """Wait until the first rank's host has an address, and it listens: torch logs a page each time that it does not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if rank == 0:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _check_network_interface() -> None:
    """Raise ValueError where gloo is told to use a network interface that this host lacks."""
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        found = [interface for _, interface in socket.if_nameindex()]
        if name not in found:
            raise ValueError(f"GLOO_SOCKET_IFNAME={name} is no network interface here: give {' or '.join(found)}")


def _leave() -> None:
    """Wait for the other ranks at the end of a program: one that ends while others still run can abort (see D18)."""
    failed = getattr(sys, "last_value", None) is not None
    if _watch is not None and not failed:
        _watch.leave()
