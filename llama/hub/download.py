"""Download the files of a model into the hub's cache: what an interrupted download has stays, and the next goes on."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from llama.hub.cache import COMMIT, add_to_snapshot, cache_folder, find_cached, repo_folder, set_reference
from llama.hub.choice import choose, choose_tokenizer
from llama.hub.messages import OFFLINE, endpoint, megabytes, told, unreachable
from llama.hub.names import ModelName

log = logging.getLogger("llama")
_progress = logging.getLogger("llama.progress")

AT_ONCE = 8  # files; a connection each
# Seconds to wait before a connection that broke is made again; one that brings bytes counts from the first again.
WAITS = (0, 1, 2, 4, 8, 16)
SECONDS_TO_LOOK = 0.2
# Threads that wait for a server are left to themselves after that.
SECONDS_TO_STOP = 2.0
# Where there is no terminal to show progress on, a line of it comes as often.
SECONDS_TO_LOG = 60.0
READ_AT_ONCE = 1 << 20  # bytes
CONTENT_DIGESTS = {40: "sha1", 64: "sha256"}  # by the length of an ETag: of a file in git, and of a large one


@dataclass(frozen=True)
class _File:
    """A file of a repository; etag and size are None where the server does not say."""

    path: str
    size: int | None
    etag: str | None


def fetch(name: ModelName, tokenizer_only: bool = False) -> Path:
    """Return the path of a model, or of its tokenizer's folder, in the cache, once all of it is there.

    The hub is asked what the revision is now, unless that is a commit. Where it does not answer, a complete copy in the
    cache is used, and a line says so. Raise OSError or ValueError, of one line, where there is no model to be had.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        try:
            return find_cached(name, tokenizer_only)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{OFFLINE}, and {error}: unset it to download") from None
    if COMMIT.fullmatch(name.revision):
        try:
            return find_cached(name, tokenizer_only)
        except FileNotFoundError:
            pass
    try:
        with told(name):
            commit, files = _listing(name)
    except OSError as error:
        try:
            found = find_cached(name, tokenizer_only)
        except FileNotFoundError as missing:
            if not isinstance(error, ConnectionError):
                raise error from None
            fix = "check the network and its proxy, or HF_ENDPOINT, or give a path"
            raise ConnectionError(f"{error}, and {missing}: {fix}") from None
        log.warning("%s: the copy in the cache is used, %s", error, found)
        return found
    choice = (choose_tokenizer if tokenizer_only else choose)(name, [file.path for file in files])
    with told(name):
        _have([file for file in files if file.path in choice.files], name, commit)
    set_reference(name, commit)
    return repo_folder(name.repo) / "snapshots" / commit / choice.opened


def _listing(name: ModelName) -> tuple[str, list[_File]]:
    """Ask the hub for the commit of a revision, and for its files."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=endpoint(), library_name="llama-torchrun")
    info = api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = []
    for each in info.siblings or ():
        size, etag = (each.size, each.blob_id) if each.lfs is None else (each.lfs.size, each.lfs.sha256)
        files.append(_File(each.rfilename, size, etag))
    assert info.sha is not None
    return info.sha, files


def _have(files: Sequence[_File], name: ModelName, commit: str) -> None:
    """Make sure that files are in the snapshot of a commit."""
    folder = repo_folder(name.repo)
    wanted = []
    for file in files:
        blob = folder / "blobs" / (file.etag or "unknown")
        if (folder / "snapshots" / commit / file.path).exists():
            continue
        if blob.exists():
            add_to_snapshot(name.repo, commit, file.path, blob)
        else:
            wanted.append(file)
    if not wanted:
        return
    _check_room(wanted, folder, name)
    download = _Download(name, commit, wanted)
    log.warning("downloading %s to %s: %s", name, cache_folder(), download.amount())  # a script shows warnings alone
    started = time.monotonic()
    download.run()
    log.info("downloaded %s in %.0f s", name, time.monotonic() - started)


def _check_room(files: Sequence[_File], folder: Path, name: ModelName) -> None:
    """Raise OSError where the cache's disk has no room for what is missing, as far as sizes are known."""
    try:
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "name a folder that you may write to by HF_HOME"
        raise PermissionError(f"cannot write to the cache {cache_folder()} ({error.strerror}): {fix}") from None
    needed = sum((file.size or 0) - _bytes_there(folder, file) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{name} needs {megabytes(needed)}, and the disk of {cache_folder()} has {megabytes(free)} free: make room "
            "(llama list, llama rm), or name a folder on another disk by HF_HOME"
        )


def _bytes_there(folder: Path, file: _File) -> int:
    part = _incomplete(folder, file)
    return part.stat().st_size if part.exists() else 0


def _incomplete(folder: Path, file: _File) -> Path:
    return folder / "blobs" / f"{file.etag}.incomplete"


class _Download:
    """Files on their way, some at once, each by a thread that ends when an error or Ctrl-C has ended the download."""

    def __init__(self, name: ModelName, commit: str, files: Sequence[_File]) -> None:
        self._name, self._commit = name, commit
        self._folder = repo_folder(name.repo)
        self._files = files
        self._total = sum(file.size or 0 for file in files)
        self._received = 0  # of the total, in this run and before
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._shown = 0.0  # when it was last logged
        for file in files:
            self._received += _bytes_there(self._folder, file)

    def amount(self) -> str:
        """Say how much there is to download, and how much of it is there."""
        size = f", {megabytes(self._total)}" if self._total else ""
        there = f", of which {megabytes(self._received)} are there" if self._received else ""
        return f"{len(self._files)} file{'s' * (len(self._files) > 1)}{size}{there}"

    def run(self) -> None:
        """Download all files; raise the first error of any."""
        to_do: queue.SimpleQueue[_File] = queue.SimpleQueue()
        for file in sorted(self._files, key=lambda file: file.size or 0):  # what is refused is refused soon
            to_do.put(file)
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        n_threads = min(AT_ONCE, len(self._files))
        threads = [threading.Thread(target=self._work, args=(to_do, done), daemon=True) for _ in range(n_threads)]
        for thread in threads:
            thread.start()
        started, already = time.monotonic(), self._received
        try:
            while n_threads:
                try:
                    error = done.get(timeout=SECONDS_TO_LOOK)
                    n_threads -= 1
                except queue.Empty:
                    error = None
                if error is not None:
                    raise error
                self._show(time.monotonic() - started, already)
        except (KeyboardInterrupt, SystemExit):
            log.info("what has come of %s stays, and the next download of it goes on from there", self._name)
            raise
        finally:
            self._stop.set()
            deadline = time.monotonic() + SECONDS_TO_STOP
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, to_do: queue.SimpleQueue[_File], done: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            while not self._stop.is_set():
                try:
                    file = to_do.get_nowait()
                except queue.Empty:
                    break
                self._fetch(file)
            done.put(None)
        except BaseException as error:
            done.put(error)

    def _show(self, seconds: float, already: int) -> None:
        stage = str(self._name).replace("%", "%%")
        rate = (self._received - already) / max(seconds, 1e-3)
        left = (self._total - self._received) / rate if rate else 0
        words = megabytes(self._received), megabytes(self._total), rate / 1e6, int(left) // 60, int(left) % 60
        _progress.debug(f"downloading {stage}: %s of %s, %.1f MB/s, %d:%02d left", *words)
        if not _progress.isEnabledFor(logging.DEBUG) and seconds - self._shown > SECONDS_TO_LOG:
            self._shown = seconds
            log.info("downloading %s: %s of %s, %.1f MB/s, %d:%02d left", self._name, *words)

    def _fetch(self, file: _File) -> None:
        """Have one file in the snapshot."""
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not listed

        if file.etag is None or file.size is None or file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            # It asks for what the listing does not say, and may have other ways for what is too large for this one.
            hf_hub_download(self._name.repo, file.path, revision=self._commit, endpoint=endpoint())
            return
        blob = self._folder / "blobs" / file.etag
        lock = self._folder.parent / ".locks" / self._folder.name / f"{file.etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # of all that use the cache
            if not blob.exists():
                part = _incomplete(self._folder, file)
                try:
                    with part.open("ab") as output:
                        self._receive(file, file.size, output)
                finally:
                    if part.stat().st_size == 0 < file.size:
                        part.unlink()
                if not part.exists() or part.stat().st_size < file.size:  # stopped
                    return
                self._check(file, part)
                os.replace(part, blob)
            add_to_snapshot(self._name.repo, self._commit, file.path, blob)

    def _receive(self, file: _File, size: int, output: BinaryIO) -> None:
        """Append what is missing of a file, by as many connections as it takes."""
        from huggingface_hub import errors

        from llama.hub.messages import http_error

        failures = 0
        while (have := output.tell()) < size and not self._stop.is_set():
            cause = "the connection ended early"
            try:
                self._receive_once(file, output)
            except errors.HfHubHTTPError as error:
                if error.response.status_code < 500 and error.response.status_code != 429:
                    raise
                cause = f"answer {error.response.status_code}"
            except http_error() as error:
                cause = str(error) or type(error).__name__
            failures = 0 if output.tell() > have else failures + 1
            if output.tell() < size and not self._stop.is_set():
                if failures == len(WAITS):
                    raise ConnectionError(
                        f"{unreachable(OSError(cause))} for {file.path} of {self._name}: check the network and run "
                        "this again, which goes on from there"
                    )
                if WAITS[failures]:
                    log.info("%s: %s; trying again in %d s", file.path, cause, WAITS[failures])
                self._stop.wait(WAITS[failures])

    def _receive_once(self, file: _File, output: BinaryIO) -> None:
        """Append what one connection brings; a server that knows no ranges begins anew."""
        from huggingface_hub import constants, get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # not listed

        url = f"{endpoint()}/{self._name.repo}/resolve/{self._commit}/{quote(file.path)}"
        headers = {**build_hf_headers(library_name="llama-torchrun"), "Accept-Encoding": "identity"}
        have = output.tell()
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:
                output.truncate(0)
                output.seek(0)
                self._add(-have)
            for data in response.iter_raw():
                output.write(data)
                self._add(len(data))
                if self._stop.is_set():
                    return

    def _add(self, n_bytes: int) -> None:
        with self._lock:
            self._received += n_bytes

    def _check(self, file: _File, part: Path) -> None:
        """Raise OSError, and remove the file, where it is not what the hub lists."""
        assert file.etag is not None
        digest: Any = hashlib.new(CONTENT_DIGESTS.get(len(file.etag), "sha1"), usedforsecurity=False)
        if len(file.etag) == 40:
            digest.update(b"blob %d\0" % part.stat().st_size)
        with part.open("rb") as content:
            while data := content.read(READ_AT_ONCE):
                digest.update(data)
        if len(file.etag) in CONTENT_DIGESTS and digest.hexdigest() != file.etag:
            part.unlink()
            raise OSError(f"{file.path} of {self._name} came damaged, with another digest than listed: run this again")
