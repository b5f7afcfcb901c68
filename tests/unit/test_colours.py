"""Colours of probabilities: only where a terminal has them, and without a change of the text."""

from __future__ import annotations

import io
import math
import re

import pytest

from llama.cli.colours import SHADES, Colours, colour_depth
from llama.outputs import TokenEvent

CODES = re.compile(r"\x1b\[([\d;]*)m")
TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "depth"),
    [
        (TRUE_COLOUR, "true colour"),
        ({"TERM": "screen-256color"}, "256 colours"),
        ({"TERM": "xterm-direct"}, "true colour"),
        ({"WT_SESSION": "x"}, "true colour"),
        ({"TERM": "dumb"}, None),
        ({"TERM": "vt100"}, None),
        ({}, None),
        ({**TRUE_COLOUR, "NO_COLOR": "1"}, None),
        ({**TRUE_COLOUR, "NO_COLOR": ""}, "true colour"),
    ],
    ids=str,
)
def test_a_terminal_says_how_many_colours_it_has(environ: dict[str, str], depth: str | None) -> None:
    found, why_none = colour_depth(Screen(), environ)
    assert found == depth and (why_none == "") == (depth is not None)
    assert colour_depth(io.StringIO(), environ)[0] is None


@pytest.mark.parametrize("depth", ["256 colours", "true colour"])
def test_colours_change_no_character_and_end_before_a_line_does(depth: str) -> None:
    """A background that is on at a line's end fills the rest of the line in many terminals."""
    colours = Colours("256 colours" if depth == "256 colours" else "true colour")
    text = "two\n\nlines\n"
    painted = colours.paint(text, 0.05)
    assert CODES.sub("", painted) == text
    assert all(line == "" or line.endswith("\x1b[0m") for line in painted.split("\n"))
    assert colours.paint(text, 0.95) == text


def test_every_probability_has_a_shade_and_less_likely_ones_are_darker() -> None:
    """By luminance, as not every eye tells red from green."""

    def luminance(probability: float) -> float:
        codes = CODES.findall(Colours("true colour").paint("x", probability))
        if not codes:
            return 1.0
        red, green, blue = map(int, codes[0].split(";")[2:5])
        return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255

    assert [luminance(p) for p in (1.0, 0.7, 0.4, 0.2, 0.05, 0.0)] == sorted(
        {luminance(least) for least, *_ in SHADES}, reverse=True
    )
    assert len({luminance(least) for least, *_ in SHADES}) == len(SHADES)


def test_a_character_of_several_tokens_has_the_colour_of_the_least_likely() -> None:
    colours = Colours("256 colours")
    texts = [("", 0.01), ("é", 0.99), ("b", 0.99)]
    painted = [colours.of(TokenEvent(0, 5, text, math.log(p))) for text, p in texts]
    assert painted == ["", colours.paint("é", 0.01), "b"]
    assert painted[1] != "é"
    assert Colours(None).of(TokenEvent(0, 5, "c", math.log(0.01))) == "c"


def test_a_legend_names_every_shade() -> None:
    legend = CODES.sub("", Colours("true colour").legend())
    assert legend == Colours(None).legend()
    assert all(f" {name} " in legend for _, name, *_ in SHADES)
