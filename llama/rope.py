"""Rotary position embeddings, and the ways of stretching them beyond the context that a model was trained on.

Knows nothing of attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import ModelArgs
from llama.rope_scaling import (
    DynamicScaling,
    FactorScaling,
    LengthScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    QueryScaling,
    RopeScaling,
    YarnScaling,
)


class Rotary(nn.Module):
    """The rotations of positions (arXiv:2104.09864), stretched as `scaling` says.

    rotary_dim: leading dimensions of a head that are rotated, all where it is None; the others stay where they are.
    score_factor: of attention's scores, the products of a query and a key that are both turned here.
    frequencies: (head_dim / 2,), radians per position of each pair, fp32; magnitudes: the same, what scales them.
    """

    frequencies: Tensor
    magnitudes: Tensor
    long_frequencies: Tensor  # of texts beyond the original context, with LongRoPE

    def __init__(
        self,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None,
        rotary_dim: int | None = None,
        score_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        self.theta, self.scaling = theta, scaling
        still = (head_dim - self.rotary_dim) // 2  # pairs that are not rotated

        def add(name: str, values: Tensor, rest: float) -> None:
            self.register_buffer(name, F.pad(values, (0, still), value=rest), persistent=False)

        add("frequencies", scaled_frequencies(self.rotary_dim, theta, scaling), 0.0)
        if isinstance(scaling, LongRopeScaling):
            factors = FactorScaling(scaling.long_factors)
            add("long_frequencies", scaled_frequencies(self.rotary_dim, theta, factors), 0.0)
        root = math.sqrt(score_factor)
        magnitude = scaling.magnitude if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
        add(
            "magnitudes", torch.full((self.rotary_dim // 2,), root * magnitude, dtype=torch.float32, device="cpu"), root
        )

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the complex numbers that rotate pairs at positions (n_tokens,): (n_tokens, 1, head_dim / 2).

        Their magnitude is 1, except where attention is sharpened, as by YaRN, or has scores of another scale.
        lengths: (n_tokens,), of the text of each token, on which some scalings depend; None: each token ends a text.
        """
        frequencies = self.frequencies
        if isinstance(self.scaling, LengthScaling):
            lengths = positions + 1 if lengths is None else lengths
            if isinstance(self.scaling, DynamicScaling):
                frequencies = self._dynamic(self.scaling, lengths)
            else:
                is_long = lengths[:, None] > self.scaling.old_context_len
                frequencies = torch.where(is_long, self.long_frequencies, frequencies)
        # fp32: bf16 represents every integer only up to 256.
        angles = positions.float()[:, None] * frequencies
        return torch.polar(self.magnitudes.float().expand_as(angles).contiguous(), angles)[:, None]

    def _dynamic(self, scaling: DynamicScaling, lengths: Tensor) -> Tensor:
        """Return frequencies at `lengths` (n_tokens,): (n_tokens, head_dim / 2). Cached keys keep their rotation."""
        excess = (lengths.float() / scaling.old_context_len).clamp(min=1) - 1
        dim = self.rotary_dim
        stretch = (1 + scaling.factor * excess) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
        frequencies = (self.theta * stretch)[:, None] ** -exponents
        return F.pad(frequencies, (0, len(self.frequencies) - dim // 2))


class LayerRotations(nn.Module):
    """The rotations of all layers: few are different, so that each is computed once a step.

    of_queries, of_keys: for each layer, which of the rotations that `forward` returns turns its queries and its keys.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.query_scaling = args.query_scaling
        kinds: list[tuple[float, RopeScaling | None, int | None]] = []  # the arguments of each Rotary
        wanted: list[tuple[int, bool]] = []  # a kind, and whether it is of queries that are scaled

        def number(values: list[Any], value: Any) -> int:
            if value not in values:
                values.append(value)
            return values.index(value)

        self.of_queries, self.of_keys = [], []
        for layer in range(args.n_layers):
            kind: tuple[float, RopeScaling | None, int | None] = args.rope_theta, args.rope_scaling, args.rotary_dim
            if layer in args.unrotated_layers:
                kind = args.rope_theta, None, 0
            elif args.window_rope_theta is not None and layer not in args.full_layers:
                kind = args.window_rope_theta, None, args.rotary_dim
            at = number(kinds, kind)
            is_scaled = args.query_scaling is not None and (not args.unrotated_layers or layer in args.unrotated_layers)
            self.of_queries.append(number(wanted, (at, is_scaled)))
            self.of_keys.append(number(wanted, (at, False)))
        self._wanted = wanted
        self.kinds = nn.ModuleList(Rotary(args.head_dim, *kind, args.score_factor) for kind in kinds)

    @property
    def count(self) -> int:
        """How many rotations of a position there are."""
        return len(self._wanted)

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return what rotates pairs at positions (n_tokens,): complex (n_rotations, n_tokens, 1, head_dim / 2)."""
        if len(self._wanted) == 1:
            return self.kinds[0](positions, lengths)[None]
        rotations = [rotary(positions, lengths) for rotary in self.kinds]
        if self.query_scaling is None:
            return torch.stack(rotations)
        growth = query_growth(self.query_scaling, positions)[:, None, None]
        return torch.stack([rotations[kind] * growth if scaled else rotations[kind] for kind, scaled in self._wanted])


def query_growth(scaling: QueryScaling, positions: Tensor) -> Tensor:
    """Return by what queries at positions (n_tokens,) are scaled: (n_tokens,), fp32."""
    periods = (positions + scaling.shift).div(scaling.period, rounding_mode="floor")
    return 1 + scaling.beta * torch.log1p(periods.float())


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Return the unscaled rotations of positions 0 to end - 1, (end, dim / 2), complex, as Meta's code calls them."""
    return Rotary(dim, theta, None)(torch.arange(end))[:, 0]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the adjacent pairs of x (n_tokens, heads, head_dim), as in Meta's order of dimensions."""
    if torch.compiler.is_compiling():  # Inductor does not compile complex numbers
        cos, sin = torch.view_as_real(rotation).unbind(-1)
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def scaled_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return radians per position of each rotated pair: (head_dim / 2,), fp32; dynamic scaling stretches them later.

    head_dim: the dimensions that are rotated; LongRoPE's are those of short texts.
    """
    # On the CPU, also where the model is built on the meta device.
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        turns = scaling.old_context_len * frequencies / (2 * math.pi)  # full turns within the old context
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        frequencies = _blend(frequencies, frequencies / scaling.factor, share)
    elif isinstance(scaling, YarnScaling):
        low, high = _yarn_range(head_dim, theta, scaling)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low)
        frequencies = _blend(frequencies, frequencies / scaling.factor, 1 - ramp)
    elif isinstance(scaling, FactorScaling | LongRopeScaling):
        factors = scaling.factors if isinstance(scaling, FactorScaling) else scaling.short_factors
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float64, device="cpu")
    return frequencies.float()


def _blend(original: Tensor, stretched: Tensor, share: Tensor) -> Tensor:
    """Mix frequencies: a `share`, clamped to [0, 1], of the original ones, and the rest of the stretched ones."""
    share = share.clamp(0, 1)
    return original * share + stretched * (1 - share)


def _yarn_range(head_dim: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """Return the pairs between which YaRN goes over from original to stretched (arXiv:2309.00071, section 3.2)."""

    def pair_of(turns: float) -> float:
        return head_dim * math.log(scaling.old_context_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001  # as in transformers
