"""The layers of a model on a GPU, computed by kernels in Triton for backend.py.

Nine kernels a layer of Llama's for a few tokens, and one more where all heads are normalised together. They find all
lengths on the device, so that a step can be captured (graphs.py). The sum over layers is fp32. Of many tokens, torch
multiplies the matrices and the kernels do what lies between.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import attend
from llama.backends.cuda import attention, elementwise, gemm, gemv
from llama.backends.cuda.elementwise import NormWeights
from llama.backends.cuda.heads import HeadNorms, mean_squares, rope_and_append_kv
from llama.backends.cuda.matmul import GpuWeight, is_few, matmul
from llama.backends.cuda.one_shot import OneShot, open_one_shot
from llama.cache import ForwardBatch, RowGroup
from llama.distributed.job import local_world_size
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.model import Attention, FeedForward, Transformer, TransformerBlock
from llama.norms import AllHeadsNorm, LayerNorm, RMSNorm
from llama.quantization.planar import MAX_GEMV_TOKENS, Fp8Weight, PlanarWeight
from llama.quantization.weights import LowRank


@dataclass(frozen=True)
class Joined:
    """Linears of the same input whose weights lie one below another, where they are stored alike."""

    weights: list[GpuWeight]
    bias: Tensor | None
    low_ranks: list[tuple[int, LowRank]]  # adapters, each with the first of the outputs that it is added to

    def __call__(self, x: Tensor) -> Tensor:
        """x (n_tokens, in) times all weights, plus the bias: (n_tokens, all outputs); fp32 of few tokens and floats."""
        if len(self.weights) == 1:
            y = matmul(x, self.weights[0], self.bias)
        else:
            y = torch.cat([matmul(x, weight) for weight in self.weights], dim=-1)
            y = y if self.bias is None else y + self.bias
        for first, low_rank in self.low_ranks:
            low_rank.add_to(y[:, first : first + len(low_rank.b)], x)
        return y


class GpuLayers:
    """Runs a Transformer's layers. It joins their weights in place: a model whose weights change drops it."""

    def __init__(self, model: Transformer) -> None:
        self.args, self.parallel, self.dtype = model.args, model.parallel, model.dtype
        self.tok_embeddings, self.rope, self.device = model.tok_embeddings, model.rope, model.device
        self.layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self._qkv = [join([layer.attention.wq, layer.attention.wk, layer.attention.wv]) for layer in self.layers]
        self._ups = [_join_ups(layer.feed_forward) for layer in self.layers]
        self._head_norms = [_head_norms(layer.attention) for layer in self.layers]
        norms = [weights_of(norm) for layer in self.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        of_states: list[NormWeights | None] = [*norms, weights_of(model.norm)]
        # Of each sum of states and of what is added to them, before each half of a layer and at the end.
        if self.args.output_norms:
            self._norms = list(zip([None] * len(norms) + of_states[-1:], [None, *norms], strict=True))
        else:
            self._norms = [(norm, None) for norm in of_states]
        weights = [
            module.weight
            for module in model.layers.modules()
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        ]
        self._has_floats = any(isinstance(weight, Tensor) for weight in weights)
        self.n_local_heads = self.layers[0].attention.n_local_heads
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # the weights before they were joined: too small for torch to use for larger ones

    @cached_property
    def _one_shot(self) -> OneShot | None:
        """Opened by all ranks at once, when they first compute."""
        if self.parallel.group is None or self.parallel.size == 1:
            return None
        numel = MAX_GEMV_TOKENS * self.args.dim
        return open_one_shot(self.parallel.group, numel, self.device, local_world_size())

    def __call__(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        """See `Transformer.run_layers`."""
        with torch.cuda.device_of(tokens):
            return self._run(tokens, rotations.unbind(), batch)

    def _run(self, tokens: Tensor, rotations: Sequence[Tensor], batch: ForwardBatch) -> Tensor:
        sums = self._one_shot  # before anything is captured
        x = self.tok_embeddings(tokens).to(torch.float32, copy=True)
        n_tokens = len(x)
        if self._has_floats and n_tokens < MAX_GEMV_TOKENS:
            # See padded_matmul: here once for all products. Quantized weights beside floats then take gemm, not gemv.
            x = F.pad(x, (0, 0, 0, MAX_GEMV_TOKENS - n_tokens))
        heads = x.new_zeros(len(x), self.n_local_heads * self.args.head_dim, dtype=self.dtype)
        starts = [batch.positions[group.tokens][:: group.seqlen].contiguous() for group in batch.groups]
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            h = self._add_and_norm(x, delta, 2 * i)
            qkv, norms = self._qkv[i](h)[:n_tokens], self._head_norms[i]
            n_heads = layer.attention.n_local_heads, layer.attention.n_local_kv_heads
            means = None
            if norms is not None and norms.shares is not None:
                means = self._all_reduce(mean_squares(qkv, norms.shares, *n_heads), sums)
            turns = rotations[self.rope.of_queries[i]], rotations[self.rope.of_keys[i]]
            keys, values = batch.cache.keys[i], batch.cache.values[i]
            q = rope_and_append_kv(qkv, turns, batch.slots, keys, values, *n_heads, norms, means)
            for group, start_pos in zip(batch.groups, starts, strict=True):
                shape = group.n_rows, group.seqlen, *q.shape[1:]
                self._attend(q[group.tokens].view(shape), start_pos, batch, group, i, heads[group.tokens].view(shape))
            delta = self._sum(heads, layer.attention.wo, sums)
            h = self._add_and_norm(x, delta, 2 * i + 1)
            delta = self._sum(self._activated(h, i), layer.feed_forward.w2, sums)
        return self._add_and_norm(x, delta, -1)[:n_tokens]

    def _add_and_norm(self, x: Tensor, delta: Tensor | None, at: int) -> Tensor:
        of_sum, of_delta = self._norms[at]
        return elementwise.fused_add_norm(x, delta, of_sum, self.args.norm_eps, self.dtype, of_delta)

    def _attend(
        self, q: Tensor, start_pos: Tensor, batch: ForwardBatch, group: RowGroup, layer: int, out: Tensor
    ) -> None:
        """Attention of a group's queries (n_rows, seqlen, n_heads, head_dim) to out, of the same shape."""
        sight = self.layers[layer].attention.sight
        whole = group.from_start and group.seqlen > MAX_GEMV_TOKENS and sight.reaches(group.kv_len)
        if whole and q.dtype != torch.float32:
            # A whole prompt: torch has flash attention for it, but in fp32 a matrix of all scores.
            out.copy_(attend(q, *batch.read(layer, group), None))
        else:
            keys, values, table = batch.cache.keys[layer], batch.cache.values[layer], batch.page_table[group.rows]
            attention.flash_attention(q, keys, values, table, start_pos, sight, out)

    def _activated(self, h: Tensor, layer: int) -> Tensor:
        """silu(w1 h) * w3 h, or another activation of w3 h: (n_tokens, this rank's hidden features)."""
        ups, activation = self._ups[layer], self.args.activation
        slopes = self.layers[layer].feed_forward.xielu.weight if activation == "xielu" else None
        weight = ups.weights[0]
        plain = len(ups.weights) == 1 and ups.bias is None and not ups.low_ranks
        if plain and not isinstance(weight, Tensor) and is_few(h, weight):
            if self.args.is_gated:
                return gemv.gated_gemv(h, weight) if len(h) == 1 else gemm.gated_gemm(h, weight)
            multiply = gemv.gemv if len(h) == 1 else gemm.gemm
            return multiply(h, weight, activation=activation, slopes=slopes)
        if self.args.is_gated:
            return elementwise.silu_and_mul(ups(h), self.dtype)
        return elementwise.activate(ups(h), activation, slopes, self.dtype)

    def _sum(self, x: Tensor, last: RowParallelLinear, sums: OneShot | None) -> Tensor:
        """x times the weight, summed over the ranks: in fp32 for few tokens."""
        delta = matmul(x, held(last), few_dtype=torch.float32)
        if last.low_rank is not None:
            last.low_rank.add_to(delta, x)
        delta = self._all_reduce(delta, sums)
        return delta if last.bias is None else delta + last.bias

    def _all_reduce(self, x: Tensor, sums: OneShot | None) -> Tensor:
        return sums(x) if sums is not None and sums.takes(x) else self.parallel.all_reduce(x)


def weights_of(norm: RMSNorm | LayerNorm) -> NormWeights:
    return NormWeights(norm.weight, norm.bias if isinstance(norm, LayerNorm) else None)


def _head_norms(module: Attention) -> HeadNorms | None:
    if module.qk_norm is None:
        return None
    if module.qk_norm == "unit":
        return HeadNorms("unit", module.norm_eps)
    q, k = cast("tuple[RMSNorm | AllHeadsNorm, RMSNorm | AllHeadsNorm]", (module.q_norm, module.k_norm))
    shares = None
    if isinstance(q, AllHeadsNorm) and isinstance(k, AllHeadsNorm):
        shares = torch.cat([1 / (norm.dim * norm.repeats.float()) for norm in (q, k)])
    return HeadNorms(module.qk_norm, module.norm_eps, q.weight, k.weight, shares)


def _join_ups(module: FeedForward) -> Joined:
    """Join what goes up into a feed-forward: w1, where it has a gate, and w3."""
    return join([module.w1, module.w3] if module.activation == "silu" else [module.w3])


def held(linear: ColumnParallelLinear | RowParallelLinear) -> GpuWeight:
    weight = linear.weight
    assert isinstance(weight, Tensor | PlanarWeight | Fp8Weight), type(weight)
    return weight


def join(linears: Sequence[ColumnParallelLinear]) -> Joined:
    """Join the weights of neighbours that are stored alike; those of the linears become parts of the joined ones."""
    runs: list[list[ColumnParallelLinear]] = []
    for each in linears:
        if runs and _stored_as(held(runs[-1][0])) == _stored_as(held(each)):
            runs[-1].append(each)
        else:
            runs.append([each])
    biases: list[Tensor] = [each.bias for each in linears if each.bias is not None]
    starts = itertools.accumulate((held(each).shape[0] for each in linears), initial=0)
    low_ranks = [(at, each.low_rank) for at, each in zip(starts, linears, strict=False) if each.low_rank is not None]
    return Joined([_join_run(run) for run in runs], torch.cat(biases) if biases else None, low_ranks)


def _stored_as(weight: GpuWeight) -> object:
    return weight.dtype if isinstance(weight, Tensor) else weight.block_type


def _join_run(linears: list[ColumnParallelLinear]) -> GpuWeight:
    weights = [held(each) for each in linears]
    if len(weights) == 1:
        return weights[0]
    stops = itertools.accumulate(weight.shape[0] for weight in weights)
    joined = _below_another(weights)
    start = 0
    for each, stop in zip(linears, stops, strict=True):
        del each.weight
        if isinstance(joined, Tensor):
            each.weight = nn.Parameter(joined[start:stop], requires_grad=False)
        else:
            each.weight = joined.part(start, stop)
        start = stop
    return joined


def _below_another(weights: Sequence[GpuWeight]) -> GpuWeight:
    if isinstance(weights[0], PlanarWeight):
        return PlanarWeight.join(cast("list[PlanarWeight]", weights))
    if isinstance(weights[0], Fp8Weight):
        return Fp8Weight.join(cast("list[Fp8Weight]", weights))
    return torch.cat(cast("list[Tensor]", weights))
