"""A small server that speaks the hub's protocol: listings, files behind a redirect, ranges, refusals, broken lines."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

LARGE = 4096  # bytes, from which on a file is not in git
SENT_AT_ONCE = 2048
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """A hub in a thread of this process, while the block lasts.

    repos: files by path, of each repository.
    gated, private: repositories whose files, or that, need `token`.
    cut: after how many bytes the connection breaks, once, by path.
    tags: other revisions than main and the commit, by repository.
    claimed: sizes that the listing tells in place of the real ones, by path.
    tells_sizes: whether the listing has sizes and digests; some mirrors have none.
    answers: status codes to give next in place of large files; 0 is none.
    sent: bytes that were sent of each path. requests: how often which method and path was asked for.
    """

    token = "hf_right"

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repos = {name: dict(files) for name, files in repos.items()}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.cut: dict[str, int] = {}
        self.tags: dict[str, str] = {}
        self.claimed: dict[str, int] = {}
        self.answers: list[int] = []
        self.knows_ranges = self.tells_sizes = True
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str) -> str:
        files = self.repos[repo]
        return hashlib.sha1("".join(f"{path} {etag_of(files[path])}" for path in sorted(files)).encode()).hexdigest()


def etag_of(content: bytes) -> str:
    """What the hub calls a content by: git's own hash, or for large files sha256."""
    if len(content) < LARGE:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests[f"{self.command} {url.path}"] += 1
        found = API.fullmatch(url.path) or RESOLVE.fullmatch(url.path)
        if url.path.startswith("/large/") and self.hub.answers and (code := self.hub.answers.pop(0)):
            self._refuse(code, None, "not now")
            return
        if url.path.startswith("/large/") and self.headers.get("Authorization"):
            self._refuse(400, None, "a token that was not meant for this host")
            return
        if url.path.startswith("/large/"):
            self._send_content(parse_qs(url.query)["path"][0], self._content_of(url.path.removeprefix("/large/")))
            return
        repo = found[1] if found else ""
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {self.hub.token}"):
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif repo not in self.hub.repos or (repo in self.hub.private and not token):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif found and (found[2] or "main") not in ("main", self.hub.commit(repo), self.hub.tags.get(repo)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {found[2]}")
        elif found and found.re is API:
            self._send_listing(repo)
        elif repo in self.hub.gated and not token:
            self._refuse(401, "GatedRepo", "Access to this model is restricted")
        elif found and found[3] not in self.hub.repos[repo]:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif found:
            self._send_file(repo, found[3])

    def _send_listing(self, repo: str) -> None:
        siblings: list[dict[str, Any]] = []
        for path, content in self.hub.repos[repo].items():
            if not self.hub.tells_sizes:
                siblings.append({"rfilename": path})
                continue
            size = self.hub.claimed.get(path, len(content))
            each: dict[str, Any] = {"rfilename": path, "size": size, "blobId": etag_of(content)}
            if len(content) >= LARGE:
                each |= {"lfs": {"sha256": etag_of(content), "size": size, "pointerSize": 130}}
            siblings.append(each)
        listing = {"id": repo, "sha": self.hub.commit(repo), "private": False, "siblings": siblings, "tags": []}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def _send_file(self, repo: str, path: str) -> None:
        content = self.hub.repos[repo][path]
        about = {"X-Repo-Commit": self.hub.commit(repo), "ETag": f'"{etag_of(content)}"'}
        if len(content) < LARGE:
            self._send_content(path, content, about)
            return
        linked = {"X-Linked-Etag": f'"{etag_of(content)}"', "X-Linked-Size": str(len(content))}
        # Another host, as the hub's own stores are, which is not to see a token.
        address = self.hub.address.replace("127.0.0.1", "localhost")
        location = f"{address}/large/{etag_of(content)}?path={path}"
        self._answer(302, {**about, **linked, "Location": location}, b"")

    def _content_of(self, etag: str) -> bytes:
        contents = (content for files in self.hub.repos.values() for content in files.values())
        return next(content for content in contents if etag_of(content) == etag)

    def _send_content(self, path: str, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(start[1]) if start and self.hub.knows_ranges else 0
        headers = {**(headers or {}), "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        body = content[begin:] if self.command == "GET" else b""
        self._answer(206 if begin else 200, headers, body, len(content) - begin, path)

    def _refuse(self, code: int, error: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": error} if error else {})
        self._answer(code, headers, json.dumps({"error": message}).encode())

    def _answer(
        self, code: int, headers: Mapping[str, str], body: bytes, length: int | None = None, path: str = ""
    ) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), SENT_AT_ONCE):
            piece = body[start : start + SENT_AT_ONCE]
            if path in self.hub.cut and start + len(piece) > self.hub.cut[path]:
                self.wfile.write(piece[: self.hub.cut[path] - start])
                self.hub.sent[path] += self.hub.cut.pop(path) - start
                self.close_connection = True
                return
            self.wfile.write(piece)
            self.hub.sent[path] += len(piece)
