"""The kernels' library is compiled once, kept whole where it can be run, and not asked for again where that fails.

The compiler here makes an empty library, in tenths of a second, or one that says which instructions it has.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.backends.cpu import libraries
from llama.backends.cpu.build import library

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler that kernels are built with here")
EMPTY_LIBRARY = 'exec c++ -shared -fPIC -x c++ /dev/null -o "$2"'
LIBRARY = """echo 'extern "C" const char *instructions() {{ return "{}"; }}' | c++ -shared -fPIC -x c++ - -o "$2\""""


class Machine:
    """Folders, a compiler that notes its calls, and processes, as far as finding a library goes."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.temporary, self.calls = folder / "cache", folder / "tmp", folder / "calls"
        self.compiler = folder / "c++"
        self.temporary.mkdir()
        self.install(EMPTY_LIBRARY)

    def install(self, compiler: str) -> None:
        self.compiler.write_text(
            f'#!/bin/sh\necho "$@" >> {self.calls}\nwhile [ "$1" != -o ]; do shift; done\n{compiler}\n'
        )
        self.compiler.chmod(0o755)

    def start(self) -> ctypes.CDLL | None:
        """What a new process finds."""
        library.cache_clear()
        return library()

    @property
    def compiled(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    @property
    def shared(self) -> Path:
        """The user's folder among the temporary files."""
        return self.temporary / f"llama-{os.geteuid()}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.cache))
    monkeypatch.setenv("CXX", str(machine.compiler))
    monkeypatch.delenv("LLAMA_KERNELS", raising=False)
    monkeypatch.delenv("LLAMA_KERNELS_ARCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(machine.temporary))
    caplog.set_level(logging.INFO, logger="llama")
    yield machine
    library.cache_clear()


@pytest.mark.parametrize("damage", ["truncated", "zeroed"])
def test_a_damaged_library_is_compiled_again(machine: Machine, damage: str) -> None:
    """It was loaded as it was, and ended every run by SIGBUS or SIGSEGV."""
    assert machine.start() and machine.start() and machine.compiled == 1
    (path,) = machine.cache.glob("llama/*.so")
    whole = path.read_bytes()
    path.unlink()  # what this process has loaded stays
    half = len(whole) // 2
    path.write_bytes(whole[:half] + bytes(len(whole) - half) * (damage == "zeroed"))
    assert machine.start() and machine.compiled == 2
    assert len(path.read_bytes()) == len(whole)


def test_a_library_that_is_there_is_read_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start read and hashed it twice."""
    assert machine.start()
    read: list[Path] = []
    true = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        read.append(path)
        return true(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert machine.start() and machine.compiled == 1
    assert [path.suffix for path in read].count(".so") == 1


@pytest.mark.parametrize(("compiler", "why"), [('echo x > "$2"', "file too short"), ("exit 3", "exit code 3")])
def test_a_failure_is_remembered_for_a_day(
    machine: Machine, compiler: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the library could not be loaded, each start compiled again, for 17 to 25 s."""
    machine.install(compiler)
    assert [machine.start() for _ in range(3)] == [None] * 3 and machine.compiled == 1
    first, *later = [record for record in caplog.records if "no CPU kernels" in record.getMessage()]
    (note,) = machine.cache.glob("llama/*.failed")
    assert why in first.getMessage() and str(note) in first.getMessage()
    assert first.levelname == "WARNING" and {record.levelname for record in later} == {"INFO"}
    machine.install(EMPTY_LIBRARY)
    assert machine.start() is None
    os.utime(note, (0, time.time() - 25 * 3600))
    assert machine.start() and machine.compiled == 2


@pytest.mark.parametrize("why", ["not writable", "not executable"])
def test_where_the_cache_cannot_be_used_the_temporary_folder_is(
    machine: Machine, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start compiled again, and said that this was "once"; from a noexec folder nothing could be loaded."""
    if why == "not writable":
        machine.cache.touch()
    else:
        true = os.statvfs

        def statvfs(path: Path) -> os.statvfs_result:
            values = list(true(path))
            values[8] |= os.ST_NOEXEC * (machine.cache in Path(path).parents)
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", statvfs)
    assert machine.start() and machine.start() and machine.compiled == 1
    assert len(list(machine.shared.glob("*.so"))) == 1 and machine.shared.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open to all", "a link"])
def test_a_library_is_not_taken_from_a_folder_that_others_can_write(
    machine: Machine, trap: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cache.touch()
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        machine.shared.symlink_to(tmp_path / "elsewhere")
    else:
        machine.shared.mkdir()
        machine.shared.chmod(0o777)
    assert machine.start() is None and machine.compiled == 0
    assert "name one in XDG_CACHE_HOME" in caplog.text


def test_a_library_is_loaded_where_no_lock_can_be_had(machine: Machine) -> None:
    """As in an image of a container, which has the library and can only be read."""
    assert machine.start()
    (lock,) = machine.cache.glob("llama/*.lock")
    lock.unlink()
    lock.mkdir()
    assert machine.start() and machine.compiled == 1


def test_a_library_for_another_processor_is_one_of_its_own(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install(LIBRARY.format(""))
    assert machine.start()
    for _ in range(2):
        monkeypatch.setenv("LLAMA_KERNELS_ARCH", "armv8.2-a+dotprod")
        assert machine.start()
        monkeypatch.delenv("LLAMA_KERNELS_ARCH")
        assert machine.start()
    native, other = machine.calls.read_text().splitlines()
    assert "=native" in native and "-march=armv8.2-a+dotprod" in other
    assert len(list(machine.cache.glob("llama/*.so"))) == 2


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        (
            "echo 'error: bad value' >&2; exit 1",
            "for LLAMA_KERNELS_ARCH=haswel failed with exit code 1: error: bad value",
        ),
        (LIBRARY.format("nosuch"), "this processor has no nosuch, and LLAMA_KERNELS_ARCH=haswel uses them"),
    ],
    ids=["unknown", "beyond this one"],
)
def test_a_processor_that_this_is_not_is_told(
    machine: Machine, compiler: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Instructions that a processor does not have end the process by SIGILL."""
    if "nosuch" in compiler and not libraries.processor_flags():
        pytest.skip("this system does not say what its processor has")
    machine.install(compiler)
    monkeypatch.setenv("LLAMA_KERNELS_ARCH", "haswel")
    assert machine.start() is None
    (line,) = [record.getMessage() for record in caplog.records if "no CPU kernels" in record.getMessage()]
    assert why in line and "\n" not in line


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries for some of this processor's instructions, most of them, more than it has, and a damaged one."""
    flags = sorted(libraries.processor_flags())[:2]
    if len(flags) < 2:
        pytest.skip("this system does not say what its processor has")
    folder = tmp_path_factory.mktemp("prebuilt")
    for name, has in {"some": flags[:1], "most": flags, "more": [*flags, "nosuch"], "torn": flags}.items():
        code = f'extern "C" const char *instructions() {{ return "{" ".join(has)}"; }}'
        path = folder / f"kernels-{name}.so"
        command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input=code, text=True, check=True)
        if name != "torn":
            libraries.add_digest(path)
    return folder


@pytest.fixture
def prebuilt(machine: Machine, built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the libraries that came with the package."""
    monkeypatch.setattr(libraries, "PREBUILT", built)
    return built


@pytest.mark.parametrize(("arch", "chosen"), [("", "most"), ("some", "some"), ("more", None), ("torn", None)])
def test_without_a_compiler_a_library_that_came_with_the_package_is_taken(
    machine: Machine,
    prebuilt: Path,
    arch: str,
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That which uses most of what the processor has, or the one that the user names."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("LLAMA_KERNELS_ARCH", arch)
    found = machine.start()
    if chosen is None:
        assert found is None and "no CPU kernels" in caplog.text
    else:
        assert found is not None and found._name == str(prebuilt / f"kernels-{chosen}.so")
        assert f"came with the package for {chosen}: no C++ compiler (/nonexistent)" in caplog.text


def test_what_is_compiled_here_is_preferred(machine: Machine, prebuilt: Path) -> None:
    found = machine.start()
    assert found is not None and Path(found._name).is_relative_to(machine.cache)
