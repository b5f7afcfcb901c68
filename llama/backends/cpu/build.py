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
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from llama.errors import FIXES_OF_SYSTEM, one_line

log = logging.getLogger("llama")
_progress = logging.getLogger("llama.progress")  # shown on terminals by the command line

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
SECONDS_TO_REMEMBER = 24 * 3600  # that it failed
DIGEST_SIZE = 32  # bytes at a library's end, which loaders ignore: the hash of what is before


class KnownFailure(ValueError):
    """Says why there is no library, as an earlier process found out."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be compiled or loaded; the reason is logged, once.

    LLAMA_KERNELS=0 in the environment turns them off; CXX names the compiler, as elsewhere.
    """
    if os.environ.get("LLAMA_KERNELS") == "0":
        log.info("no CPU kernels, as LLAMA_KERNELS=0 says: torch's own operations are used")
        return None
    try:
        return _load(_compiler())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        level = logging.INFO if isinstance(error, KnownFailure) else logging.WARNING
        log.log(level, "no CPU kernels, so tokens come slower: %s", one_line(str(error)))
        return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Load the library for this machine; compile it first where no folder has it.

    Raise OSError, ValueError or SubprocessError where that fails. The failure is noted beside the library, and what
    failed is not tried again for SECONDS_TO_REMEMBER.
    """
    names = ["kernels.cpp", *sorted(path.name for path in SOURCES.glob("*.h"))]
    parts = [(SOURCES / name).read_bytes() for name in names]
    parts += [" ".join((*compiler, *COMPILER_FLAGS)).encode(), _machine().encode()]
    key = hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    paths = [folder / f"kernels-{key}.so" for folder in _folders()]
    writable = (path for path in paths if _can_write(path.parent))
    whole = next(filter(_is_whole, paths), None)
    path = whole or next(writable, None)
    if path is None:
        raise ValueError("no folder to keep them in can be written and run from: name one in XDG_CACHE_HOME")
    failure = path.with_suffix(".failed")
    with _locked(path.with_suffix(".lock")):  # the ranks of a host wait for one of them
        if failure.is_file() and time.time() - failure.stat().st_mtime < SECONDS_TO_REMEMBER:
            raise KnownFailure(failure.read_text(errors="replace"))
        try:
            if whole is None and not _is_whole(path):  # another rank may have compiled it by now
                _compile(compiler, path)
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            if _may_pass(error):
                raise
            message = f"{error}; not tried again for a day, or until {failure} is removed"
            with contextlib.suppress(OSError):
                failure.write_text(message)
                path.unlink(missing_ok=True)
            raise ValueError(message) from error


def _may_pass(error: Exception) -> bool:
    """Tell whether a failure is of the moment: a lack of memory, disk or time, not a compiler's or loader's refusal."""
    words = str(error)
    is_refusal = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)
    return not is_refusal or any(lack in words for lack in (*FIXES_OF_SYSTEM, "Killed", "killed"))


def _folders() -> list[Path]:
    """Return the folders that libraries can be loaded from: the user's cache, and one among the temporary files."""
    cache, temporary = os.environ.get("XDG_CACHE_HOME"), Path(tempfile.gettempdir()) / f"llama-{os.geteuid()}"
    folders = [temporary]
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        folders.insert(0, (Path(cache) if cache else Path.home() / ".cache") / "llama")
    usable = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(mode=0o700)
            if not os.statvfs(folder).f_flag & os.ST_NOEXEC and (folder != temporary or _is_private(folder)):
                usable.append(folder)
    return usable


def _can_write(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _is_private(folder: Path) -> bool:
    """Tell whether a folder is this user's own, and nobody else can write to it: others may have made it first."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _is_whole(path: Path) -> bool:
    """Tell whether a library is there and as it was written: a damaged one would end the process by a signal."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return _digest(content[:-DIGEST_SIZE]) == content[-DIGEST_SIZE:]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()


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
    _progress.debug("compiling CPU kernels, once ...")
    command = [*compiler, *COMPILER_FLAGS, str(SOURCES / "kernels.cpp"), "-o", str(partial), f"-L{libraries}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise ValueError(
                f"{' '.join(compiler)} failed with exit code {done.returncode}: {why or 'it says no more'}"
            )
        with open(partial, "r+b") as file:
            file.write(_digest(file.read()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        log.info("compiled CPU kernels in %.1f s, once: %s", time.perf_counter() - start, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, if its file system can be written and has locks: else each process compiles."""
    import fcntl

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield
