"""Compiled kernels as files: whether one is whole, what it needs of a processor, and those that a wheel brought."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path

# Libraries that a wheel may bring, `kernels-ARCH.so` each, for where there is no compiler: see scripts/wheel.py.
PREBUILT = Path(__file__).parent / "prebuilt"
DIGEST_SIZE = 32  # bytes at a library's end, which loaders ignore: the hash of what is before


def add_digest(path: Path) -> None:
    """Complete a library that was just compiled, and see that it is on the disk."""
    with open(path, "r+b") as file:
        file.write(_digest(file.read()))
        file.flush()
        os.fsync(file.fileno())


def is_whole(path: Path) -> bool:
    """Tell whether a library is there and as it was written: a damaged one would end the process by a signal."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return _digest(content[:-DIGEST_SIZE]) == content[-DIGEST_SIZE:]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()


def machine() -> str:
    """Describe the processor as -march=native sees it, so that hosts that share a cache folder share no library."""
    model = re.search(r"^model name\s*:.*$", _cpuinfo(), re.MULTILINE)
    return platform.machine() + " ".join(sorted(processor_flags())) + (model[0] if model else "")


def processor_flags() -> set[str]:
    """Return the extensions of the instruction set that this processor has, by Linux's names; none elsewhere."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def instructions(kernels: ctypes.CDLL) -> set[str]:
    """Return the extensions of the instruction set that a library uses, by Linux's names for them."""
    kernels.instructions.restype = ctypes.c_char_p
    return set(kernels.instructions().decode().split())


def missing_instructions(kernels: ctypes.CDLL) -> list[str]:
    """Return those that this processor has not; none where the system does not say what it has, as on macOS."""
    flags = processor_flags()
    return sorted(instructions(kernels) - flags) if flags else []


def load_prebuilt(arch: str | None) -> tuple[ctypes.CDLL, str] | None:
    """Load the library that came with the package for this processor, or for `arch`, and return it with its name.

    Of several, that which uses most of what the processor has. None where none of them runs here.
    """
    found: list[tuple[int, str, ctypes.CDLL]] = []
    for path in PREBUILT.glob("kernels-*.so"):
        name = path.stem.removeprefix("kernels-")
        if arch not in (None, name) or not is_whole(path):
            continue
        try:
            kernels = ctypes.CDLL(str(path))
            if not missing_instructions(kernels):
                found.append((len(instructions(kernels)), name, kernels))
        except (OSError, AttributeError):  # of another system
            continue
    if not found:
        return None
    _, name, kernels = max(found, key=lambda each: each[:2])
    return kernels, name


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
