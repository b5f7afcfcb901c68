"""A conversation that outlives the program: `--session FILE` has its messages, and FILE.rank0 and so on its cache.

The messages are written after each answer. The pages of the cache, which may be gigabytes, are written when the chat
ends, and before when there is much that a killed program would have to read again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from llama.chat.dialog import Message
from llama.cli.conversation import Conversation
from llama.cli.runner import is_first_rank
from llama.distributed.job import agree, from_all_ranks, from_first_rank, join_job
from llama.engine.options import BuildOptions
from llama.engine.page_pool import common_prefix_len
from llama.engine.session_file import StoredPages, digest_of, model_identity, new_file, write_pages
from llama.files import lock

log = logging.getLogger("llama")

SESSION_FORMAT = "llama session 1"
# The pages are written where more than this part of their text is new, so that all writing together stays small.
NEW_PART = 1 / 4


@dataclass
class Session:
    """The files of a session, which are right for the model that will run.

    Args:
        path: the first file; the others lie beside it.
        identity: the model's.
        messages: what was said before.
        n_forgotten: how many of them, but for the system prompt, the model no longer gets.
        pages: what this rank has stored of the cache.
    """

    path: Path
    identity: dict[str, str]
    messages: list[Message] = field(default_factory=list)
    n_forgotten: int = 0
    pages: StoredPages | None = None
    _stored: list[int] = field(default_factory=list)  # the text whose pages were written last
    _lock: IO[bytes] | None = None  # a file beside it, as the first one is replaced

    @staticmethod
    def open(path: Path, options: BuildOptions) -> Session:
        """Read the files of a session, where there are any, before weights are read.

        Raises ValueError or OSError, on every rank, where a file is torn, of another model, or no session's.
        """
        join_job(options.timeout)
        with agree():
            identity = model_identity(options)
            session = Session(path, identity)
            if is_first_rank():
                if not path.parent.is_dir():
                    raise FileNotFoundError(f"--session {path} lies in no folder: make {path.parent}")
                session._take()
                try:
                    if path.exists():
                        session._read()
                except BaseException:
                    session._release()
                    raise
            if session._pages_file.exists():
                session.pages = StoredPages.open(session._pages_file)
                if session.pages.mark != digest_of(identity):
                    raise ValueError(f"{session._pages_file} is of another model: remove it, or name another --session")
        session.messages, session.n_forgotten = from_first_rank((session.messages, session.n_forgotten))
        return session

    def restore(self, chat: Conversation) -> None:
        """Have a conversation go on where it was, and the engine find what it had computed."""
        if self.messages:
            system = chat.system
            chat.replace(self.messages, self.n_forgotten)
            chat.system = chat.system if system is None else system
        stored = self.pages if self.pages is not None and self.pages.fits(chat.llm.engine) else None
        texts = from_all_ranks(stored.tokens if stored is not None else [])
        n_tokens = 0
        if stored is not None and all(text == stored.tokens for text in texts):
            n_tokens = stored.restore(chat.llm.engine)
            chat.tokens = self._stored = stored.tokens
        log.info(
            "session %s: %s%s",
            self.path,
            f"{len(self.messages)} messages" if self.messages else "new",
            f", {n_tokens} tokens of its cache{_size(self._pages_file)}" if n_tokens else "",
        )

    def save(self, chat: Conversation, is_last: bool = False) -> None:
        """Write the messages, and the pages where it is time; every rank its own."""
        with agree():
            if is_first_rank():
                content = {
                    "format": SESSION_FORMAT,
                    "model": self.identity,
                    "messages": chat.messages,
                    "n_forgotten": chat.n_forgotten,
                }
                with new_file(self.path) as file:
                    file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
            n_new = len(chat.tokens) - common_prefix_len(chat.tokens, self._stored)
            if n_new and (is_last or n_new > NEW_PART * len(self._stored)):
                write_pages(self._pages_file, chat.llm.engine, chat.tokens, digest_of(self.identity))
                self._stored = chat.tokens
        if is_last:
            self._release()
            log.info("session %s: %d messages%s", self.path, len(chat.messages), _size(self._pages_file))

    @property
    def _pages_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{dist.get_rank()}")

    def _take(self) -> None:
        """Make sure that no other chat writes to these files until this one ends; ValueError where one does."""
        self._lock = self.path.with_name(f".{self.path.name}.lock").open("ab")
        if not lock(self._lock.fileno()):
            raise ValueError(f"another chat has --session {self.path}: end it first, or name another file")

    def _release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # Windows removes no open file
                os.unlink(self._lock.name)
            self._lock.close()
            self._lock = None

    def _read(self) -> None:
        """Take over what the first file says; ValueError where it is no session, or of another model."""
        what = f"{self.path} is torn, or no session of llama chat: it was not changed; name another --session"
        if not self.path.is_file():
            raise ValueError(what)
        try:
            content: dict[str, Any] = json.loads(self.path.read_bytes())
            is_right = content["format"] == SESSION_FORMAT and isinstance(content["n_forgotten"], int)
            model, messages = dict(content["model"]), list(content["messages"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(what) from None
        if not is_right or not all(_is_message(each) for each in messages):
            raise ValueError(what)
        for name in {**self.identity, **model}:
            ours, theirs = self.identity.get(name, "the default"), model.get(name, "the default")
            if ours != theirs:
                raise ValueError(
                    f"--session {self.path} is of another model ({name}: {_differing(theirs, ours)}, and here "
                    f"{_differing(ours, theirs)}): name another file, or the model that it was made with"
                )
        self.messages, self.n_forgotten = messages, content["n_forgotten"]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _differing(text: str, other: str) -> str:
    """Return what a description has that another one has not, as an architecture is long."""
    parts = [part for part in text.split(", ") if part not in other.split(", ")]
    return ", ".join(parts[:3]) or text


def _size(path: Path) -> str:
    """Return the size of a file for people, after a comma; nothing where it does not exist."""
    return f", {path.stat().st_size / 1e6:.1f} MB in {path}" if path.exists() else ""
