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
class Step:
    """One token of one row, or its end: the last step of a row has no token, and says why it is the last."""

    row: int  # the prompt's place in the input
    token: int | None
    text: str  # what the token adds; a character comes when it is complete, a control token adds nothing
    logprob: float | None = None
    finish_reason: FinishReason | None = None


def predictions(steps: Iterable[Step], n_rows: int, tokenizer: Tokenizer, logprobs: bool) -> list[CompletionPrediction]:
    """What the steps of each of n_rows prompts add up to."""
    rows: list[list[Step]] = [[] for _ in range(n_rows)]
    for step in steps:
        rows[step.row].append(step)
    return [_prediction(row, tokenizer, logprobs) for row in rows]


def _prediction(steps: list[Step], tokenizer: Tokenizer, logprobs: bool) -> CompletionPrediction:
    tokens = [step.token for step in steps if step.token is not None]
    prediction = CompletionPrediction(
        generation="".join(step.text for step in steps),
        # Ids beyond the tokenizer's only pad an embedding.
        tokens=[tokenizer.decode([token]) if token < tokenizer.n_words else "" for token in tokens],
    )
    if logprobs:
        prediction["logprobs"] = [step.logprob or 0.0 for step in steps if step.token is not None]
    if steps[-1].finish_reason is not None:
        prediction["finish_reason"] = steps[-1].finish_reason
    return prediction
