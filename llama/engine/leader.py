"""An engine on several ranks whose requests come to the first one alone, as those of a job or of a server do.

The first rank tells the others of requests that join and leave. That it is about to, the tokens of a step say, which it
sends anyway: a step without news costs no message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama.engine.engine import Engine
from llama.outputs import TokenEvent
from llama.sampling import SamplingParams


@dataclass(frozen=True)
class News:
    """What a rank that follows has to do before the next step."""

    adds: list[tuple[Sequence[int], SamplingParams, dict[str, Any]]]
    cancels: list[int]
    is_last: bool = False  # the first rank leads no more


class Leader:
    """The engine of the first rank, which the others follow; see `Engine` for its methods."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._adds: list[tuple[Sequence[int], SamplingParams, dict[str, Any]]] = []
        self._cancels: list[int] = []
        self._ends = False

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        return self.engine.unfinished + len(self._adds)

    def add(self, prompt_tokens: Sequence[int], params: SamplingParams | None = None, **options: Any) -> int:
        """Have a prompt completed; what can never have its pages ends by an event with finish_reason "error"."""
        self._adds.append((prompt_tokens, params or SamplingParams(), options))
        return self.engine.last_id + len(self._adds)

    def cancel(self, request: int) -> None:
        """End a request without another event."""
        self._cancels.append(request)

    def step(self) -> list[TokenEvent]:
        """Compute one step of all requests; see `Engine.step`."""
        if not self.unfinished:
            return []  # the others wait to be told something
        refused: list[TokenEvent] = []
        if self.engine.news_follow or (self._adds and not self.engine.unfinished):
            refused = self._tell(News(self._adds, self._cancels))
            self._adds, self._cancels = [], []
        self.engine.has_news = bool(self._adds or self._cancels or self._ends)
        return refused + self.engine.step()

    def end(self) -> None:
        """Cancel what is unfinished, and have the other ranks go on without being led."""
        self._ends = True
        while self.engine.unfinished and not self.engine.news_follow:  # until they listen
            self.step()
        self._tell(News([], list(self.engine.requests), is_last=True))

    def _tell(self, news: News) -> list[TokenEvent]:
        return apply(self.engine, self.engine.model.parallel.share(news))


def apply(engine: Engine, news: News) -> list[TokenEvent]:
    """Add and cancel requests as every rank does, and return the last events of those that were refused."""
    engine.news_follow = engine.has_news = False
    refused = []
    for prompt, params, options in news.adds:
        try:
            engine.add(prompt, params, **options)
        except ValueError as error:
            refused.append(TokenEvent(engine.last_id, None, str(error), finish_reason="error"))
    for request in news.cancels:
        engine.cancel(request)
    return refused


@contextmanager
def lead(engine: Engine) -> Iterator[Leader]:
    """Have the first rank of those that share a model schedule for all, while the others `follow`."""
    leader = Leader(engine)
    try:
        yield leader
    except (ValueError, OSError) as error:  # any other may have come in the middle of a step
        if not isinstance(error, ConnectionError):  # else there is nobody to tell
            leader.end()
        raise
    leader.end()


def follow(engine: Engine) -> None:
    """Run the steps of the rank that leads, until it has ended."""
    while True:
        if engine.news_follow or not engine.unfinished:
            news = engine.model.parallel.share(None)
            apply(engine, news)
            if news.is_last:
                return
        engine.step()
