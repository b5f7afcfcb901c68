"""Heartbeats: each rank tells the others that it lives, and whether it waits for them, through the job's store.

A thread beats, so that a rank which computes for long does beat, and one which is stopped does not. Where this rank
waits for one that has ended or is stopped, the thread says so and ends the process, as the main thread cannot. Knows
nothing of process groups.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

log = logging.getLogger("llama")

BEAT_SECONDS = 1.0
# A process that was itself stopped for so long begins to wait anew, when it goes on.
OWN_PAUSE_SECONDS = 5.0
# A rank that has ended, or that is silent and seen to be stopped, is waited for so long.
ENDED_SECONDS = 10.0
# One that is silent and cannot be seen, as on another host, is waited for so long.
LOST_SECONDS = 20.0
# How long a rank that lost another one tries to learn which.
SECONDS_TO_LEARN = 3.0
# How long ranks wait for the one of their host that tells why the job ends: torchrun ends all when the first has ended.
SECONDS_TO_TELL = 5.0
# How long a rank that is done waits for the others, which may be writing their results.
SECONDS_TO_LEAVE = 30.0


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    calls: int  # how often it entered or left a collective: odd while it waits in one
    needs_others: bool  # whether what it does is of no use without the others, although it does not wait for them
    pid: int
    host: str

    def encode(self) -> str:
        return f"{self.number} {self.calls} {self.needs_others:d} {self.pid} {self.host}"

    @staticmethod
    def decode(text: str) -> Beat:
        number, calls, needs_others, pid, host = text.split(" ", 4)
        return Beat(int(number), int(calls), needs_others == "1", int(pid), host)


class Watch:
    """Beats for this rank, and watches those that it waits for, on a thread."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float, first_holds_store: bool) -> None:
        """Begin to beat.

        timeout: seconds that a rank may wait in one collective while nobody that it waits for computes.
        first_holds_store: whether the store ends with the first rank, rather than with the launcher.
        """
        self.timeout = timeout
        self.calls = 0  # see Beat; counted by the main thread
        self.needs_others = False  # see Beat
        # A connection of its own, as the main thread may be waiting in another.
        self._kept: Any = dist.PrefixStore("llama_watch", store.clone())  # type: ignore[attr-defined]  # not listed
        self._first_holds_store = first_holds_store
        self._speaks_without_store = rank == first_holds_store
        self._rank, self._world_size, self._host = rank, world_size, _host()
        self._others = [other for other in range(world_size) if other != rank]
        self._number, self._pid = 0, os.getpid()
        self._beats: dict[int, Beat] = {}  # the other ranks' newest
        self._restore_terminal = _terminal()
        self._answered = time.monotonic()  # when the store last did
        self._done = threading.Event()
        self._beat()
        runs = self._run, self._run_without_store
        self._threads = [threading.Thread(target=run, name="llama-watch", daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()

    def lost(self) -> str | None:
        """Return a sentence on the rank that has ended, once the connection to one is lost; None if nobody knows."""
        deadline = time.monotonic() + SECONDS_TO_LEARN
        try:
            if len(self._beats) < len(self._others):
                self.listen()
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
        self._restore_terminal()
        os._exit(1)

    def stop(self) -> None:
        """Stop beating."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def leave(self) -> None:
        """Stop beating, and wait until the other ranks are done, too."""
        if os.getpid() != self._pid:  # a fork of the user's
            return
        self.stop()
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        with contextlib.suppress(RuntimeError):
            self.listen()
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

    def _waits(self) -> Iterator[float]:
        """Yield, with every beat, the seconds that this rank has waited for others: 0 where it does not."""
        before, calls, began = time.monotonic(), 0, 0.0
        while not self._done.wait(BEAT_SECONDS):
            now = time.monotonic()
            waits = self.calls % 2 or self.needs_others
            if not waits or self.calls != calls or now - before > OWN_PAUSE_SECONDS:
                calls, began = self.calls, now
            before = now
            yield now - began

    def _run(self) -> None:
        changed: dict[int, tuple[Beat | None, float, float]] = {}  # a beat, when it came, and when its calls changed
        for waited in self._waits():
            try:
                self._beat()
                if waited or len(self._beats) < len(self._others):
                    self.listen()
                now = self._answered = time.monotonic()
                if not waited:
                    changed.clear()
                    continue
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
                if waited and self._store.check([f"spoke on {self._host}"]):
                    self.end("another rank has failed, and has said why")
                verdict = self._verdict(waited, silent, stuck)
            except RuntimeError:  # the store has ended, with the process that held it
                if self.needs_others:  # no collective will tell
                    self.end(self.lost() or "the connection to the first rank, or to the launcher, was lost")
                return
            if verdict is not None:
                self.end(verdict)

    def _run_without_store(self) -> None:
        """End a process that waits for others, while the store, too, keeps it waiting: who holds it is stopped."""
        for waited in self._waits():
            seconds = min(waited, time.monotonic() - self._answered)
            if seconds >= (self._patience(0) if self._first_holds_store else self.timeout):
                if self._speaks_without_store:
                    log.error("error: %s", self._silent("the launcher" if self._rank == 0 else self._name(0), seconds))
                os._exit(1)

    @property
    def _store(self) -> Any:
        """The job's store; RuntimeError where the process that holds it is seen to have ended: torch logs a page."""
        if self._first_holds_store and self._process_has_ended(0):
            raise RuntimeError("the store has ended")
        return self._kept

    def _beat(self) -> None:
        self._number += 1
        beat = Beat(self._number, self.calls, self.needs_others, self._pid, self._host)
        self._store.set(f"beat {self._rank}", beat.encode())

    def listen(self) -> None:
        """Read the newest beat of each other rank that has given one."""
        beating = [rank for rank in self._others if self._store.check([f"beat {rank}"])]
        self._beats = {rank: Beat.decode(self._store.get(f"beat {rank}").decode()) for rank in beating}

    def _verdict(self, waited: float, silent: dict[int, float], stuck: dict[int, float]) -> str | None:
        """Return why it is of no use to wait any longer, or None.

        waited: seconds in this collective; silent: seconds without a beat, by rank; stuck: seconds in one collective.
        """
        lost = [rank for rank, seconds in silent.items() if seconds >= self._patience(rank)]
        for rank, beat in self._beats.items():
            if not (stuck[rank] or beat.needs_others or rank in lost or self._has_ended(rank)):
                return None  # it computes: another replica may have ended, while this one goes on without it
        if waited >= ENDED_SECONDS and (ended := self._first_ended()) is not None:
            return self._ended(ended)
        if lost:
            return self._silent(self._name(lost[0]), silent[lost[0]])
        if min(stuck.values()) >= self.timeout and self.calls % 2:
            limit = f"for {waited:.0f} s (--timeout is {self.timeout:g})"
            return f"all ranks wait for each other, {limit}: each must make the same calls in the same order"
        return None

    def _patience(self, rank: int) -> float:
        """Return how many seconds a rank may be silent: one whose process is seen to run is only slow."""
        return min({"T": ENDED_SECONDS, "": LOST_SECONDS}.get(self._process_state(rank), self.timeout), self.timeout)

    def _silent(self, name: str, seconds: float) -> str:
        return f"{name} gave no sign of life for {seconds:.0f} s: it is stopped, or its host is out of reach"

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
        return self._process_state(rank) in ("Z", "X")

    def _process_state(self, rank: int) -> str:
        """Return Linux' letter for the state of a rank's process; nothing where it is not known, as on another host."""
        beat = self._beats.get(rank)
        if beat is None or beat.host != self._host or sys.platform == "win32":  # whose os.kill sends Ctrl-C for 0
            return ""
        try:
            os.kill(beat.pid, 0)
            return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(") ")[2][0]
        except ProcessLookupError:
            return "X"
        except OSError:  # no Linux
            return ""


def _host() -> str:
    """Return this host's name and, on Linux, what tells its processes from those of other hosts and containers."""
    name = socket.gethostname().replace(" ", "-")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{name} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return name


def _terminal() -> Callable[[], None]:
    """Return what brings the terminal at stdin back to how it is now: readline turns its echo off while it waits."""
    try:
        import termios

        return functools.partial(termios.tcsetattr, 0, termios.TCSANOW, termios.tcgetattr(0))
    except (ImportError, termios.error):  # Windows; no terminal
        return lambda: None
