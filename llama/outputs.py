"""The events that a stream yields, and the predictions that completions return: dictionaries with Meta's keys."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, cast

from llama.chat.dialog import Message
from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.chat.tool_calls import ToolCallStream
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

# An end token was sampled, or a limit of tokens is reached; of the engine's events alone: logits are NaN or infinite.
FinishReason = Literal["stop", "length", "error"]


class TopToken(TypedDict):
    """One of the likeliest tokens in the place of another."""

    token: str
    id: int
    logprob: float


class CompletionPrediction(TypedDict, total=False):
    """The continuation of a text; tokens are the texts of single tokens.

    logprobs and top_logprobs, the likeliest tokens in the place of each, are there where they are asked for.
    """

    generation: str
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[TopToken]]
    finish_reason: FinishReason


class AnswerPrediction(CompletionPrediction, total=False):
    """The text of an answer to a dialog, without its calls of tools; tool_calls is there where there are some."""

    tool_calls: list[dict[str, Any]]


class ChatPrediction(TypedDict, total=False):
    """The answer to a dialog, with its tool_calls in the message; other keys as in `CompletionPrediction`."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[TopToken]]
    finish_reason: FinishReason


class InfillingPrediction(TypedDict, total=False):
    """The text of a gap, and as full_text with the texts around it; other keys as in `CompletionPrediction`."""

    generation: str
    full_text: str
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[TopToken]]
    finish_reason: FinishReason


# Token ids with their log-probabilities, likeliest first.
TopTokens = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """A token of one prompt, or its end: the last event of a prompt has a finish_reason in place of a token."""

    index: int  # of the prompt in the input
    token: int | None
    text: str  # that the token adds: a character appears when it is complete, and control tokens add nothing
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    top_logprobs: TopTokens = ()  # the likeliest tokens in its place, if they are asked for


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
    events: Iterable[TokenEvent], n_completions: int, tokenizer: Tokenizer, logprobs: bool
) -> list[CompletionPrediction]:
    """Fold the events of completions into one prediction each."""
    return [fold_prompt(of_one, tokenizer, logprobs) for of_one in split_events(events, n_completions)]


def split_events(events: Iterable[TokenEvent], n_completions: int) -> list[list[TokenEvent]]:
    """Return the events of each completion."""
    by_index: list[list[TokenEvent]] = [[] for _ in range(n_completions)]
    for event in events:
        by_index[event.index].append(event)
    return by_index


def keep_best(
    events: Iterable[TokenEvent], prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Iterator[TokenEvent]:
    """Yield the events of the likeliest n of the best_of completions of each prompt, when all of them are there."""
    made, kept = params.samples, params.n
    by_prompt: defaultdict[int, list[list[TokenEvent]]] = defaultdict(lambda: [[] for _ in range(made)])
    finished: Counter[int] = Counter()
    for event in events:
        prompt, number = divmod(event.index, made)
        by_prompt[prompt][number].append(event)
        finished[prompt] += event.finish_reason is not None
        if finished[prompt] == made:
            n_echoed = len(prompts[prompt]) if params.echo else 0
            for i, of_one in enumerate(likeliest(by_prompt.pop(prompt), kept, n_echoed)):
                yield from (replace(each, index=prompt * kept + i) for each in of_one)


def likeliest(completions: Iterable[list[TokenEvent]], count: int, n_echoed: int) -> list[list[TokenEvent]]:
    """Return the completions, each a list of events, whose tokens have the greatest mean log-probability.

    n_echoed: how many tokens of the prompt come first, which do not count. The likeliest is first, and of equals the
    first of the list is; one without tokens comes after all others.
    """

    def mean_logprob(events: Sequence[TokenEvent]) -> float:
        scores = [event.logprob for event in events[n_echoed:] if event.logprob is not None]
        return sum(scores) / len(scores) if scores else -math.inf

    return sorted(completions, key=mean_logprob, reverse=True)[:count]


def chat_predictions(
    answers: Iterable[AnswerPrediction], refused: Iterable[bool], logprobs: bool
) -> list[ChatPrediction]:
    """Return a prediction for each dialog: the next of the answers, or Meta's error text where it was refused."""
    refusal = AnswerPrediction(generation=UNSAFE_ERROR, tokens=[], finish_reason="stop")
    if logprobs:
        refusal["logprobs"] = []
    answered = iter(answers)
    return [_chat_prediction(refusal if is_refused else next(answered)) for is_refused in refused]


def _chat_prediction(answer: AnswerPrediction) -> ChatPrediction:
    message = Message(role="assistant", content=answer["generation"])
    if "tool_calls" in answer:
        message["tool_calls"] = answer["tool_calls"]
    rest = {key: value for key, value in answer.items() if key != "tool_calls"}
    return cast(ChatPrediction, {**rest, "generation": message})


def fold_answer(
    events: Sequence[TokenEvent], tokenizer: Tokenizer, logprobs: bool, stream: ToolCallStream | None
) -> AnswerPrediction:
    """Fold the events of one answer into its prediction; stream: what tells its calls, if there can be any."""
    answer = cast(AnswerPrediction, fold_prompt(events, tokenizer, logprobs))
    if stream is not None:
        shown = "".join([stream.push(event.token, event.text) for event in events])
        rest, calls = stream.end()
        answer["generation"] = shown + rest
        if calls:
            answer["tool_calls"] = calls
    return answer


def fold_prompt(events: Sequence[TokenEvent], tokenizer: Tokenizer, logprobs: bool) -> CompletionPrediction:
    """Fold the events of one prompt into its prediction."""

    def text_of(token: int) -> str:
        return tokenizer.decode([token]) if token < tokenizer.n_words else ""  # ids beyond are padding of the embedding

    prediction = CompletionPrediction(
        generation="".join(event.text for event in events),
        tokens=[text_of(event.token) for event in events if event.token is not None],
    )
    if logprobs:
        prediction["logprobs"] = [event.logprob or 0.0 for event in events if event.token is not None]
    if any(event.top_logprobs for event in events):
        prediction["top_logprobs"] = [
            [TopToken(token=text_of(token), id=token, logprob=score) for token, score in event.top_logprobs]
            for event in events
            if event.token is not None
        ]
    if events[-1].finish_reason is not None:
        prediction["finish_reason"] = events[-1].finish_reason
    return prediction
