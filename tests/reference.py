"""The LLaMA forward pass in plain loops and fp64, written from the papers: no cache, no batch, no code of llama/."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
from torch import Tensor


def reference_logits(
    state: dict[str, Tensor],
    tokens: list[int],
    *,
    n_heads: int,
    n_kv_heads: int,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    scaling: Any = None,
) -> Tensor:
    """Logits (seqlen, vocab_size) of one row, from whole tensors under Meta's names."""
    weights = {name.removesuffix(".weight"): tensor.double() for name, tensor in state.items()}
    head_dim = weights["layers.0.attention.wq"].shape[0] // n_heads
    speeds = [rope_speed(pair, head_dim, rope_theta, scaling) for pair in range(head_dim // 2)]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + norm_eps) * weight

    xs = [weights["tok_embeddings"][token] for token in tokens]
    layer = 0
    while f"layers.{layer}.attention.wq" in weights:
        w = {name.removeprefix(f"layers.{layer}."): weight for name, weight in weights.items()}
        queries, keys, values = [], [], []
        for position, x in enumerate(xs):
            h = norm(x, w["attention_norm"])
            queries.append([turn(q, position, speeds) for q in (w["attention.wq"] @ h).split(head_dim)])
            keys.append([turn(k, position, speeds) for k in (w["attention.wk"] @ h).split(head_dim)])
            values.append((w["attention.wv"] @ h).split(head_dim))
        for position in range(len(xs)):
            heads = []
            for head in range(n_heads):
                kv_head = head * n_kv_heads // n_heads
                scores = [
                    math.exp(float(queries[position][head] @ keys[past][kv_head]) / math.sqrt(head_dim))
                    for past in range(position + 1)
                ]
                heads.append(sum(score / sum(scores) * values[past][kv_head] for past, score in enumerate(scores)))
            x = xs[position] + w["attention.wo"] @ torch.cat(heads)
            h = norm(x, w["ffn_norm"])
            gate = w["feed_forward.w1"] @ h
            xs[position] = x + w["feed_forward.w2"] @ (gate / (1 + torch.exp(-gate)) * (w["feed_forward.w3"] @ h))
        layer += 1
    output = weights.get("output", weights["tok_embeddings"])
    return torch.stack([output @ norm(x, weights["norm"]) for x in xs])


def turn(head: Tensor, position: int, speeds: list[float]) -> Tensor:
    """Each adjacent pair as a complex number, turned by position times its speed."""
    turned = []
    for pair, speed in enumerate(speeds):
        number = complex(float(head[2 * pair]), float(head[2 * pair + 1])) * cmath.exp(1j * position * speed)
        turned += [number.real, number.imag]
    return torch.tensor(turned, dtype=torch.float64)


def rope_speed(pair: int, head_dim: int, theta: float, scaling: Any) -> float:
    """Radians per position of a pair; Llama 3.1 slows down the long wavelengths."""
    speed = theta ** (-2 * pair / head_dim)
    if scaling is None:
        return speed
    wavelength = 2 * math.pi / speed
    if wavelength < scaling.old_context_len / scaling.high_freq_factor:
        return speed
    if wavelength > scaling.old_context_len / scaling.low_freq_factor:
        return speed / scaling.factor
    smooth = scaling.old_context_len / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * speed / scaling.factor + smooth * speed
