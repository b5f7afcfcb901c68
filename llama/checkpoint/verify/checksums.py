"""Check lists of checksums beside weights, Meta's checklist.chk and sha256sum's format, and write the latter."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama.checkpoint.base import Progress

SHA256_LIST = "checksums.sha256"
CHECKSUM_LISTS = {"checklist.chk": "md5", "tokenizer_checklist.chk": "md5", SHA256_LIST: "sha256"}
HEX_DIGITS = {"md5": 32, "sha256": 64}
CHECKSUM_LINE = re.compile(r"([0-9a-fA-F]+) [ *](.+)")
HASHED_AT_ONCE = 1 << 22  # bytes


class Finding(NamedTuple):
    """Say what was checked of a file, and what problem was found, if any; size is in bytes."""

    file: str
    size: int | None
    what: str
    problem: str | None = None


def list_path(path: Path) -> Path:
    """Return where the list of a checkpoint is that `write_list` writes."""
    return path / SHA256_LIST if path.is_dir() else path.with_name(path.name + ".sha256")


def write_list(path: Path, files: list[Path], progress: Progress) -> Path:
    """Write the sha256 of the files, which lie in the folder `path` or beside it; return where the list is."""
    lines = [f"{_digest(file, 'sha256', progress)}  {file.name}\n" for file in files]
    target = list_path(path)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def verify_lists(path: Path, progress: Progress) -> Iterator[Finding]:
    """Check every line of every list of a checkpoint."""
    for chosen, algorithm in _lists(path):
        what = f"{algorithm} in {chosen.name}"
        for line, listed in _lines(chosen, algorithm):
            if listed is None:
                wrong = f"the line {line[:80]!r} is no {algorithm} and name of a file beside it"
                yield Finding(chosen.name, chosen.stat().st_size, algorithm, wrong)
                continue
            expected, name = listed
            file = chosen.parent / name
            if not file.is_file():
                yield Finding(name, None, what, "missing")
                continue
            found = _digest(file, algorithm, progress)
            problem = None if found == expected else f"it is {found[:12]}..., not {expected[:12]}...: download it again"
            yield Finding(name, file.stat().st_size, what, problem)


def bytes_listed(path: Path) -> int:
    """Return how many bytes `verify_lists` reads."""
    files = [
        chosen.parent / listed[1]
        for chosen, algorithm in _lists(path)
        for _, listed in _lines(chosen, algorithm)
        if listed
    ]
    return sum(file.stat().st_size for file in files if file.is_file())


def _digest(file: Path, algorithm: str, progress: Progress) -> str:
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as stream:
        while data := stream.read(HASHED_AT_ONCE):
            hasher.update(data)
            progress(len(data))
    return hasher.hexdigest()


def _lists(path: Path) -> list[tuple[Path, str]]:
    """Return the lists of a checkpoint that exist, and their algorithms."""
    if path.is_dir():
        return [(path / name, algorithm) for name, algorithm in CHECKSUM_LISTS.items() if (path / name).is_file()]
    return [(list_path(path), "sha256")] if list_path(path).is_file() else []


def _lines(chosen: Path, algorithm: str) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Yield lines, and the digest and the name of a file in each; None where it has none."""
    for line in chosen.read_text(encoding="utf-8", errors="replace").splitlines():
        match = CHECKSUM_LINE.fullmatch(line.strip())
        if match and len(match[1]) == HEX_DIGITS[algorithm] and Path(match[2]).name == match[2]:
            yield line, (match[1].lower(), match[2])
        elif line.strip():
            yield line, None
