"""Attention, what lies between the products, and sampling against fp64 on the same inputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checking.bench import Bench
from gpu_checking.random_models import random_values
from gpu_checking.report import differing, relative_error
from llama import sampling
from llama.backends.cuda import attention, elementwise
from llama.backends.cuda import sampling as gpu_sampling
from llama.rope import Rotary

ATTENTION_BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
FP32_BOUND = 1e-6
BSZ = 3
# How far a random number and top_p are moved, which must not change a token that is compared: fp32 is off by less.
MARGIN = 5e-6
DRAWS = 16  # rows


# --- attention -----------------------------------------------------------------------------------------------------


def check_attention(bench: Bench) -> None:
    bound = ATTENTION_BOUNDS[bench.dtype]
    for heads, read in itertools.product(bench.size.heads, bench.size.read):
        for seqlen, windowed in itertools.product(bench.size.queries, (False, True)):
            if seqlen > read:
                continue
            seen = attended(bench, *heads, read, seqlen, read // 3 if windowed else None)
            what = f"attention {heads[0]}/{heads[1]} heads of {heads[2]}, queries: {seqlen} of {read}"
            if windowed:
                what += f", window {seen.window}"
            bench.report.check(what, bound, seen.error)
            if seqlen == attention.FEW:
                bench.report.check(f"{what}, values that differ alone", 0, seen.differing_alone)


@dataclass(frozen=True)
class Attended:
    """Queries q (bsz, seqlen, n_heads, head_dim) from start_pos on, and a layer's keys and values."""

    q: Tensor
    keys: Tensor
    values: Tensor
    start_pos: Tensor
    window: int | None

    def error(self) -> float:
        y = attention.attend(self.q, self.keys, self.values, self.start_pos, self.window)
        return relative_error(y, exact_attention(self))

    def differing_alone(self) -> float:
        together = attention.attend(self.q, self.keys, self.values, self.start_pos, self.window)
        tokens = (0, 3, self.q.shape[1] - 1)
        alone = [
            attention.attend(self.q[:, i : i + 1], self.keys, self.values, self.start_pos + i, self.window)
            for i in tokens
        ]
        return differing(torch.cat(alone, dim=1), together[:, list(tokens)])


def attended(
    bench: Bench, n_heads: int, n_kv_heads: int, head_dim: int, read: int, seqlen: int, window: int | None
) -> Attended:
    """Rows of which one is full, one begins and one is between; what they have not written is large."""
    # Sharp enough that a wrong maximum shows.
    q = random_values((BSZ, seqlen, n_heads, head_dim), 2.0, bench.device, bench.dtype)
    keys, values = random_values((2, BSZ, read, n_kv_heads, head_dim), 1.0, bench.device, bench.dtype)
    start_pos = torch.tensor([read - seqlen, 0, (read - seqlen) // 2], device=bench.device)
    for row, start in enumerate(start_pos.tolist()):
        values[row, start + seqlen :] = 1000
    return Attended(q, keys, values, start_pos, window)


def exact_attention(of: Attended) -> Tensor:
    bsz, seqlen, n_heads, head_dim = of.q.shape
    positions = (of.start_pos[:, None] + torch.arange(seqlen, device=of.q.device))[:, :, None]
    places = torch.arange(of.keys.shape[1], device=of.q.device)
    sees = places <= positions  # (bsz, seqlen, kv_len)
    if of.window is not None:
        sees &= places > positions - of.window
    q = of.q.double().unflatten(2, (of.keys.shape[2], -1))  # (bsz, seqlen, n_kv_heads, group, head_dim)
    scores = torch.einsum("bshgd,bkhd->bhgsk", q, of.keys.double()) / head_dim**0.5
    weights = scores.masked_fill_(~sees[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgsk,bkhd->bshgd", weights, of.values.double()).flatten(2, 3)


# --- between the products ------------------------------------------------------------------------------------------


def check_between(bench: Bench) -> None:
    check, eps, args = bench.report.check, torch.finfo(bench.dtype).eps, bench.size.args
    for dim in (args.dim, args.dim * 9 // 8):
        for what, error, bound in (("sum", sum_error, FP32_BOUND), ("norm", norm_error, eps)):
            check(f"{what} of {dim}", bound, error, bench, dim)
    check(f"gate of {args.hidden_dim}", eps, gate_error, bench, args.hidden_dim)
    for heads in bench.size.heads:
        for what in ("queries", "keys", "values"):
            name = f"rotated {what}, {heads[0]}/{heads[1]} heads of {heads[2]}"
            check(name, eps, rotation_error, bench, *heads, what)


def _summed(bench: Bench, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (5, dim), what it grows by, and the norm's weight."""
    x, delta = (torch.randn(5, dim, device=bench.device) for _ in range(2))
    return x, delta.to(bench.dtype), torch.randn(dim, device=bench.device, dtype=bench.dtype)


def sum_error(bench: Bench, dim: int) -> float:
    x, delta, weight = _summed(bench, dim)
    exact = x.double() + delta.double()
    elementwise.add_and_norm(x, delta, weight, 1e-5, bench.dtype)
    return relative_error(x, exact)


def norm_error(bench: Bench, dim: int) -> float:
    x, delta, weight = _summed(bench, dim)
    exact = x.double() + delta.double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    y = elementwise.add_and_norm(x, delta, weight, 1e-5, bench.dtype)
    return relative_error(y, exact)


def gate_error(bench: Bench, hidden_dim: int) -> float:
    both = torch.randn(5, 2 * hidden_dim, device=bench.device, dtype=bench.dtype)
    gates, ups = both.double().chunk(2, dim=-1)
    return relative_error(elementwise.gate(both), F.silu(gates) * ups)


def rotation_error(bench: Bench, n_heads: int, n_kv_heads: int, head_dim: int, what: str) -> float:
    """Of rows of three tokens, the last of which has no place in the cache for one of them."""
    seqlen, room = 3, 40
    rotary = Rotary(head_dim, 500000.0, None).to(bench.device)
    start_pos = torch.tensor([0, 17, room - 2], device=bench.device)
    rotation = rotary(start_pos[:, None] + torch.arange(seqlen, device=bench.device))
    shape = BSZ * seqlen, (n_heads + 2 * n_kv_heads) * head_dim
    qkv = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    cache = torch.zeros(2, BSZ, room, n_kv_heads, head_dim, device=bench.device, dtype=bench.dtype)
    q = elementwise.rotate_and_keep(qkv, rotation, start_pos, cache[0], cache[1], n_heads, n_kv_heads)
    heads = qkv.double().view(BSZ, seqlen, -1, head_dim)
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * rotation
    turned = torch.view_as_real(pairs).flatten(-2)
    if what == "queries":
        return relative_error(q, turned[:, :, :n_heads])
    expected = torch.zeros(cache[0].shape, device=bench.device, dtype=torch.float64)
    written = turned[:, :, n_heads:-n_kv_heads] if what == "keys" else heads[:, :, -n_kv_heads:]
    for row, start in enumerate(start_pos.tolist()):
        expected[row, start : start + seqlen] = written[row, : room - start]
    return relative_error(cache[0 if what == "keys" else 1], expected)


# --- sampling ------------------------------------------------------------------------------------------------------


def check_sampling(bench: Bench) -> None:
    check = bench.report.check
    for vocab_size in bench.size.vocab_sizes:
        logits = 4 * torch.randn(DRAWS, vocab_size, device=bench.device)
        logits[1] = logits[1].bfloat16().float()  # full of ties
        logits[2] /= 8
        logits[3, vocab_size // 2] = 60.0
        check(f"greedy of {vocab_size}, other tokens", 0, other_than_greatest, logits)
        for temperature, top_p in ((0.6, 0.9), (1.3, 0.5), (0.8, 1.0)):
            what = f"sampled of {vocab_size} at temperature {temperature}, top_p {top_p}"
            check(f"{what}, other tokens", 0, other_than_drawn, logits, temperature, top_p)


def other_than_greatest(logits: Tensor) -> float:
    return differing(gpu_sampling.greedy(logits), logits.max(-1, keepdim=True).values.eq(logits).int().argmax(-1))


def other_than_drawn(logits: Tensor, temperature: float, top_p: float) -> float:
    """Tokens that differ from llama.sampling's in fp64, where these do not depend on the last digits of fp32.

    ValueError where fewer than half of the rows can be compared.
    """
    uniform = (torch.arange(len(logits), device=logits.device) + 0.5) / len(logits)
    expected = sampling.sample(logits.double(), temperature, top_p, uniform)
    sure = torch.ones_like(expected, dtype=torch.bool)
    for moved, share in itertools.product((-MARGIN, MARGIN), (top_p - MARGIN, top_p + MARGIN)):
        near = sampling.sample(logits.double(), temperature, share if top_p < 1 else 1.0, uniform.double() + moved)
        sure &= near == expected
    if sure.sum() < len(logits) / 2:
        raise ValueError(f"only {int(sure.sum())} of {len(logits)} rows can be compared")
    warmth, nucleus = (torch.tensor(value, device=logits.device) for value in (temperature, top_p))
    if top_p == 1:
        found = gpu_sampling.sample_all(logits, warmth, uniform)
    else:
        found = gpu_sampling.sample(logits, warmth, nucleus, uniform)
    return differing(found[sure], expected[sure])
