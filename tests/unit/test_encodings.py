"""Texts are UTF-8 whatever the locale says, but for a terminal's own encoding and what the user names."""

from __future__ import annotations

import io
import sys

import pytest

from llama.cli.runner import use_utf_8

TEXT = "“café” → 日本\n"


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", [io.BytesIO, Terminal])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("named", [None, "cp1252"])
def test_what_is_printed_is_utf_8(
    name: str, kind: type[io.BytesIO], encoding: str, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file on Windows got its old code page, and results were lost at the first character that this lacks."""
    if named is None:
        monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    else:
        monkeypatch.setenv("PYTHONIOENCODING", named)
    raw = kind()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
    use_utf_8()
    print(TEXT, end="", file=getattr(sys, name), flush=True)
    is_old = encoding == "cp1252" and (kind is Terminal or named is not None)
    assert raw.getvalue() == (TEXT.encode("cp1252", "backslashreplace") if is_old else TEXT.encode())


def test_what_is_read_keeps_its_encoding_unless_that_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", "utf-8"), ("cp1252", "cp1252"), ("utf-8", "utf-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        use_utf_8()
        assert (sys.stdin.encoding, sys.stdin.errors) == (expected, "strict")
