"""Files of results, a line of JSON each: whole lines are appended, and what is there is read again after any end.

Each process writes a file of its own, so that several hosts can share a file system that knows no common appending:
the first replica the output itself, the others its parts beside it, which are joined to it in the end or at the next
start.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import stat
import threading
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama.files import lock
from llama.jobs.finished import FinishedLines
from llama.jobs.lines import STANDARD_STREAM

# How each line begins, which tells a torn one from a stranger's file.
BEGINNING = b'{"index": '
STDOUT = 1


class StoredResult(NamedTuple):
    """A whole line of a file of results."""

    number: int  # of the input's line
    digest: str
    line: bytes


def result_line(number: int, digest: str, result: Mapping[str, Any]) -> bytes:
    """Return a line of results with its end."""
    fields = {"index": number, "digest": digest, **result}
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in what the input calls its line
        return json.dumps(fields).encode() + b"\n"


class ResultFile:
    """A file that whole lines are appended to; locked, so that no other job writes to it."""

    def __init__(self, path: Path) -> None:
        """Open a file, a new one if there is none, or stdout for -; change nothing in it.

        Raise ValueError where another process writes to it.
        """
        self.path = path
        if path == STANDARD_STREAM:
            self._descriptor, self.is_file = STDOUT, False
        else:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self.is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        if self.is_file:
            self._take()
        self._stop = 0  # bytes of whole lines
        self._last, self.is_ordered = -1, True  # the last line's number, and whether numbers only grew
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What messages call it."""
        return "stdout" if self.path == STANDARD_STREAM else str(self.path)

    def results(self) -> Iterator[StoredResult]:
        """Read the whole lines from the beginning on; raise ValueError for a line that is no result.

        A torn last line, which a process that was ended can leave, is not among them.
        """
        self._stop, self._last, self.is_ordered = 0, -1, True
        if not self.is_file:
            return
        with self.path.open("rb") as file:
            for place, line in enumerate(file):
                if not line.endswith(b"\n") and line[: len(BEGINNING)] == BEGINNING[: len(line)]:
                    return
                try:
                    fields = json.loads(line)
                    number, digest = fields["index"], fields["digest"]
                    if not line.endswith(b"\n") or type(number) is not int or number < 0 or int(digest, 16) < 0:
                        raise ValueError
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise ValueError(
                        f"{self.path} is there already, and its line {place + 1} is no result of a job: give another "
                        "file for the output, or remove it"
                    ) from None
                self._note(number, len(line))
                yield StoredResult(number, digest, line)

    def drop_torn_line(self) -> None:
        """Remove what follows the whole lines that `results` has read."""
        if self.is_file and os.fstat(self._descriptor).st_size > self._stop:
            os.ftruncate(self._descriptor, self._stop)

    def append(self, number: int, line: bytes) -> None:
        """Append the line of a number; OSError where it cannot be, and then a file holds nothing of it."""
        with self._lock:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                if self.is_file:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._descriptor, self._stop)
                raise
            self._note(number, len(line))

    def stop(self) -> None:
        """Have nothing more written, by any thread, as the process is about to end: the last line is whole."""
        self._lock.acquire()

    def sync(self) -> None:
        """Wait until the disk has all."""
        if self.is_file:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self.path != STANDARD_STREAM:
            os.close(self._descriptor)

    def _note(self, number: int, nbytes: int) -> None:
        self._stop += nbytes
        self.is_ordered = self.is_ordered and number > self._last
        self._last = number

    def _take(self) -> None:
        if not lock(self._descriptor):
            os.close(self._descriptor)
            raise ValueError(f"another job is writing to {self.path}: wait for it, or end it first")


def part_path(output: Path, rank: int) -> Path:
    """Return where a replica writes whose first rank is `rank`: the job's first replica to the output itself."""
    return output if rank == 0 else output.with_name(f"{output.name}.rank{rank}")


def parts_of(output: Path) -> list[Path]:
    """Return the parts that lie beside an output."""
    beside = glob.glob(f"{glob.escape(str(output))}.rank*")
    return sorted(Path(path) for path in beside if re.fullmatch(r"\d+", path.rpartition(".rank")[2]))


def join_parts(output: ResultFile, finished: FinishedLines) -> None:
    """Append the results of all parts to their output, those of `finished` lines left out, and remove the parts.

    A process that is ended in the middle of it leaves lines in both, and the next one goes on.
    """
    for path in parts_of(output.path):
        part = ResultFile(path)
        try:
            for number, digest, line in part.results():
                if finished.add(number, digest):
                    output.append(number, line)
            output.sync()
            path.unlink()
        finally:
            part.close()


def sort_results(output: ResultFile) -> None:
    """Bring the results into the order of their input; 8 bytes a line, and as much disk as there are results."""
    places = array("Q")  # where the line of each number begins, plus 1
    start = 0
    for number, _, line in output.results():
        missing = number + 1 - len(places)
        if missing > 0:
            places.frombytes(bytes(missing * places.itemsize))
        places[number] = start + 1
        start += len(line)
    if output.is_ordered:
        return
    real = output.path.resolve()  # a link stays one
    path = real.with_name(f"{real.name}.sorted")
    try:
        with real.open("rb") as source, path.open("wb") as target:
            for place in places:
                if place:
                    source.seek(place - 1)
                    target.write(source.readline())
            target.flush()
            os.fsync(target.fileno())
        shutil.copymode(real, path)
        path.replace(real)
    except OSError:
        path.unlink(missing_ok=True)
        raise
