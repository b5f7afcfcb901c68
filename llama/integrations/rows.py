"""Rows of a table, completed: what a row asks for, what it gets, and that its text depends on nothing but the row.

Knows nothing of the program that the rows come from.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from llama.chat.dialog import check_messages
from llama.distributed.job import from_first_rank
from llama.engine.prompts import prompt_ids
from llama.generation import UNSAFE_ERROR, Llama
from llama.outputs import CompletionPrediction, TokenEvent, fold_prompt
from llama.sampling import SamplingParams

# A row has one of these, and may choose those for itself.
PROMPT_COLUMNS = ("prompt", "messages", "tokens")
SAMPLING_COLUMNS = ("temperature", "top_p", "max_gen_len", "seed")
# What it gets; logprobs only where they are asked for, and where there is an error nothing else.
RESULT_COLUMNS = ("generation", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs", "error")


@dataclass(frozen=True)
class RowRequest:
    """What a row asks for; its index and its seed decide its random numbers."""

    tokens: list[int]
    params: SamplingParams
    index: int


def check_columns(names: Iterable[str]) -> None:
    """Raise ValueError unless there are an index and a prompt among the columns, and none that results would have."""
    names = set(names)
    if "index" not in names or not names.intersection(PROMPT_COLUMNS):
        raise ValueError(
            f"rows need an index and one of {', '.join(PROMPT_COLUMNS)}, got {', '.join(sorted(names))}: rename "
            "columns, or number the rows once and for all, as their texts depend on the numbers"
        )
    if taken := names.intersection(RESULT_COLUMNS):
        raise ValueError(f"rows have {', '.join(sorted(taken))} already, which would be added: drop or rename them")


def complete_rows(llm: Llama, rows: abc.Sequence[Mapping[str, Any]], params: SamplingParams) -> list[dict[str, Any]]:
    """Return what each row gets, by the names of RESULT_COLUMNS.

    params: for what a row does not choose. Other ranks, which share the model, call `follow_rows` meanwhile.
    """
    results: list[dict[str, Any]] = [{} for _ in rows]
    requests, accepted = [], []
    for row, result in zip(rows, results, strict=True):
        try:
            requests.append(as_request(llm, row, params))
            accepted.append(result)
        except ValueError as error:
            result["error"] = str(error)
    for request, result, completed in zip(requests, accepted, _run(llm, from_first_rank(requests)), strict=True):
        if isinstance(completed, str):
            result["error"] = completed
            continue
        n_prompt_tokens = len(request.tokens)
        n_tokens = len(completed["tokens"]) - n_prompt_tokens * params.echo
        result |= {**completed, "prompt_tokens": n_prompt_tokens, "completion_tokens": n_tokens}
    return results


def follow_rows(llm: Llama) -> NoReturn:
    """Do what the first rank does in `complete_rows`, each time that it does."""
    while True:
        _run(llm, from_first_rank(None))


def as_request(llm: Llama, row: Mapping[str, Any], params: SamplingParams) -> RowRequest:
    """Return what to run for a row; raise ValueError where it is wrong."""
    given = [name for name in PROMPT_COLUMNS if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"a row has one of {', '.join(PROMPT_COLUMNS)}, got {' and '.join(given) or 'none'}")
    if type(row.get("index")) is not int:
        raise ValueError(f"index must be an integer, got {row.get('index')!r}")
    own = {name: row[name] for name in SAMPLING_COLUMNS if row.get(name) is not None}
    params = replace(params, **{"seed": llm.seed if params.seed is None else params.seed, **own})
    if params.samples > 1:
        raise ValueError(f"a row has one completion, got n {params.n}, best_of {params.best_of}: repeat the row")
    value = row[given[0]]
    if given == ["prompt"]:
        [value] = llm.encode_prompts([value])
    elif given == ["messages"]:
        check_messages(value)
        value = _without_nulls(value)
        if llm.chat_format.is_unsafe(value):
            raise ValueError(UNSAFE_ERROR)
        value = llm.chat_format.encode(value)
    return RowRequest(prompt_ids(value, "the prompt", llm.model.args), params, row["index"])


def _without_nulls(value: Any) -> Any:
    """Return messages without the keys of others: a column has all keys in all of them, null where there were none."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


def _run(llm: Llama, requests: abc.Sequence[RowRequest]) -> list[CompletionPrediction | str]:
    """Run requests together, on every rank; return of each what is predicted, or why nothing is."""
    engine, events = llm.engine, [list[TokenEvent]() for _ in requests]
    errors: dict[int, str] = {}
    places: dict[int, int] = {}  # by the ids of unfinished requests
    try:
        for place, request in enumerate(requests):
            try:
                added = engine.add(
                    request.tokens, request.params, index=request.index, add_prefix_space=True, interactive=False
                )
            except ValueError as error:  # there is no memory for it
                errors[place] = str(error)
            else:
                places[added] = place
        while places:
            for event in engine.step():
                place = places[event.index]
                events[place].append(event)
                if event.finish_reason is not None:
                    del places[event.index]
                    if event.finish_reason == "error":
                        errors[place] = event.text
    finally:
        for added in places:
            engine.cancel(added)
    return [
        errors[i] if i in errors else fold_prompt(events[i], llm.tokenizer, request.params.logprobs)
        for i, request in enumerate(requests)
    ]
