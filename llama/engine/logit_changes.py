"""Changes the logits of a step's rows by the controls of their requests, worked out while the step is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.engine.controls import TokenControls
from llama.engine.sequence import Chunk
from llama.sampling import SparseAdjustments
from llama.structured import unpack


@dataclass(frozen=True)
class LogitChanges:
    """What the controls of some rows of a step do to its logits, (n, vocab_size).

    adjustments: of single tokens; rows: (k,), those with a constraint; allowed: (k, vocab_size), its next tokens.
    """

    adjustments: SparseAdjustments | None
    rows: Tensor | None
    allowed: Tensor | None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the changed logits; those that are given are left as they are."""
        if self.adjustments is not None:
            logits = self.adjustments.apply(logits)
        if self.rows is not None and self.allowed is not None:
            logits = logits.index_copy(0, self.rows, logits[self.rows].masked_fill(~self.allowed, -torch.inf))
        return logits


WaitForChanges = Callable[[], LogitChanges]


class ChangesOfSteps:
    """Works out the changes of a step's logits; in another thread, while it is computed, if there is a constraint."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._thread: ThreadPoolExecutor | None = None
        self._begun: Future[LogitChanges] | None = None

    def begin(self, chunks: Sequence[Chunk], first_rows: Sequence[int]) -> WaitForChanges:
        """Return what waits for the changes of a step; first_rows: where the logits of each chunk begin."""
        places = []
        for chunk, row in zip(chunks, first_rows, strict=True):
            sequence = chunk.sequence
            if sequence.controls is not None:
                n_prompt = len(sequence.prompt)
                completion = [*sequence.tokens[n_prompt : chunk.start], *chunk.tokens[max(0, n_prompt - chunk.start) :]]
                for i in range(chunk.n_sampled):
                    end = len(completion) - chunk.n_sampled + 1 + i
                    places.append((row + i, sequence.controls, completion[:end]))
        if self._begun is not None:  # nobody may have waited for it, after an interrupt
            wait([self._begun])
        if all(controls.constraint is None for _, controls, _ in places):
            return lambda: self._changes(places)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "controls")
        self._begun = self._thread.submit(self._changes, places)
        return self._begun.result

    def _changes(self, places: Sequence[tuple[int, TokenControls, list[int]]]) -> LogitChanges:
        """Return the changes of the rows at these places: a row of logits, its controls and the tokens before it."""
        adjustments, rows, masks = [], [], []
        for row, controls, tokens in places:
            controls.move_to(tokens)
            if (found := controls.adjustments()) is not None:
                adjustments.append((row, found))
            if (mask := controls.mask()) is not None:
                rows.append(row)
                masks.append(mask)
        return LogitChanges(
            SparseAdjustments.of(adjustments, self._device) if adjustments else None,
            torch.tensor(rows, device=self._device) if rows else None,
            unpack(torch.stack(masks), self._vocab_size).to(self._device) if rows else None,
        )
