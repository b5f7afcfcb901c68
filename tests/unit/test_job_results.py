"""What a job writes: which lines are finished, and files of results that survive any end."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llama.jobs.finished import FinishedLines, line_digest
from llama.jobs.lines import InputLine
from llama.jobs.result_file import ResultFile, join_parts, part_path, parts_of, result_line, sort_results
from llama.sampling import SamplingParams

DIGEST = line_digest(SamplingParams())


def lines_of(*contents: str) -> list[InputLine]:
    return [InputLine(number, content.encode(), 0) for number, content in enumerate(contents)]


def finished_of(lines: list[InputLine], *numbers: int) -> FinishedLines:
    finished = FinishedLines("out.jsonl")
    for number in numbers:
        assert finished.add(number, DIGEST(lines[number].content))
    return finished


def test_finished_lines_are_left_out_and_those_of_another_input_are_refused() -> None:
    lines = lines_of("a", "b", "c", "d")
    finished = finished_of(lines, 3, 1)
    assert [line.number for line in finished.unfinished(lines, DIGEST)] == [0, 2]
    assert not finished.add(3, "0")
    for others in (lines_of("a", "B", "c", "d"), lines_of("b", "c", "d"), lines[:3], [lines[0], *lines[2:]]):
        with pytest.raises(ValueError, match=r"out.jsonl has results of another input"):
            list(finished.unfinished(others, DIGEST))
    with pytest.raises(ValueError, match="other sampling flags"):
        list(finished.unfinished(lines, line_digest(SamplingParams(0.5))))


def write_results(path: Path, numbers: list[int], **result: Any) -> bytes:
    file = ResultFile(path)
    for number in numbers:
        file.append(number, result_line(number, f"{number:08x}", result))
    file.close()
    return path.read_bytes()


def test_a_file_that_is_cut_at_any_byte_goes_on_to_the_same_lines(tmp_path: Path) -> None:
    """A torn last line is dropped, a whole one is kept, and what is left is written once."""
    path = tmp_path / "out.jsonl"
    whole = write_results(path, [2, 0, 3, 1], id=None, generation="é\n\U0001f600", error=[])
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        file = ResultFile(path)
        finished = FinishedLines(str(path))
        kept = [finished.add(number, digest) for number, digest, _ in file.results()]
        assert kept == [True] * whole[:length].count(b"\n")
        assert path.read_bytes() == whole[:length]  # nothing is changed before the input is known to be the same
        file.drop_torn_line()
        for number in (2, 0, 3, 1):
            if number not in finished:
                file.append(number, whole.splitlines(keepends=True)[[2, 0, 3, 1].index(number)])
        file.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"index": 0, "digest": "00"}\n{"a": 1}\n', b'{"index": -1, "digest": "00"}\n',
     b'{"index": 0}\n', b'{"index": 0, "digest": "x"}\n', b"[0]\n", b"\0\0\0\0\n"],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_and_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    """A text without a line's end at its end is no torn line."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    file = ResultFile(path)
    with pytest.raises(ValueError, match=r"out.jsonl is there already, and its line \d is no result of a job"):
        list(file.results())
    assert path.read_bytes() == content


def test_two_jobs_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = ResultFile(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="another job is writing to"):
        ResultFile(tmp_path / "out.jsonl")
    first.close()
    ResultFile(tmp_path / "out.jsonl").close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "out.jsonl", os.write
    file = ResultFile(path)
    file.append(0, b"whole\n")

    def full(descriptor: int, data: bytes) -> int:
        if path.stat().st_size >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.append(1, b"a longer line\n")
    assert path.read_bytes() == b"whole\n"


def test_parts_are_joined_once_wherever_the_joining_is_cut(tmp_path: Path) -> None:
    """Killed in the middle, lines are in the output and in a part."""
    output = tmp_path / "out [1].jsonl"
    own = write_results(output, [1, 4], id=0)
    parts = {rank: write_results(part_path(output, rank), numbers) for rank, numbers in ((2, [0, 5]), (10, [3, 2]))}
    (tmp_path / "out [1].jsonl.rankle").write_text("of somebody else")
    joined = own + parts[10] + parts[2]
    for length in range(len(own), len(joined) + 1):
        output.write_bytes(joined[:length])
        for rank, content in parts.items():
            part_path(output, rank).write_bytes(content + b'{"index": 9')  # torn
        file, finished = ResultFile(output), FinishedLines("out")
        for number, digest, _ in file.results():
            finished.add(number, digest)
        file.drop_torn_line()
        join_parts(file, finished)
        file.close()
        found = [json.loads(line)["index"] for line in output.read_text().splitlines()]
        assert sorted(found) == [0, 1, 2, 3, 4, 5] and parts_of(output) == []
    assert (tmp_path / "out [1].jsonl.rankle").exists()


def test_results_are_sorted_by_the_lines_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written = write_results(path, [4, 0, 7, 2], id=None)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    file = ResultFile(link)
    sort_results(file)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2, 4, 7]
    assert sorted(path.read_bytes().splitlines()) == sorted(written.splitlines())
    assert link.is_symlink() and sorted(each.name for each in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]
