"""A model with the cache of one batch, and which tokens the cache holds: reading texts on from there.

Knows nothing of sampling or of text; rows are lists of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.footprint import SCORED_AT_ONCE
from llama.model import Transformer
from llama.sampling import log_probs


class Context:
    """Rows of one batch as a model has read them, each from position 0."""

    def __init__(self, model: Transformer, bsz: int, length: int) -> None:
        self.model = model
        self.cache = model.new_cache(bsz, length)

    def read_prompts(self, prompts: Sequence[Sequence[int]], scored: bool = False) -> tuple[Tensor, list[list[float]]]:
        """Read each row's prompt; final states of the last tokens, (bsz, dim), and log-probabilities when scored.

        These are those of each token given the ones before it; 0.0 stands for the first, which has none before it.
        """
        lengths = [len(prompt) for prompt in prompts]
        seqlen = max(lengths)
        padded = [[*prompt, *[0] * (seqlen - len(prompt))] for prompt in prompts]  # lengths say what counts
        hidden = self._read(padded, [0] * len(prompts), lengths)
        scores = [[0.0] + self._score(hidden[i], prompt[1:]) for i, prompt in enumerate(prompts)] if scored else []
        rows = torch.arange(len(prompts), device=hidden.device)
        return hidden[rows, torch.tensor(lengths, device=hidden.device) - 1], scores

    def step(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """Read tokens, equally many for each of the first rows, in one pass; all final states, (bsz, seqlen, dim)."""
        return self._read(tokens, start_pos)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Put the first `length` tokens of row `source` in the place of row `target`."""
        self.cache.copy_row(source, target, length)

    def _read(
        self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int], lengths: Sequence[int] | None = None
    ) -> Tensor:
        device, kv_len = self.model.device, max(start_pos) + len(tokens[0])
        return self.model.hidden(
            torch.tensor(tokens, device=device),
            torch.tensor(start_pos, device=device),
            self.cache,
            kv_len,
            None if lengths is None else torch.tensor(lengths, device=device),
        )

    def _score(self, hidden: Tensor, targets: Sequence[int]) -> list[float]:
        """Log-probability of each target under the final state before it, hidden (at least as many, dim)."""
        scores: list[float] = []
        for i in range(0, len(targets), SCORED_AT_ONCE):
            chunk = torch.tensor(targets[i : i + SCORED_AT_ONCE], device=hidden.device)
            scores += log_probs(self.model.logits(hidden[i : i + len(chunk)]), chunk).tolist()
        return scores
