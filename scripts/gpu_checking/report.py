"""What a run finds: checks with their errors and bounds, figures by section, what failed and what was left out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.cli import runner as cli

# Its name, its share of the time, and what it does.
Section = tuple[str, float, Callable[[], None]]


class Report:
    """Collects everything, so that one failure hides no other; prints checks as they are made."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, list[dict[str, Any]]] = {}
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self._end = self._until = time.monotonic() + seconds

    def check(self, name: str, bound: float, error: Callable[..., float], *arguments: Any) -> None:
        """Whether an error, as it is measured, is within its bound; one that is no number is not."""
        try:
            measured = error(*arguments)
            self._synchronize()  # an error of the device belongs to this check
        except Exception as exception:  # whatever a compiler, a driver or a kernel raises
            self._fail(name, exception)
            return
        passed = measured <= bound
        self.checks.append({"name": name, "error": measured, "bound": bound, "passed": passed})
        if cli.is_first_rank() or not passed:
            print(f"{'ok  ' if passed else 'FAIL'} {name}: {measured:.2g} of {bound:.2g}", flush=True)
        if not passed:
            self.failed.append(name)

    def measure(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        """Run what adds figures; memory that does not suffice is no failure."""
        try:
            run(*arguments)
            self._synchronize()
        except torch.OutOfMemoryError:
            self.left_out.append(f"{name}: does not fit")
        except Exception as exception:
            self._fail(name, exception)
        free_memory(self.device)

    def add(self, section: str, **figures: Any) -> None:
        self.figures.setdefault(section, []).append(figures)

    def has_time(self, what: str) -> bool:
        """Whether the section's time is not over; else `what` is noted as left out."""
        if self.seconds_left() > 0:
            return True
        self.left_out.append(f"{what}: no time")
        return False

    def seconds_left(self) -> float:
        """Of the section's share."""
        return self._until - time.monotonic()

    def run(self, sections: Sequence[Section]) -> None:
        """Run sections, the most important first, in shares of the time: what one does not use goes to the others."""
        for i, (name, share, run) in enumerate(sections):
            now = time.monotonic()
            self._until = now + (self._end - now) * share / sum(each[1] for each in sections[i:])
            if not self.has_time(name):
                continue
            if cli.is_first_rank():
                print(f"--- {name}, {self._until - now:.0f} s", flush=True)
            self.measure(name, run)
            self.add("sections", name=name, seconds=round(time.monotonic() - now, 1))

    def _fail(self, name: str, exception: Exception) -> None:
        said = f"{name}: {type(exception).__name__}: {' '.join(str(exception).split())[:500]}"
        print(f"FAIL {said}", flush=True)
        self.failed.append(said)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error against the largest value; NaN where there is one."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def differing(actual: Tensor, expected: Tensor) -> float:
    """How many values are not the same."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (actual, expected)
    return float((actual != expected).sum())


def free_memory(device: torch.device) -> None:
    """Give back what dropped models, caches and graphs held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
