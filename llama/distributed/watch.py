"""Heartbeats: each rank tells the others that it lives, and whether it waits for them, through the job's store.

A thread beats, so that a rank which computes for long does beat, and one which is stopped does not. Where this rank
waits for one that has ended, or longer than the timeout for one that is stopped, the thread says so and ends the
process, as the main thread cannot. Knows nothing of process groups.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

log = logging.getLogger("llama")

BEAT_SECONDS = 1.0
# A rank without a beat for so long is stopped, or out of reach.
SILENT_SECONDS = 10.0
# How long a rank that lost another one tries to learn which.
SECONDS_TO_LEARN = 2.0
# How long ranks wait for the one of their host that tells why the job ends: torchrun ends all when the first has ended.
SECONDS_TO_TELL = 5.0
# How long a rank that is done waits for the others, which may be writing their results.
SECONDS_TO_LEAVE = 30.0


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    calls: int  # how often it entered or left a collective: odd while it waits in one
    pid: int
    host: str

    def encode(self) -> str:
        return f"{self.number} {self.calls} {self.pid} {self.host}"

    @staticmethod
    def decode(text: str) -> Beat:
        number, calls, pid, host = text.split(" ", 3)
        return Beat(int(number), int(calls), int(pid), host)


class Watch:
    """Beats for this rank, and watches those that it waits for, on a thread."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float, first_holds_store: bool) -> None:
        """Begin to beat.

        timeout: seconds that a rank may wait in one collective while nobody that it waits for computes.
        first_holds_store: whether the store ends with the first rank, rather than with the launcher.
        """
        self.timeout = timeout
        self.calls = 0  # see Beat; counted by the main thread
        # A connection of its own, as the main thread may be waiting in another.
        self._kept: Any = dist.PrefixStore("llama_watch", store.clone())  # type: ignore[attr-defined]  # not listed
        self._first_holds_store = first_holds_store
        self._speaks_without_store = rank == first_holds_store
        self._rank, self._world_size, self._host = rank, world_size, _host()
        self._others = [other for other in range(world_size) if other != rank]
        self._number, self._pid = 0, os.getpid()
        self._beats: dict[int, Beat] = {}  # the other ranks' newest
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llama-watch", daemon=True)
        self._beat()
        self._thread.start()

    def lost(self) -> str | None:
        """Return a sentence on the rank that has ended, once the connection to one is lost; None if nobody knows."""
        deadline = time.monotonic() + SECONDS_TO_LEARN
        try:
            if len(self._beats) < len(self._others):
                self._listen()
            while time.monotonic() < deadline:
                if (rank := self._first_ended()) is not None:
                    return self._ended(rank)
                if self._store.check(["lost"]):  # on another host
                    return self._store.get("lost").decode()
                time.sleep(0.01)
        except RuntimeError:  # the store has ended, with the process that held it
            ended = [rank for rank in self._others if self._process_has_ended(rank)]
            return self._ended(ended[0]) if ended else None
        return None

    def end(self, message: str | None) -> typing.NoReturn:
        """End this process, and have the others end: with exit code 1 and an error, or without if nobody reads on.

        The first rank of each host that has an error logs it, and the others wait until it has.
        """
        with contextlib.suppress(Exception):  # of a stdout that nobody can read
            sys.stdout.flush()
        speaks, spoke = (f"{what} on {self._host}" for what in ("speaks", "spoke"))
        try:
            if message is None:
                self._store.set("unread", "")
            first = self._store.add(speaks, 1) == 1
            if self._store.check(["unread"]):
                os._exit(0)
        except RuntimeError:  # the store is gone
            first = self._speaks_without_store
        if first:
            log.error("error: %s", message)
        with contextlib.suppress(RuntimeError):
            if first:
                self._store.set(spoke, "")
            deadline = time.monotonic() + SECONDS_TO_TELL
            while not self._store.check([spoke]) and time.monotonic() < deadline:
                time.sleep(0.01)
            self._go(SECONDS_TO_LEARN)
        os._exit(1)

    def stop(self) -> None:
        """Stop beating."""
        self._done.set()
        self._thread.join()

    def leave(self) -> None:
        """Stop beating, and wait until the other ranks are done, too."""
        if os.getpid() != self._pid:  # a fork of the user's
            return
        self.stop()
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        with contextlib.suppress(RuntimeError):
            self._listen()
            self._store.set(f"left {self._rank}", "")
            while not all(map(self._has_ended, self._others)) and time.monotonic() < deadline:
                time.sleep(0.01)
            self._go(SECONDS_TO_LEAVE)

    def _go(self, seconds: float) -> None:
        """Note that this rank needs the store no more; whoever holds it waits until nobody does."""
        deadline = time.monotonic() + seconds
        self._store.set(f"going {self._rank}", "")
        if self._rank == 0 and self._first_holds_store:
            for rank in self._others:
                while not (self._process_has_ended(rank) or self._store.check([f"going {rank}"])):
                    if time.monotonic() > deadline:
                        return
                    time.sleep(0.01)

    def _run(self) -> None:
        now, calls, began = time.monotonic(), 0, 0.0
        changed: dict[int, tuple[Beat | None, float, float]] = {}  # a beat, when it came, and when its calls changed
        while not self._done.wait(BEAT_SECONDS):
            before, now = now, time.monotonic()
            alarm = threading.Timer(self.timeout + SILENT_SECONDS, self._end_without_store, [self.calls])
            try:
                if self.calls % 2:
                    alarm.daemon = True
                    alarm.start()
                self._beat()
                if len(self._beats) < len(self._others):
                    self._listen()
                if self.calls % 2 == 0 or self.calls != calls or now - before > SILENT_SECONDS:
                    # It does not wait, or only since now, or was itself what was stopped.
                    calls, began = self.calls, now
                    changed.clear()
                    continue
                self._listen()
                for rank in self._others:
                    beat = self._beats.get(rank)
                    last, beat_at, calls_at = changed.get(rank, (None, now, now))
                    if beat is not None and last is not None:
                        beat_at = beat_at if beat.number == last.number else now
                        calls_at = calls_at if beat.calls == last.calls else now
                    changed[rank] = beat, beat_at, calls_at
                silent = {rank: now - beat_at for rank, (_, beat_at, _) in changed.items()}
                stuck = {
                    rank: now - calls_at if beat is not None and beat.calls % 2 else 0.0
                    for rank, (beat, _, calls_at) in changed.items()
                }
                verdict = self._verdict(now - began, silent, stuck)
            except RuntimeError:  # the store has ended, with the process that held it
                return
            finally:
                alarm.cancel()
            if verdict is not None:
                self.end(verdict)

    def _end_without_store(self, calls: int) -> None:
        """End a process that waits in a collective, while the store, too, keeps it waiting."""
        if self.calls == calls:
            if self._speaks_without_store:
                log.error(
                    "error: %s gave no sign of life for %.0f s: it is stopped, or its host is out of reach",
                    self._name(0) if self._first_holds_store else "the launcher",
                    self.timeout + SILENT_SECONDS,
                )
            os._exit(1)

    @property
    def _store(self) -> Any:
        """The job's store; RuntimeError where the process that holds it is seen to have ended: torch logs a page."""
        if self._first_holds_store and self._process_has_ended(0):
            raise RuntimeError("the store has ended")
        return self._kept

    def _beat(self) -> None:
        self._number += 1
        self._store.set(f"beat {self._rank}", Beat(self._number, self.calls, self._pid, self._host).encode())

    def _listen(self) -> None:
        """Read the newest beat of each other rank that has given one."""
        beating = [rank for rank in self._others if self._store.check([f"beat {rank}"])]
        self._beats = {rank: Beat.decode(self._store.get(f"beat {rank}").decode()) for rank in beating}

    def _verdict(self, waited: float, silent: dict[int, float], stuck: dict[int, float]) -> str | None:
        """Return why it is of no use to wait any longer, or None.

        waited: seconds in this collective; silent: seconds without a beat, by rank; stuck: seconds in one collective.
        """
        computes = any(not seconds for rank, seconds in stuck.items() if not self._has_ended(rank))
        # Another replica's ranks may have ended, while those of this one go on without them.
        if waited >= SILENT_SECONDS and not computes and (ended := self._first_ended()) is not None:
            return self._ended(ended)
        if waited < self.timeout:
            return None
        limit = f"for {waited:.0f} s (--timeout is {self.timeout:g})"
        for rank, seconds in silent.items():
            if seconds >= min(SILENT_SECONDS, self.timeout):
                return f"{self._name(rank)} gave no sign of life {limit}: it is stopped, or its host is out of reach"
        if min(stuck.values()) >= self.timeout:
            return f"all ranks wait for each other, {limit}: each must make the same calls in the same order"
        return None  # another rank computes

    def _ended(self, rank: int) -> str:
        """Return a sentence on a rank that has ended, and leave it for other hosts, which cannot see its process."""
        sentence = f"{self._name(rank)} has ended or was killed, and the others cannot go on without it"
        with contextlib.suppress(RuntimeError):
            self._store.set("lost", sentence)
        return sentence

    def _name(self, rank: int) -> str:
        beat = self._beats.get(rank)
        where = f" (process {beat.pid} on {beat.host.split()[0]})" if beat is not None else ""
        return f"rank {rank} of {self._world_size}{where}"

    def _first_ended(self) -> int | None:
        """Return a rank that is known to have ended: processes of this host can be asked sooner than the store."""
        tests = self._process_has_ended, self._has_ended
        return next((rank for test in tests for rank in self._others if test(rank)), None)

    def _has_ended(self, rank: int) -> bool:
        """Tell whether a rank is known to have ended: by its process on this host, or by its own word."""
        return self._process_has_ended(rank) or self._store.check([f"left {rank}"])

    def _process_has_ended(self, rank: int) -> bool:
        """Tell whether a rank's process was one of this host, and has ended; its parent may not have noticed yet."""
        beat = self._beats.get(rank)
        if beat is None or beat.host != self._host:
            return False
        try:
            os.kill(beat.pid, 0)
            return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
        except ProcessLookupError:
            return True
        except OSError:  # no Linux
            return False


def _host() -> str:
    """Return this host's name and, on Linux, what tells its processes from those of other hosts and containers."""
    name = socket.gethostname().replace(" ", "-")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{name} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return name
