"""The events that a stream yields, and the predictions that completions return: dictionaries with Meta's keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from llama.chat.dialog import Message
from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.tokenizer import Tokenizer

# An end token was sampled, or a limit of tokens is reached; of the engine's events alone: logits are NaN or infinite.
FinishReason = Literal["stop", "length", "error"]


class CompletionPrediction(TypedDict, total=False):
    """The continuation of a text; tokens are the texts of single tokens, logprobs only where they are asked for."""

    generation: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


class ChatPrediction(TypedDict, total=False):
    """The answer to a dialog; other keys as in `CompletionPrediction`."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


class InfillingPrediction(TypedDict, total=False):
    """The text of a gap, and as full_text with the texts around it; other keys as in `CompletionPrediction`."""

    generation: str
    full_text: str
    tokens: list[str]
    logprobs: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True)
class TokenEvent:
    """A token of one prompt, or its end: the last event of a prompt has a finish_reason in place of a token."""

    index: int  # of the prompt in the input
    token: int | None
    text: str  # that the token adds: a character appears when it is complete, and control tokens add nothing
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens in its place, likeliest first, if asked for


def fold_tokens(events: Iterable[TokenEvent], n_prompts: int) -> tuple[list[list[int]], list[list[float]]]:
    """Fold the events of n_prompts prompts into the tokens of each, and their scores: 0.0 where there is none."""
    tokens: list[list[int]] = [[] for _ in range(n_prompts)]
    scores: list[list[float]] = [[] for _ in range(n_prompts)]
    for event in events:
        if event.token is not None:
            tokens[event.index].append(event.token)
            scores[event.index].append(event.logprob or 0.0)
    return tokens, scores


def fold_events(
    events: Iterable[TokenEvent], n_prompts: int, tokenizer: Tokenizer, logprobs: bool
) -> list[CompletionPrediction]:
    """Fold the events of n_prompts prompts into one prediction each."""
    by_prompt: list[list[TokenEvent]] = [[] for _ in range(n_prompts)]
    for event in events:
        by_prompt[event.index].append(event)
    return [fold_prompt(prompt_events, tokenizer, logprobs) for prompt_events in by_prompt]


def chat_predictions(
    answers: Iterable[CompletionPrediction], refused: Iterable[bool], logprobs: bool
) -> list[ChatPrediction]:
    """Return a prediction for each dialog: the next of the answers, or Meta's error text where it was refused."""
    refusal = CompletionPrediction(generation=UNSAFE_ERROR, tokens=[], finish_reason="stop")
    if logprobs:
        refusal["logprobs"] = []
    answered = iter(answers)
    predictions = [refusal if is_refused else next(answered) for is_refused in refused]
    return [
        ChatPrediction(**{**each, "generation": Message(role="assistant", content=each["generation"])})
        for each in predictions
    ]


def fold_prompt(events: Sequence[TokenEvent], tokenizer: Tokenizer, logprobs: bool) -> CompletionPrediction:
    """Fold the events of one prompt into its prediction."""
    tokens = [event.token for event in events if event.token is not None]
    prediction = CompletionPrediction(
        generation="".join(event.text for event in events),
        # Ids beyond the tokenizer's are padding of the embedding.
        tokens=[tokenizer.decode([token]) if token < tokenizer.n_words else "" for token in tokens],
    )
    if logprobs:
        prediction["logprobs"] = [event.logprob or 0.0 for event in events if event.token is not None]
    if events[-1].finish_reason is not None:
        prediction["finish_reason"] = events[-1].finish_reason
    return prediction
