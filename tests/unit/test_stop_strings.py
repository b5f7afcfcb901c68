"""Stop strings end a text wherever tokens cut them, and nothing of one is ever shown."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from llama import Llama
from llama.tokenizer import CompletionText, StreamDecoder
from tests.models import BYTE_EOS

CONTROL = 300


class Bytes:
    """A vocabulary whose tokens are the bytes of their ids."""

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        return bytes([token])


def shown(text: str, stops: list[str]) -> tuple[str, bool, list[str]]:
    """What a text in bytes becomes, whether it was stopped, and what was there after each byte."""
    completion, so_far, states = CompletionText(StreamDecoder(Bytes()), {CONTROL}, stops), "", []
    for byte in text.encode():
        piece, is_stopped = completion.push(byte)
        so_far += piece
        states.append(so_far)
        if is_stopped:
            return so_far, True, states
    return so_far + completion.end(), False, states


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one.two", ["."], "one"),
        ("one\n\nUser: two", ["\nUser:", "\nBot:"], "one\n"),
        ("aaab", ["aab"], "a"),  # what began one is part of the next
        ("ababac", ["abac"], "ab"),
        ("é·é", ["·é"], "é"),
        ("abc", ["bc", "abcd", "b"], "a"),  # the first in the text, however long
        ("abc", ["abcd"], "abc"),  # shown at the end, as no more comes
        ("abc", ["x"], "abc"),
    ],
)
def test_a_text_ends_where_a_stop_string_begins(text: str, stops: list[str], expected: str) -> None:
    found, is_stopped, states = shown(text, stops)
    assert found == expected
    assert is_stopped == any(stop in text for stop in stops)
    assert all(expected.startswith(state) for state in states)


def test_no_part_of_a_stop_string_is_shown_and_nothing_else_is_held_back() -> None:
    """Against the first match in the whole text; what is held back is never longer than a stop string."""
    choose = random.Random(0)
    for _ in range(500):
        text = "".join(choose.choices("ab", k=12))
        stops = ["".join(choose.choices("ab", k=choose.randint(1, 4))) for _ in range(2)]
        found, is_stopped, states = shown(text, stops)
        ends = [
            (text[: i + 1].index(stop), i)
            for i, stop in itertools.product(range(len(text)), stops)
            if stop in text[: i + 1]
        ]
        first_byte = min((i for _, i in ends), default=None)
        assert found == (text if first_byte is None else text[: min(at for at, i in ends if i == first_byte)])
        assert is_stopped == (first_byte is not None)
        for i, state in enumerate(states[: len(text) if first_byte is None else first_byte]):
            assert i + 1 - len(state) < max(map(len, stops))


def test_a_restarted_text_goes_on_as_if_nothing_had_happened() -> None:
    """After an interrupt the tokens that were told are pushed again."""
    completion = CompletionText(StreamDecoder(Bytes()), {CONTROL}, ["stop"])
    for byte in b"a ste":
        completion.push(byte)
    completion.restart(b"prompt ", b"a st")
    assert [completion.push(byte) for byte in b"op"] == [("", False), ("", True)]


def text_of(llm: Llama, prompt: list[int], **options: Any) -> tuple[str, str | None, int]:
    events = list(llm.stream([prompt], 24, 0, **options))
    return "".join(event.text for event in events), events[-1].finish_reason, len(events) - 1


def test_a_completion_ends_before_its_stop_string(llama: Llama) -> None:
    prompt = [5, 6, 7, 8]
    whole, _, _ = text_of(llama, prompt)
    stop = whole[4:7]
    text, reason, n_tokens = text_of(llama, prompt, stop=stop)
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    assert n_tokens < 24
    assert text_of(llama, prompt, stop=["not in there"])[:2] == (whole, "length")


def test_a_stop_string_that_is_a_control_token_ends_where_the_model_says_it(llama: Llama) -> None:
    """Its text is never shown, so that nothing could be found in it."""
    name = next(text for text, token in llama.tokenizer.special_tokens.items() if token == BYTE_EOS)
    tokens, _ = llama.generate([[5, 6, 7, 8]], 24, temperature=0)
    ends, _ = llama.generate([[5, 6, 7, 8]], 24, temperature=0, stop=name, stop_token_ids=[tokens[0][3]])
    assert ends[0] == tokens[0][: tokens[0].index(tokens[0][3])]
