"""Prints what a model says: on the first rank, in the order of the prompts, and each result as soon as it can be."""

from __future__ import annotations

import codecs
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama.cli.runner import is_first_rank
from llama.outputs import CompletionPrediction, InfillingPrediction, TokenEvent

RULE = "\n==================================\n\n"


def say(text: str) -> None:
    """Print a piece of text on the first rank; BrokenPipeError where whoever read it has gone."""
    if is_first_rank():
        print(text, end="", flush=True)


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, which is ASCII where stdout is not UTF-8."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    return json.dumps(value, ensure_ascii=not is_utf8)


class ResultPrinter:
    """Prints results in the order of their prompts, each when it and those before it are complete.

    On a terminal the text of the prompt whose turn it is appears as it comes, unless it is JSON.

    Args:
        prompts: the texts, as users gave them.
        predict: what makes a prediction of all events of the prompt with an index.
        json: print one JSON object a line.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        predict: Callable[[int, list[TokenEvent]], CompletionPrediction | InfillingPrediction],
        json: bool,
    ) -> None:
        self._prompts, self._predict, self._json = prompts, predict, json
        self._live = not json and sys.stdout.isatty()
        self._events: defaultdict[int, list[TokenEvent]] = defaultdict(list)  # of prompts that are not printed
        self._turn = 0
        self._lock = threading.Lock()
        self._show_turn()

    def add(self, event: TokenEvent) -> None:
        """Take the next event of any prompt, and print what can be printed."""
        with self._lock:
            self._events[event.index].append(event)
            if event.index != self._turn:
                return
            if self._live:
                say(event.text)
            while self._is_complete(self._turn):
                self._print(self._turn, begun=self._live)
                self._turn += 1
                self._show_turn()

    def finish(self) -> None:
        """Print the complete results that waited for those before them, as nothing more will come."""
        with self._lock:
            if self._live and self._turn < len(self._prompts):
                say("\n")
            for index in sorted(self._events):
                if self._is_complete(index):
                    self._print(index)

    def _is_complete(self, index: int) -> bool:
        events = self._events.get(index)
        return events is not None and events[-1].finish_reason is not None

    def _show_turn(self) -> None:
        """On a terminal, show the prompt whose turn it is, and what there is of its text."""
        if self._live and self._turn < len(self._prompts):
            text = "".join(event.text for event in self._events.get(self._turn, ()))
            say(f"{self._prompts[self._turn]}\n> {text}")

    def _print(self, index: int, begun: bool = False) -> None:
        """Print a result and forget its events; begun: but for its prompt and text, which are there."""
        result = self._predict(index, self._events.pop(index))
        if self._json:
            say(json_line({"prompt": self._prompts[index], **result}) + "\n")
            return
        scores = zip(result["tokens"], result.get("logprobs", ()), strict=False)
        table = "".join(f"{logprob:10.4f}  {token!r}\n" for token, logprob in scores)
        text = "" if begun else f"{self._prompts[index]}\n> {result['generation']}"
        say(f"{text}\n{table}{RULE}")
