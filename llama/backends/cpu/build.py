"""Compiles the C++ in csrc/ for this machine, once, and caches the library in the user's cache folder (see D29)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llama.backends.cpu.libraries import add_digest, is_whole, load_prebuilt, machine, missing_instructions
from llama.errors import FIXES_OF_SYSTEM, one_line

log = logging.getLogger("llama")
_progress = logging.getLogger("llama.progress")  # shown on terminals by the command line

SOURCES = Path(__file__).parent / "csrc"
# Not -ffast-math: the order of additions is the kernels' own, see D30. A product and a sum become one instruction, as
# GCC has it by default.
COMPILER_FLAGS = (
    "-std=c++17",
    "-O3",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",  # no vector leaves this library
    "-shared",
    "-fPIC",
)
SYSTEMS = ("Linux", "Darwin")
SECONDS_TO_COMPILE = 300
SECONDS_TO_REMEMBER = 24 * 3600  # that it failed


class KnownFailure(ValueError):
    """Says why there is no library, as an earlier process found out."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be compiled or loaded; the reason is logged, once.

    Where they cannot, those that came with the package are taken, if there are any for this processor. LLAMA_KERNELS=0
    in the environment turns them off; CXX names the compiler, as elsewhere, and LLAMA_KERNELS_ARCH a processor in place
    of the one at hand, by the compiler's name for it.
    """
    if os.environ.get("LLAMA_KERNELS") == "0":
        log.info("no CPU kernels, as LLAMA_KERNELS=0 says: torch's own operations are used")
        return None
    arch = os.environ.get("LLAMA_KERNELS_ARCH") or None
    try:
        return _load(_compiler(), arch)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        prebuilt = load_prebuilt(arch)
        if prebuilt is not None:
            kernels, name = prebuilt
            log.info("CPU kernels are those that came with the package for %s: %s", name, one_line(str(error)))
            return kernels
        level = logging.INFO if isinstance(error, KnownFailure) else logging.WARNING
        log.log(level, "no CPU kernels, so tokens come slower: %s", one_line(str(error)))
        return None


def _load(compiler: list[str], arch: str | None) -> ctypes.CDLL:
    """Load the library for this machine, or for `arch`; compile it first where no folder has it.

    Raise OSError, ValueError or SubprocessError where that fails. The failure is noted beside the library, and what
    failed is not tried again for SECONDS_TO_REMEMBER.
    """
    names = ["kernels.cpp", *sorted(path.name for path in SOURCES.glob("*.h"))]
    parts = [(SOURCES / name).read_bytes() for name in names]
    parts += [" ".join((*compiler, *_flags(arch))).encode(), machine().encode()]
    key = hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    paths = [folder / f"kernels-{key}.so" for folder in _folders()]
    writable = (path for path in paths if _can_write(path.parent))
    whole = next(filter(is_whole, paths), None)
    path = whole or next(writable, None)
    if path is None:
        raise ValueError("no folder to keep them in can be written and run from: name one in XDG_CACHE_HOME")
    failure = path.with_suffix(".failed")
    with _locked(path.with_suffix(".lock")):  # the ranks of a host wait for one of them
        if failure.is_file() and time.time() - failure.stat().st_mtime < SECONDS_TO_REMEMBER:
            raise KnownFailure(failure.read_text(encoding="utf-8", errors="replace"))
        try:
            if whole is None and not is_whole(path):  # another rank may have compiled it by now
                compile_library(compiler, arch, path)
            kernels = ctypes.CDLL(str(path))
            missing = missing_instructions(kernels) if arch else []
            if missing:
                raise ValueError(f"this processor has no {', '.join(missing)}, and LLAMA_KERNELS_ARCH={arch} uses them")
            return kernels
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            if _may_pass(error):
                raise
            message = f"{error}; not tried again for a day, or until {failure} is removed"
            with contextlib.suppress(OSError):
                failure.write_text(message, encoding="utf-8")
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
            runs = not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)  # macOS does not say
            if runs and (folder != temporary or _is_private(folder)):
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


def _compiler() -> list[str]:
    """Return the compiler's command, as a list of words; raise ValueError where there is none."""
    if platform.system() not in SYSTEMS:
        raise ValueError(f"they are not built on {platform.system()}")
    cxx = shlex.split(os.environ.get("CXX", ""))
    candidates = [cxx] if cxx else [["c++"], ["g++"], ["clang++"]]
    for words in candidates:
        found = shutil.which(words[0])
        if found:
            return [found, *words[1:]]
    names = ", ".join(words[0] for words in candidates)
    raise ValueError(f"no C++ compiler ({names}): install g++, or name one in CXX")


def _flags(arch: str | None) -> list[str]:
    """Return the compiler's flags for a processor, by default the one at hand. ARM's have architectures, and models."""
    is_model = platform.machine() in ("arm64", "aarch64") and not (arch or "").startswith("armv")
    return [*COMPILER_FLAGS, f"-m{'cpu' if is_model else 'arch'}={arch or 'native'}"]


def compile_library(compiler: list[str], arch: str | None, path: Path) -> None:
    """Compile the library to `path`, which appears when it is complete; raise ValueError with the compiler's error.

    arch: a processor, as the compiler's -march or, on ARM, -mcpu names it; by default the one at hand.
    """
    partial = path.with_suffix(f".{os.getpid()}.partial")
    start = time.perf_counter()
    _progress.debug("compiling CPU kernels, once ...")
    command = [*compiler, *_flags(arch), str(SOURCES / "kernels.cpp"), "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS_TO_COMPILE)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            command = [*compiler, *([f"for LLAMA_KERNELS_ARCH={arch}"] if arch else [])]
            raise ValueError(f"{' '.join(command)} failed with exit code {done.returncode}: {why or 'it says no more'}")
        add_digest(partial)
        os.replace(partial, path)
        log.info("compiled CPU kernels in %.1f s, once: %s", time.perf_counter() - start, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, if its file system can be written and has locks: else each process compiles."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield
