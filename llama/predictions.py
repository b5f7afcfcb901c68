"""What a completion, a chat and an infilling return: plain dictionaries, with Meta's keys and finish_reason."""

from __future__ import annotations

from typing import Literal, TypedDict

from llama.chat import Message

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
