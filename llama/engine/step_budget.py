"""How many tokens of prompts a step may compute while somebody reads along, from the time of the last steps."""

from __future__ import annotations

# A step with tokens of prompts is meant to take at most this many times as long as one without.
MAX_SLOWDOWN = 1.5

# The share of that which is aimed at, as steps differ; and the most tokens.
AIM, MOST = 0.8, 8192

# Weight of the newest step in means over steps.
NEWEST = 0.2


class StepBudget:
    """Finds how many tokens of prompts keep a step short; clocks differ, so the first rank's number is taken by all."""

    def __init__(self) -> None:
        self.tokens = 1
        self.plain_seconds = 0.0  # of a step without tokens of prompts
        self._token_seconds = 0.0  # that a token of a prompt adds

    def record(self, seconds: float, n_prompt_tokens: int) -> None:
        """Add a step with rows that generate, and this many tokens of prompts beside them."""
        plain = self.plain_seconds
        if not n_prompt_tokens:
            self.plain_seconds += (NEWEST if plain else 1) * (seconds - plain)
        elif plain:
            cost = max(seconds - plain, plain / MOST) / n_prompt_tokens
            self._token_seconds += (NEWEST if self._token_seconds else 1) * (cost - self._token_seconds)
            most = int(AIM * (MAX_SLOWDOWN - 1) * plain / self._token_seconds)
            self.tokens = max(1, min(most, 2 * self.tokens, MOST))
