"""From logits to tokens: pure functions whose randomness is an argument."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

# The token that `sample` returns for a row whose logits are NaN or infinite; it is in no vocabulary.
INVALID = -1

# Devices take fp32 and int64; from far below on, every token is as likely as any other.
MAX_TEMPERATURE = 1e15

# How many of the most probable tokens are sorted, unless their mass is too little: see D8.
TOP_K_PREFIX = 512


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token; wrong values raise ValueError.

    Args:
        temperature: 0 is greedy; higher is more varied.
        top_p: probability mass of the nucleus that tokens are drawn from, in [0, 1]; 0 is greedy.
        max_gen_len: most tokens to generate for a prompt; None is as many as max_seq_len leaves room for.
        seed: the same seed gives the same texts; None goes on with the model's own sequence of seeds.
        logprobs: also return the log-probability of every token.
        echo: repeat the prompt in the completion.
        stop_token: the one token that ends a completion; None is each of the tokenizer's stop_tokens.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_gen_len: int | None = None
    seed: int | None = None
    logprobs: bool = False
    echo: bool = False
    stop_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_gen_len", "seed", "stop_token"):  # numpy's integers are integers, too
            value = getattr(self, name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))
        if not _is_number(self.temperature) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be a number from 0 to {MAX_TEMPERATURE:g}, got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in [0, 1], got {self.top_p!r}")
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.max_gen_len is not None and (type(self.max_gen_len) is not int or self.max_gen_len < 0):
            raise ValueError(f"max_gen_len must be an integer of at least 0, got {self.max_gen_len!r}")
        for name in ("seed", "stop_token"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name} must be an integer, got {value!r}")

    @property
    def is_greedy(self) -> bool:
        """Tell whether each token is the likeliest, whatever the random numbers."""
        return self.temperature == 0 or self.top_p == 0


def uniforms(seed: int, index: int, count: int) -> Tensor:
    """Return `count` random numbers in [0, 1) for the prompt with this index: (count,), fp32, on the CPU.

    They are the same on every machine, and a longer series begins with a shorter one (see D8).
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


class TokenSampler(Protocol):
    """Draws tokens from logits; a backend may have one of its own."""

    def begin(self, params: SamplingParams) -> None:
        """Use these parameters from here on."""
        ...

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Draw one token for each row, (bsz,); see `sample`."""
        ...


class TorchSampler:
    """Draws tokens with torch's operations, on any device."""

    def begin(self, params: SamplingParams) -> None:
        self.params = params

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return sample(logits, self.params.temperature, self.params.top_p, uniform)


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Return one token for each row, (bsz,): drawn from the nucleus, at temperature 0 or top_p 0 the greatest logit's.

    logits: (bsz, vocab_size), fp32; uniform: (bsz,), in [0, 1). Rows without a finite maximum get INVALID.
    """
    highest, greedy = logits.max(dim=-1)  # NaN wins a maximum
    tokens = greedy if 0 in (temperature, top_p) else draw(nucleus(logits, temperature, top_p), uniform)
    return tokens.where(highest.isfinite(), INVALID)


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the tokens of the nucleus and their probabilities, both (bsz, n), not renormalised (arXiv:1904.09751).

    A token stays while the mass before it is <= top_p, so one always stays; the others get probability 0. Tokens are
    in order of falling probability, and of ids among equals (see D19); with top_p 1, in the vocabulary's order.
    """
    # Subtract the maximum before the division, which could overflow at a small temperature; a temperature that is 0
    # in fp32 would divide 0 by 0.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    probs = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    vocab_size = probs.shape[-1]
    if top_p == 1:
        return torch.arange(vocab_size, device=probs.device).expand_as(probs), probs
    top_probs, tokens = probs.topk(min(TOP_K_PREFIX, vocab_size))
    # Which of the tokens that tie with the last are among the top k is not defined: the mass above must exceed top_p.
    above = top_probs.where(top_probs > top_probs[:, -1:], 0).sum(-1)
    if top_probs.shape[-1] < vocab_size and bool((above <= top_p).any()):
        top_probs, tokens = probs.sort(dim=-1, descending=True, stable=True)
    else:
        tokens, by_id = tokens.sort(dim=-1)
        top_probs, by_prob = top_probs.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(-1, by_prob)
    before = top_probs.cumsum(-1) - top_probs
    return tokens, top_probs.where(before <= top_p, 0)


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw a token of each row of probs, (bsz, vocab_size), from its nucleus, (bsz, 1), as Meta's code calls it.

    The random numbers are those of torch's global generator, as there.
    """
    tokens, kept = nucleus(probs.float().log(), 1.0, p)
    return tokens.gather(-1, torch.multinomial(kept, 1))


def draw(candidates: tuple[Tensor, Tensor], uniform: Tensor) -> Tensor:
    """Draw one token for each row, (bsz,): invert the cumulative distribution of (tokens, probs), both (bsz, n)."""
    tokens, probs = candidates
    mass = probs.cumsum(-1)
    target = uniform.to(mass)[:, None] * mass[:, -1:]
    index = (mass <= target).sum(-1, keepdim=True)
    # Rounding can put the target on the whole mass: then take the last token with a probability above 0 (NaN is not).
    indices = torch.arange(probs.shape[-1], device=probs.device)
    index = index.minimum((indices * (probs > 0)).amax(-1, keepdim=True))
    return tokens.gather(-1, index)[:, 0]


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token under its logits, before any temperature: fp32, shaped like tokens."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
