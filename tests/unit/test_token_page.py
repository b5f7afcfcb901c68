"""The page of completions: all of their text and nothing else, whatever it is, and a file that is whole."""

from __future__ import annotations

import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llama.cli.shown_tokens import ShownToken, TokenNames, shown_tokens
from llama.cli.token_page import as_html, check_writable, percent, token_page, write_whole
from llama.outputs import TokenEvent
from llama.tokenizer import Tokenizer
from tests.checkpoints import write_byte_tokenizer

HOSTILE = [
    "</span></div><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "&lt;b&gt; &amp;amp;",
    "<!-- ",
    "  two  blanks \n\n\tand a tab",
    "né 🙂 你好 👩\u200d👩\u200d👧",
]


class Reader(HTMLParser):
    """Collects texts by the class of the element around them, without what is hidden inside it, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"prompt": [], "t": [], "a": []}
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "meta":
            return
        kind = (dict(attrs).get("class") or "").partition(" ")[0]
        self._open.append(kind)
        if kind in self.texts and "legend" not in self._open:
            self.texts[kind].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        kind = next((each for each in reversed(self._open) if each in self.texts), None)
        if kind is not None and "legend" not in self._open:
            self.texts[kind][-1] += data


def token(text: str, probability: float | None = 0.5) -> ShownToken:
    return ShownToken(text, text, probability, ((text, 0.5), ("<other>", 0.25)))


def test_a_page_has_prompts_and_tokens_as_they_are() -> None:
    """Whatever a model writes stays text: no tag, attribute or entity comes of it, and no blank is lost."""
    tokens = [token(text) for text in HOSTILE]
    page = token_page("</title><script>", {"stop": ("<i>",)}, HOSTILE[:2], [(tokens, "stop"), (tokens[::-1], None)] * 2)
    found = Reader(page)
    assert found.texts["prompt"] == HOSTILE[:2]
    assert found.texts["t"] == [*HOSTILE, *HOSTILE[::-1]] * 2
    assert found.tags == {
        *("html", "head", "meta", "title", "style", "body", "header", "h1", "p", "span"),
        *("main", "section", "h2", "div", "h3", "script"),
    }
    assert page.count("<script") == 1 and not any(name.startswith("on") for name in found.attributes)


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = token_page("model", {}, ["a"], [([token("b")], "stop")])
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", page)
    assert "default-src 'none'" in page


def test_a_token_shows_what_was_likely_in_its_place_and_itself() -> None:
    tokens = [
        ShownToken("b", "b", 0.004, (("a", 0.5), ("c", 0.25))),
        ShownToken("", "\\xf0\\x9f", 0.5, (("\\xf0\\x9f", 0.5),)),
        ShownToken("", "<|im_end|>", None, (), is_control=True),
    ]
    found = Reader(token_page("model", {}, ["a"], [(tokens, "stop")]))
    assert found.texts["t"] == ["b", "\\xf0\\x9f", "<|im_end|>"]
    assert found.texts["a"] == ["a50 %c25 %b0.40 %", "\\xf0\\x9f50 %", "no probability is known"]


def test_what_cannot_be_shown_is_named() -> None:
    r"""\x1b is no character of HTML, and a lone surrogate none of UTF-8, so that the page could not be written."""
    assert as_html("a\x1b[0m\u202e\ud800") == (
        'a<span class="u">U+001B</span>[0m<span class="u">U+202E</span><span class="u">U+D800</span>'
    )
    assert as_html(" ") == '<span class="s"> </span>' and as_html(" a b") == " a b"


def test_percentages_have_two_digits() -> None:
    numbers = [1, 0.996, 0.5, 0.0995, 0.0949, 0.01, 0.0094, 0.0001, 0.00009, 0]
    assert [percent(p) for p in numbers] == [
        *("100 %", "100 %", "50 %", "10 %", "9.5 %", "1.0 %", "0.94 %", "0.01 %", "< 0.01 %", "< 0.01 %")
    ]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_byte_tokenizer(tmp_path))


def test_tokens_have_their_own_texts_where_events_give_them_late(tokenizer: Tokenizer) -> None:
    """What may begin a stop string is held back, and comes with a later token or, where it was one, never."""
    names = TokenNames(tokenizer)
    scored = [(ord("a"), "a"), (ord("."), ""), (ord("b"), ".b"), (ord("."), ""), (ord("."), "")]
    events = [TokenEvent(0, each, text, math.log(0.5), None, ((ord("x"), math.log(0.25)),)) for each, text in scored]
    events.append(TokenEvent(0, None, "", None, "stop"))
    shown = shown_tokens(events, tokenizer, names, add_prefix_space=True)
    assert [(each.text, each.name) for each in shown] == [("a", "a"), (".", "."), ("b", "b"), ("", "."), ("", ".")]
    assert shown[0].probability == pytest.approx(0.5)
    assert [(name, round(p, 6)) for name, p in shown[0].alternatives] == [("x", 0.25)]


def test_bytes_and_control_tokens_have_names(tokenizer: Tokenizer) -> None:
    """A character of several tokens belongs to the last of them; what is left of one is U+FFFD."""
    control = tokenizer.special_tokens["<|end_of_text|>"]
    ids = [*"é".encode(), control, "é".encode()[0]]
    texts = ["", "é", "", ""]
    events = [TokenEvent(0, each, text) for each, text in zip(ids, texts, strict=True)]
    events.append(TokenEvent(0, None, "\ufffd", None, "length"))
    shown = shown_tokens(events, tokenizer, TokenNames(tokenizer), add_prefix_space=True)
    assert [(each.text, each.name, each.is_control) for each in shown] == [
        ("", "\\xc3", False),
        ("é", "\\xa9", False),
        ("", "<|end_of_text|>", True),
        ("\ufffd", "\\xc3", False),
    ]
    assert TokenNames(tokenizer)(tokenizer.n_words + 3) == f"<{tokenizer.n_words + 3}>"
    assert shown_tokens(events[-1:], tokenizer, TokenNames(tokenizer), add_prefix_space=True) == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(page, "new \ud800")
    assert page.read_text() == "before" and os.listdir(tmp_path) == ["page.html"]
    link = tmp_path / "link.html"
    link.symlink_to(page)
    write_whole(link, "é\n")
    assert page.read_bytes() == "é\n".encode() and link.is_symlink()


def test_a_path_that_no_page_can_have_is_told(tmp_path: Path) -> None:
    """It was told after the run."""
    (tmp_path / "file").touch()
    for path, error in [
        (tmp_path, "is a folder: give the path of a file"),
        (tmp_path / "none" / "page.html", "there is no folder .*none: make it"),
        (tmp_path / "file" / "page.html", "there is no folder"),
        (Path("/dev/null"), "is no regular file"),
        (tmp_path / ("x" * 300), r"cannot be written \(File name too long\): give another path"),
    ]:
        with pytest.raises((ValueError, OSError), match=error):
            check_writable(path)
    check_writable(tmp_path / "page.html")
    assert os.listdir(tmp_path) == ["file"]
