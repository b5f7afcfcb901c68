"""Put scalars that a family multiplies by, where Llama does not, elsewhere, so that the model needs none."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llama.checks import check_number
from llama.config import ModelArgs

_MOST_MULTIPLIER = 1e6  # and its inverse the least: far from any model's, and squares of it are numbers still


@dataclass(frozen=True)
class Multipliers:
    """Scalars that a family multiplies by, where Llama does not; `folded` puts them elsewhere."""

    embedding: float = 1.0  # of the rows of the table
    residual: float = 1.0  # of what attention and feed-forward add
    scores: float = 1.0  # of attention's scores, beside 1 / sqrt(head_dim)
    logits: float = 1.0  # divides them


def folded(args: ModelArgs, multipliers: Multipliers) -> tuple[ModelArgs, dict[str, float]]:
    """Return an architecture without multipliers that computes the same, and by module what its weights are scaled by.

    Norms do not see the scale of what they are given, but for their epsilon. So the sum that layers add to is held
    divided by the residual multiplier, and what they add needs none. The table of tokens is scaled, and the last norm
    by what divides the logits; where the table is the output, too, by what the table was scaled by. Matrices of layers
    stay as they are. Scores are scaled where queries and keys are rotated.
    """
    for name in ("embedding", "residual", "scores", "logits"):
        value = getattr(multipliers, name)
        check_number(f"the multiplier of {name}", value)
        if not 1 / _MOST_MULTIPLIER <= value <= _MOST_MULTIPLIER:
            raise ValueError(f"the multiplier of {name} must be from 1e-6 to 1e6, got {value!r}")
    table = multipliers.embedding / multipliers.residual
    norm = 1 / multipliers.logits / (table if args.tied_embeddings else 1.0)
    factors = {name: factor for name, factor in (("tok_embeddings", table), ("norm", norm)) if factor != 1.0}
    # GGUF has it in fp32.
    scores = 1.0 if math.isclose(multipliers.scores, 1.0, rel_tol=1e-6) else multipliers.scores
    return replace(args, norm_eps=args.norm_eps / multipliers.residual**2, score_factor=scores), factors
