"""DRY's search: which tokens would go on with a passage that the text repeats at its end, and how long that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from llama.sampling.params import SamplingParams

# The bound of a search: a passage is followed back for so many tokens, at so many of its last places.
LONGEST_PASSAGE = 128
MOST_PLACES = 128


class RepeatedPassages:
    """The text's passages of dry_allowed_length tokens, by what they are, and the penalties of what came after them.

    A token ends all passages where a breaker ends in it: in the bytes of the tokens up to it, so that a breaker may be
    spread over several. What repeats is counted from the token after it.
    """

    def __init__(self, params: SamplingParams, token_bytes: Callable[[int], bytes]) -> None:
        self._params, self._token_bytes = params, token_bytes
        self._breakers = [each.encode() for each in params.dry_breakers]
        self._tail = max(map(len, self._breakers), default=0) - 1  # bytes of a breaker that earlier tokens may have
        self._text: list[int] = []
        self._unbroken: list[int] = []  # how many tokens up to each have no breaker
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # where each passage ends
        # A float's exponent has an end: llama.cpp's bound.
        base = params.dry_base
        self._most = int(88.7228391 / math.log(base)) if base > 1.000001 else 0

    def push(self, token: int) -> None:
        """Add a token to the text's end."""
        self._unbroken.append(0 if self._ends_breaker(token) else (self._unbroken[-1] if self._unbroken else 0) + 1)
        self._text.append(token)
        if (passage := self._passage()) is not None:
            self._places[passage].append(len(self._text) - 1)

    def pop(self) -> None:
        """Take the last token back."""
        if (passage := self._passage()) is not None:
            self._places[passage].pop()
            if not self._places[passage]:
                del self._places[passage]
        self._text.pop()
        self._unbroken.pop()

    def penalties(self) -> dict[int, float]:
        """Return what is subtracted from the logits of tokens that would repeat too much."""
        passage, params, text = self._passage(), self._params, self._text
        if passage is None:
            return {}
        window = 0 if params.dry_last_n is None else max(0, len(text) - params.dry_last_n)
        limit = min(self._unbroken[-1], LONGEST_PASSAGE)
        last, lengths = len(text) - 1, dict[int, int]()
        for end in self._places[passage][-2 : -MOST_PLACES - 2 : -1]:  # the last is the text's end itself
            most = min(limit, self._unbroken[end], end - window + 1)
            if most < len(passage):
                break
            length = len(passage)
            while length < most and text[end - length] == text[last - length]:
                length += 1
            token = text[end + 1]
            lengths[token] = max(length, lengths.get(token, 0))
        return {token: self._penalty(length) for token, length in lengths.items()}

    def _penalty(self, length: int) -> float:
        power = length - self._params.dry_allowed_length
        return self._params.dry_multiplier * self._params.dry_base ** (min(power, self._most) if self._most else power)

    def _passage(self) -> tuple[int, ...] | None:
        """Return the text's last dry_allowed_length tokens, if they are without a breaker."""
        length = self._params.dry_allowed_length
        if not self._unbroken or self._unbroken[-1] < length:
            return None
        return tuple(self._text[-length:])

    def _ends_breaker(self, token: int) -> bool:
        piece, before = self._token_bytes(token), b""
        for earlier in reversed(self._text):
            if len(before) >= self._tail:
                break
            before = self._token_bytes(earlier) + before
        text = before + piece
        return any(text.find(each, max(0, len(before) - len(each) + 1)) >= 0 for each in self._breakers)
