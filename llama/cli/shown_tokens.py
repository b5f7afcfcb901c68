"""Tokens as people read them: the text that each adds, how likely it was, and what else was likely in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama.outputs import TokenEvent
from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class ShownToken:
    """A token of a completion. The texts of all are the completion's text.

    Args:
        text: what it adds; nothing where it is a control token, or only begins a character.
        name: what to call it by itself; see `TokenNames`.
        probability: the model's own, before temperature; None where it is not known.
        alternatives: names and probabilities of the likeliest tokens in its place, likeliest first.
        is_control: whether its name is that of a control token, which a text could spell as well.
    """

    text: str
    name: str
    probability: float | None
    alternatives: tuple[tuple[str, float], ...] = ()
    is_control: bool = False


class TokenNames:
    """What to call single tokens: by their text, and control tokens by their own; else by bytes, as \\xf0\\x9f."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = {token: name for name, token in tokenizer.special_tokens.items()}

    def is_silent(self, token: int) -> bool:
        """Whether a token adds nothing to a text: a control token, or padding of the embedding."""
        return token in self._control or token >= self._tokenizer.n_words

    def __call__(self, token: int) -> str:
        """Return the name of a token."""
        if self.is_silent(token):
            return self._control.get(token, f"<{token}>")
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in data)


def shown_tokens(
    events: Sequence[TokenEvent], tokenizer: Tokenizer, names: TokenNames, add_prefix_space: bool
) -> list[ShownToken]:
    """Return the tokens of one completion from its events; add_prefix_space as in `Llama.stream`.

    Each token has its own text, although events give it late where it may begin a stop string.
    """
    decoder = tokenizer.stream_decoder(add_prefix_space)
    left = sum(len(event.text) for event in events)
    tokens = [event for event in events if event.token is not None]
    texts = [
        "" if names.is_silent(event.token) else decoder.push(event.token) for event in tokens if event.token is not None
    ]
    if texts:
        texts[-1] += decoder.flush()
    shown = []
    for event, text in zip(tokens, texts, strict=True):
        assert event.token is not None
        shown.append(
            ShownToken(
                text[:left],
                names(event.token),
                None if event.logprob is None else math.exp(event.logprob),
                tuple((names(token), math.exp(logprob)) for token, logprob in event.top_logprobs),
                names.is_silent(event.token),
            )
        )
        left = max(0, left - len(text))
    return shown
