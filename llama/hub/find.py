"""From what a user gives to a path: a path as it is, or a model of that name, downloaded where it is not there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from llama.files import folder_listing
from llama.hub.cache import cached_repos
from llama.hub.demo import find_demo, get_demo, places
from llama.hub.download import fetch
from llama.hub.names import DEMO, names_model, parse_name


def local_path(text: str | os.PathLike[str], tokenizer_only: bool = False) -> str | os.PathLike[str]:
    """Return a path as it is, be there something or not, and for a model's name the path of its files on this disk.

    tokenizer_only: the files of its tokenizer are enough, and their folder is returned.
    Raise OSError or ValueError, of one line, where a model cannot be had.
    """
    if not names_model(text):
        return text
    if os.fspath(text) == DEMO:
        return local_demo()
    return _fetched(text, tokenizer_only)


def local_demo() -> Path:
    """Return the demo model's file, downloaded where it is not there."""
    found = find_demo()
    if found is None:
        found = places()[0]
        get_demo(found)
    return found


def _fetched(text: str | os.PathLike[str], tokenizer_only: bool) -> Path:
    name = parse_name(text)
    assert name is not None
    try:
        return fetch(name, tokenizer_only)
    except FileNotFoundError as error:  # it may be a mistyped path
        parent = Path(os.path.expanduser(text)).parent
        if parent.is_dir():
            raise FileNotFoundError(f"{error}; {parent} has {folder_listing(parent)}") from None
        raise


def meant(path: Path, names: Sequence[str] | None = None) -> str:
    """Return what a path that is not there may have been meant to be: the end of an error's line, or nothing.

    names: those of models; by default those in the hub's cache.
    """
    short = {name.partition("/")[2].lower(): name for name in (cached_repos() if names is None else names)}
    close = difflib.get_close_matches(path.name.lower(), [DEMO, *short], 1)
    if close:
        return f"; did you mean {short.get(close[0], close[0])}?"
    return "; a model of the hub is named org/name" if path.name == str(path) else ""
