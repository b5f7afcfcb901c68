"""How many tokens of prompts a step may compute while somebody reads along, from the time of the last steps."""

from __future__ import annotations

# A step with tokens of prompts is meant to take at most this many times as long as one without.
MAX_SLOWDOWN = 1.5

# The share of that which is aimed at, as steps differ; and the most tokens.
AIM, MOST = 0.8, 8192

# Weight of the newest step in means over steps; and after how many steps one without prompts is timed again.
NEWEST, STALE = 0.2, 32


class StepBudget:
    """Finds how many tokens of prompts keep a step short; clocks differ, so the first rank's number is taken by all."""

    def __init__(self) -> None:
        # Of the next step: 0 where one without any is to be timed, as rows come and go.
        self.tokens = 0
        self._found = 1  # tokens that a step has time for
        self._plain_seconds = 0.0  # of a step without tokens of prompts
        self._token_seconds = 0.0  # that a token of a prompt adds
        self._since_plain = 0  # steps

    def record(self, seconds: float, n_prompt_tokens: int) -> None:
        """Add a step with rows that generate, and this many tokens of prompts beside them."""
        plain = self._plain_seconds
        if n_prompt_tokens:
            self._since_plain += 1
            if plain:
                cost = max(seconds - plain, plain / MOST) / n_prompt_tokens
                self._token_seconds += (NEWEST if self._token_seconds else 1) * (cost - self._token_seconds)
                most = int(AIM * (MAX_SLOWDOWN - 1) * plain / self._token_seconds)
                self._found = max(1, min(most, 2 * self._found, MOST))
        else:
            self._plain_seconds += (1 if not plain or self._since_plain else NEWEST) * (seconds - plain)
            self._since_plain = 0
        self.tokens = self._found if self._plain_seconds and self._since_plain < STALE else 0
