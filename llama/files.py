"""Say in one line why a file cannot be used: it is something else, or cannot be mapped; and lock those in use."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

GGUF_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

LOOKED_AT = 256  # bytes
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
SHORTEST_MESSAGE = 8  # bytes; a file of weights that was cut off earlier may be letters by chance


def check_content(path: Path, is_binary: bool = False) -> None:
    """Raise ValueError where a file is empty, a git-lfs pointer, or what a server says in place of the file.

    is_binary: the file should hold weights or the like, so that any text is a message.
    """
    if path.stat().st_size == 0:  # so does a pipe, which nobody may ever write to
        raise ValueError(f"{path} is empty: download it again")
    with path.open("rb") as file:
        text = file.read(LOOKED_AT).strip()
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: git lfs pull fetches it")
    if text.lower().startswith(WEB_PAGES):
        raise ValueError(f"{path} is a web page saved in place of the file: log in and download it again")
    if is_binary and len(text) >= SHORTEST_MESSAGE and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in text):
        raise ValueError(f"{path} is text in place of the file, {text[:80].decode()!r}: download it again")


def cannot_map(file: Path, error: Exception) -> OSError:
    """Return the error of a file that the system refuses to map, as Linux does where it is larger than all memory."""
    size = file.stat().st_size / 1e9
    return OSError(
        f"{file} of {size:.1f} GB cannot be mapped ({error}): it needs a machine with more memory, or on Linux "
        "sysctl vm.overcommit_memory=1"
    )


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first of some names, for an error message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def folder_listing(folder: Path) -> str:
    """Return the first names in a folder, for an error message."""
    return listed(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir()))


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return False where another process, or this one, has it locked.

    Where the system or the file system knows no locks nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True
