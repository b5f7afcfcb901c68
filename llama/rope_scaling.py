"""The ways of stretching rotary position embeddings beyond a trained context, as data; `llama.rope` computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama.checks import check_int, check_number


@dataclass(frozen=True)
class LinearScaling:
    """Linear scaling (arXiv:2306.15595), which multiplies every rotary wavelength by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check_number("factor", self.factor)


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK-aware scaling: rows longer than old_context_len are stretched, the more the longer they are."""

    factor: float
    old_context_len: int

    def __post_init__(self) -> None:
        check_number("factor", self.factor)
        check_int("old_context_len", self.old_context_len)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling, which stretches long rotary wavelengths only.

    Wavelengths above old_context_len / low_freq_factor are multiplied by `factor`, those below
    old_context_len / high_freq_factor stay as they are, and those between are blended; Llama 4 has none between.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(name, getattr(self, name))
        check_int("old_context_len", self.old_context_len)
        if self.low_freq_factor > self.high_freq_factor:
            raise ValueError(f"low_freq_factor must not be above high_freq_factor, got {self}")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN scaling (arXiv:2309.00071), pair by pair.

    Pairs that turn more than beta_fast times within old_context_len stay as they are, those that turn less than
    beta_slow times are stretched by `factor`, and those between are blended.
    """

    factor: float
    old_context_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True  # whether the range of pairs is rounded outwards to whole pairs

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            check_number(name, getattr(self, name))
        check_int("old_context_len", self.old_context_len)
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor)

    @property
    def magnitude(self) -> float:
        """The factor of rotated queries and of rotated keys, which sharpens attention."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class FactorScaling:
    """One wavelength factor for each rotated pair, as GGUF files store Llama 3.1's scaling."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            check_number("rope factor", factor)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): wavelength factors for each rotated pair, others in texts beyond old_context_len."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    old_context_len: int
    magnitude: float  # the factor of rotated queries and of rotated keys

    def __post_init__(self) -> None:
        check_int("old_context_len", self.old_context_len)
        check_number("attention_factor", self.magnitude)
        for factor in (*self.short_factors, *self.long_factors):
            check_number("rope factor", factor)


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | FactorScaling | LongRopeScaling
# Those that rotate by the length of the text that a token is in.
LengthScaling = DynamicScaling | LongRopeScaling


@dataclass(frozen=True)
class QueryScaling:
    """Scale queries the more the later they are: by 1 + beta ln(1 + floor((position + shift) / period)), as Llama 4."""

    beta: float
    period: int
    shift: int = 0  # 1 where positions count from 1

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        check_int("period", self.period)
        if self.shift not in (0, 1):
            raise ValueError(f"shift must be 0 or 1, got {self.shift!r}")
