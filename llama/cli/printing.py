"""Prints what a model says: on the first rank, in the order of the prompts, and each result as soon as it can be."""

from __future__ import annotations

import codecs
import json
import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.cli.runner import is_first_rank
from llama.outputs import CompletionPrediction, InfillingPrediction, TokenEvent

Prediction = CompletionPrediction | InfillingPrediction
# What makes of an event the text that is printed of it, and of a prediction what is printed below it.
Paint = Callable[[TokenEvent], str]
Table = Callable[[Prediction], str]

RULE = "\n==================================\n\n"


def say(text: str) -> None:
    """Print a piece of text on the first rank; BrokenPipeError where whoever read it has gone."""
    if is_first_rank():
        print(text, end="", flush=True)


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, which is ASCII where stdout is not UTF-8."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf8)


def plain_text(event: TokenEvent) -> str:
    """Return the text of an event."""
    return event.text


def no_table(result: Prediction) -> str:
    """Return nothing."""
    return ""


class ResultPrinter:
    """Prints results in the order of their prompts, each when it and those before it are complete.

    The text of the result whose turn it is appears as it comes where somebody may read along: on a terminal, and in a
    pipe where it is the only one, unless it is JSON.

    Args:
        prompts: the texts, as users gave them.
        predict: what makes a prediction of all events of the result with an index.
        json: print one JSON object a line.
        n: results of each prompt, which follow each other.
        paint: what makes the text of an event one that a terminal shows.
        table: what is printed below a result that is not JSON.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        predict: Callable[[int, list[TokenEvent]], Prediction],
        json: bool,
        n: int = 1,
        paint: Paint = plain_text,
        table: Table = no_table,
    ) -> None:
        self._prompts, self._predict, self._json, self._n = prompts, predict, json, n
        self._paint, self._table = paint, table
        self._count = len(prompts) * n
        self._live = not json and (sys.stdout.isatty() or self._count == 1)
        self._events: defaultdict[int, list[TokenEvent]] = defaultdict(list)  # of results that are not printed
        self._turn = 0
        self._prompt: int | None = None  # whose text was printed last
        self._lock = threading.Lock()
        self._show_turn()

    def add(self, event: TokenEvent) -> None:
        """Take the next event of any result, and print what can be printed."""
        with self._lock:
            self._events[event.index].append(event)
            if event.index != self._turn:
                return
            if self._live:
                say(self._paint(event))
            while self._is_complete(self._turn):
                self._print(self._turn, begun=self._live)
                self._turn += 1
                self._show_turn()

    def finish(self) -> None:
        """Print the complete results that waited for those before them, as nothing more will come."""
        with self._lock:
            if self._live and self._turn < self._count:
                say("\n")
            for index in sorted(self._events):
                if self._is_complete(index):
                    self._print(index)

    def _is_complete(self, index: int) -> bool:
        events = self._events.get(index)
        return events is not None and events[-1].finish_reason is not None

    def _show_turn(self) -> None:
        """Where somebody may read along, show the prompt whose turn it is, and what there is of its text."""
        if self._live and self._turn < self._count:
            say(self._opening(self._turn) + self._text(self._events.get(self._turn, ())))

    def _text(self, events: Sequence[TokenEvent]) -> str:
        return "".join(map(self._paint, events))

    def _opening(self, index: int) -> str:
        """Return what comes before a result's text: its prompt, once for all of its results, and its number."""
        prompt, sample = divmod(index, self._n)
        is_new, self._prompt = prompt != self._prompt, prompt
        number = f"[{sample + 1} of {self._n}] " if self._n > 1 else ""
        return f"{self._prompts[prompt]}\n" * is_new + f"{number}> "

    def _print(self, index: int, begun: bool = False) -> None:
        """Print a result and forget its events; begun: but for its prompt and text, which are there."""
        events = self._events.pop(index)
        result = self._predict(index, events)
        prompt, sample = divmod(index, self._n)
        if self._json:
            number = {"sample": sample} if self._n > 1 else {}
            say(json_line({"prompt": self._prompts[prompt], **number, **result}) + "\n")
            return
        text = "" if begun else self._opening(index) + self._text(events)
        say(f"{text}\n{self._table(result)}{RULE if sample == self._n - 1 else ''}")


def score_table(result: Prediction, *, logprobs: bool = False, probabilities: bool = False) -> str:
    """Return a line for each token of a prediction that has scores, with the likeliest in its place where it has them.

    logprobs, probabilities: which of the two a line begins with, or both. Those in its place have what it begins with.
    """
    lines = []
    likeliest = result.get("top_logprobs", [])
    for i, (token, score) in enumerate(zip(result["tokens"], result.get("logprobs", ()), strict=False)):
        line = f"{score:10.4f}" * logprobs + f"{math.exp(score):9.2%}" * probabilities + f"  {token!r}"
        if likeliest and likeliest[i]:
            found = [(each["token"], each["logprob"]) for each in likeliest[i]]
            line += "  of " + ", ".join(
                f"{other!r} {logprob:.4f}" if logprobs else f"{other!r} {math.exp(logprob):.2%}"
                for other, logprob in found
            )
        lines.append(line + "\n")
    return "".join(lines)
