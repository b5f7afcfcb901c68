"""How many tokens of prompts a step may compute while somebody reads along, from the time of the last steps."""

from __future__ import annotations

import statistics
from collections import deque

# A step with tokens of prompts takes at most this many times as long as one without.
MAX_SLOWDOWN = 1.5

# Tokens that are tried first, and the most; and after how many steps a number that was too large is tried again.
FIRST, MOST, PATIENCE = 8, 8192, 64


class StepBudget:
    """Finds the most tokens of prompts that keep a step short; clocks differ, so the first rank's is taken by all."""

    def __init__(self) -> None:
        self.tokens = FIRST
        self._plain: deque[float] = deque(maxlen=9)  # seconds of a step without tokens of prompts
        self._patience = 0

    def record(self, seconds: float, n_prompt_tokens: int) -> None:
        """Add a step with rows that generate, and this many tokens of prompts beside them."""
        if not n_prompt_tokens:
            self._plain.append(seconds)
            return
        if n_prompt_tokens < self.tokens or not self._plain:  # the last tokens of a prompt tell nothing
            return
        slowdown = seconds / statistics.median(self._plain)
        self._patience = max(0, self._patience - 1)
        if slowdown > MAX_SLOWDOWN:
            self.tokens, self._patience = max(1, self.tokens // 2), PATIENCE
        elif slowdown < 1 + (MAX_SLOWDOWN - 1) / 2 and not self._patience:
            self.tokens = min(MOST, 2 * self.tokens)
