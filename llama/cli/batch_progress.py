"""How far a job is, on a terminal: lines, tokens a second and the time that is left, of all replicas together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from llama.distributed.job import add_up
from llama.jobs.lines import InputLine

SECONDS_TO_SHARE = 1.0
COUNTS = ("lines", "tokens", "errors")


class BatchProgress:
    """Counts results, and shows a bar whose length is that of the input in bytes: its lines are not counted before.

    Args:
        nbytes: of the input, where it is known.
        n_before: lines that an earlier run has finished.
        is_shared: whether replicas add up what they count.
        is_shown: whether this process shows it, where stderr is a terminal.
    """

    def __init__(self, nbytes: int | None, n_before: int, is_shared: bool, is_shown: bool) -> None:
        self._nbytes, self._n_before, self._is_shared, self._is_shown = nbytes, n_before, is_shared, is_shown
        self._new = dict.fromkeys(COUNTS, 0)  # not yet added to the sums
        self._sums = dict.fromkeys(COUNTS, 0)
        self._bar: tqdm | None = None
        self._began = self._shared_at = time.monotonic()

    def of(self, next_line: Callable[[bool], InputLine | None]) -> Callable[[bool], InputLine | None]:
        """Return a function that does what next_line does, and shows how far its lines are."""

        def next_shown(wait: bool) -> InputLine | None:
            line = next_line(wait)
            if line is not None and self._is_shown:
                self._show(line.stop)
            return line

        return next_shown

    def add(self, n_tokens: int, is_error: bool) -> None:
        """Count the result of a line with so many new tokens."""
        for name, amount in zip(COUNTS, (1, n_tokens, int(is_error)), strict=True):
            self._new[name] += amount
        if time.monotonic() - self._shared_at >= SECONDS_TO_SHARE:
            self.flush()

    def flush(self) -> None:
        """Add what was counted here to the sums, and learn what others have added."""
        self._shared_at = time.monotonic()
        for name, amount in self._new.items():
            self._sums[name] = add_up(name, amount) if self._is_shared else self._sums[name] + amount
            self._new[name] = 0
        if self._bar is not None:
            self._bar.set_description_str(self._description())

    def totals(self) -> tuple[int, int]:
        """Return how many lines have a result, and how many of those of this run are errors."""
        self.flush()
        return self._n_before + self._sums["lines"], self._sums["errors"]

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _description(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        lines = self._n_before + self._sums["lines"]
        return f"{lines:,} lines, {self._sums['tokens'] / seconds:,.0f} tokens/s"

    def _show(self, stop: int) -> None:
        if self._bar is None:
            self._began = time.monotonic()
            self._bar = tqdm(
                total=self._nbytes,
                initial=stop,
                desc=self._description(),
                bar_format="{desc} |{bar}| {percentage:3.0f} %, {remaining} left" if self._nbytes else "{desc}",
                smoothing=0,
                file=sys.stderr,
                disable=None,
                leave=False,
            )
        self._bar.update(stop - self._bar.n)
