"""The line that tells a user's error: one line for a terminal, whatever a file made it quote."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from llama.errors import MAX_MESSAGE_CHARS, in_one_line, one_line
from tests.checkpoints import write_meta
from tests.models import build


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    """A value of a file once came out as it was: 100,000 characters, or escapes that recolour a terminal."""
    assert one_line("a\n  b\u2028c") == "a b c"
    assert one_line("dim is '\x1b[31m\ud800é'") == r"dim is '\x1b[31m\ud800é'"
    line = one_line("start " + "x" * 10**6 + " end")
    assert line.startswith("start xxx") and line.endswith("xxx end") and " ... " in line
    assert len(line) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize("error", [OSError(36, "File name too long", "x" * 2000), ValueError("x" * 2000)])
def test_an_error_stays_of_its_kind(error: Exception) -> None:
    cut = in_one_line(error)
    assert type(cut) is type(error) and len(str(cut)) == MAX_MESSAGE_CHARS
    assert in_one_line(cut) is cut


def test_an_error_that_is_made_of_more_than_a_message_can_be_sent_to_other_ranks() -> None:
    """A JSONDecodeError cannot be unpickled, so the ranks that were to be told of it failed themselves."""
    cut = in_one_line(json.JSONDecodeError("\x1b", "", 0))
    assert str(pickle.loads(pickle.dumps(cut))) == str(cut)


def test_a_build_cuts_what_it_quotes_from_a_file(tmp_path: Path) -> None:
    write_meta(tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": "x" * 10**5}))
    with pytest.raises(ValueError, match=r"params\.json: norm_eps must be a positive number") as caught:
        build(tmp_path)
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARS
