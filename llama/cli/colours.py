"""Colours of a terminal that tell how likely tokens were: none where it is not known to have any."""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Mapping
from typing import TextIO

from llama.outputs import TokenEvent

# The least probability of a colour, its name, and background and text as (number among 256, red, green and blue).
# They become darker and darker, so that they differ for every eye; likely text is left as it is.
Shade = tuple[int, tuple[int, int, int]]
SHADES: list[tuple[float, str, Shade | None, Shade]] = [
    (0.9, "plain", None, (0, (0, 0, 0))),
    (0.6, "yellow", (229, (255, 243, 176)), (16, (0, 0, 0))),
    (0.3, "amber", (221, (255, 208, 92)), (16, (0, 0, 0))),
    (0.1, "orange", (208, (240, 136, 36)), (16, (0, 0, 0))),
    (0.02, "red", (160, (196, 30, 30)), (231, (255, 255, 255))),
    (0.0, "dark red", (88, (112, 8, 24)), (231, (255, 255, 255))),
]
Depth = typing.Literal["256 colours", "true colour"]


def colour_depth(stream: TextIO, environ: Mapping[str, str] = os.environ) -> tuple[Depth | None, str]:
    """Return how many colours may be written to a stream, or None and why there are none."""
    terminal = environ.get("TERM", "")
    if environ.get("NO_COLOR"):  # https://no-color.org: any value but an empty one
        return None, "NO_COLOR is set"
    if not stream.isatty():
        return None, "it is no terminal"
    if environ.get("COLORTERM") in ("truecolor", "24bit") or terminal.endswith("-direct") or "WT_SESSION" in environ:
        return "true colour", ""
    if "256color" in terminal:
        return "256 colours", ""
    return None, f"TERM is {terminal!r}, which does not say that it has 256"


class Colours:
    """Writes texts of tokens on a background that tells their probability."""

    def __init__(self, depth: Depth | None) -> None:
        self._depth = depth
        self._least = math.inf

    def of(self, event: TokenEvent) -> str:
        """Return the text of an event in the colour of the least likely token that it is of.

        A character of several tokens comes with the last of them. A score that is not known colours nothing.
        """
        if event.logprob is not None:
            self._least = min(self._least, math.exp(event.logprob))
        if not event.text:
            return ""
        probability, self._least = self._least, math.inf
        return self.paint(event.text, probability)

    def paint(self, text: str, probability: float) -> str:
        """Return a text on the background of a probability; line ends stay plain, as theirs is a line's rest."""
        background, ink = next(shade[2:] for shade in SHADES if probability >= shade[0])
        if background is None or self._depth is None:
            return text
        codes = f"{self._code(48, background)};{self._code(38, ink)}"
        return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def legend(self) -> str:
        """Return what the colours mean, in colours."""
        words = [self.paint(f" {name} ", least) + f" from {100 * least:.0f} %" for least, name, *_ in SHADES[:-1]]
        return f"probability of a token: {', '.join(words)}, {self.paint(f' {SHADES[-1][1]} ', 0)} below"

    def _code(self, what: int, shade: Shade) -> str:
        number, rgb = shade
        return f"{what};5;{number}" if self._depth == "256 colours" else f"{what};2;{';'.join(map(str, rgb))}"
