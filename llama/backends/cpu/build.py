"""Compiles the C++ in csrc/ for this machine, once, and caches the library in the user's cache folder (see D29)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

log = logging.getLogger("llama")

SOURCES = Path(__file__).parent / "csrc"
# Not -ffast-math: the order of additions is the kernels' own, see D30.
COMPILER_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
SECONDS_TO_COMPILE = 300


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be compiled; the reason is logged, once.

    LLAMA_KERNELS=0 in the environment turns them off; CXX names the compiler, as elsewhere.
    """
    if os.environ.get("LLAMA_KERNELS") == "0":
        log.info("no CPU kernels, as LLAMA_KERNELS=0 says: torch's own operations are used")
        return None
    try:
        return _load(_cache_folder())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("no CPU kernels, so tokens come slower: %s", " ".join(str(error).split()))
        return None


def _cache_folder() -> Path:
    """Return the user's cache folder for this package, or a path that cannot be written where there is none."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(folder) if folder else Path.home() / ".cache") / "llama"
    except RuntimeError:  # a user without a home folder
        return Path(os.devnull) / "llama"  # cannot be written


def _load(folder: Path) -> ctypes.CDLL:
    """Load the library for this machine; compile it first if `folder` does not have it.

    Raise OSError, ValueError or SubprocessError where that fails.
    """
    compiler = _compiler()
    names = ["kernels.cpp", *sorted(path.name for path in SOURCES.glob("*.h"))]
    parts = [(SOURCES / name).read_bytes() for name in names]
    parts += [" ".join((*compiler, *COMPILER_FLAGS)).encode(), _machine().encode()]
    key = hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    path = folder / f"kernels-{key}.so"
    if not path.is_file():
        if not _can_write(folder):  # for this process alone; a loaded library does not need its file
            with tempfile.TemporaryDirectory(prefix="llama-kernels-") as temporary:
                _compile(compiler, Path(temporary) / path.name)
                return ctypes.CDLL(f"{temporary}/{path.name}")
        with _locked(path.with_suffix(".lock")):  # the ranks of a host wait for one of them
            if not path.is_file():
                _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # the file is damaged
        _compile(compiler, path)
        return ctypes.CDLL(str(path))


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _compiler() -> list[str]:
    """Return the compiler's command, as a list of words; raise ValueError where there is none."""
    if platform.system() != "Linux":
        raise ValueError(f"they are not built on {platform.system()}")
    cxx = shlex.split(os.environ.get("CXX", ""))
    candidates = [cxx] if cxx else [["c++"], ["g++"], ["clang++"]]
    for words in candidates:
        found = shutil.which(words[0])
        if found:
            return [found, *words[1:]]
    names = ", ".join(words[0] for words in candidates)
    raise ValueError(f"no C++ compiler ({names}): install g++, or name one in CXX")


def _machine() -> str:
    """Describe the processor as -march=native sees it, so that hosts that share a cache folder share no library."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"^(flags|Features)\s*:.*$", cpu, re.MULTILINE)
    model = re.search(r"^model name\s*:.*$", cpu, re.MULTILINE)
    return platform.machine() + (found[0] if found else "") + (model[0] if model else "")


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the library to `path`, which appears when it is complete; raise ValueError with the compiler's error."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    # torch brings its own OpenMP: the same threads serve its operations and these.
    libraries = Path(torch.__file__).parent / "lib"
    start = time.perf_counter()
    command = [*compiler, *COMPILER_FLAGS, str(SOURCES / "kernels.cpp"), "-o", str(partial), f"-L{libraries}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise ValueError(
                f"{' '.join(compiler)} failed with exit code {done.returncode}: {why or 'it says no more'}"
            )
        os.replace(partial, path)
        log.info("compiled CPU kernels in %.1f s, once: %s", time.perf_counter() - start, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: then each process compiles
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
