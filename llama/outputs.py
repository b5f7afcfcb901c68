"""What a stream yields, and what completions return: plain dictionaries, with Meta's keys and finish_reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

from llama.chat.formats import Message
from llama.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


class InfillingPrediction(TypedDict, total=False):
    generation: str
    full_text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True)
class TokenEvent:
    """A token of one prompt, or its end: the last event of a prompt has no token, and says why it is the last."""

    index: int  # the prompt's place in the input
    token: int | None
    text: str  # what the token adds; a character comes when it is complete, a control token adds nothing
    logprob: float | None = None
    finish_reason: FinishReason | None = None


def fold_events(
    events: Iterable[TokenEvent], n_prompts: int, tokenizer: Tokenizer, logprobs: bool
) -> list[CompletionPrediction]:
    """Fold the events of n_prompts prompts into one prediction each."""
    by_prompt: list[list[TokenEvent]] = [[] for _ in range(n_prompts)]
    for event in events:
        by_prompt[event.index].append(event)
    return [_prediction(of_prompt, tokenizer, logprobs) for of_prompt in by_prompt]


def _prediction(events: list[TokenEvent], tokenizer: Tokenizer, logprobs: bool) -> CompletionPrediction:
    tokens = [event.token for event in events if event.token is not None]
    prediction = CompletionPrediction(
        generation="".join(event.text for event in events),
        # Ids beyond the tokenizer's only pad an embedding.
        tokens=[tokenizer.decode([token]) if token < tokenizer.n_words else "" for token in tokens],
    )
    if logprobs:
        prediction["logprobs"] = [event.logprob or 0.0 for event in events if event.token is not None]
    if events[-1].finish_reason is not None:
        prediction["finish_reason"] = events[-1].finish_reason
    return prediction
