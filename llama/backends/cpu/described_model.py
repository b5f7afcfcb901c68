"""A model as the kernels take it: C structures that point at its weights, written once."""

from __future__ import annotations

import ctypes
import functools
from typing import cast

import torch
from torch import Tensor

from llama.backends.cpu import ops, structures
from llama.backends.cpu.packed_weight import PackedWeight
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.feed_forward import ExpertsFeedForward, FeedForward
from llama.model import Attention, Transformer, TransformerBlock
from llama.norms import LayerNorm, RMSNorm


class DescribedModel:
    """The C structures of a model, and what they point at beside its weights.

    layers: of all layers; table, output: the embedding table and the output projection; n_rotations: that layers take.
    """

    def __init__(self, model: Transformer) -> None:
        self._args, self._n_ranks = model.args, model.parallel.size
        # Vectors in fp32, and the structures of adapters and of experts.
        self._vectors: list[Tensor] = []
        self._low_ranks: list[structures.LowRankView] = []
        self._experts: list[structures.ExpertsView] = []
        layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self.layers = (structures.Layer * len(layers))()
        rotations = model.rope.of_queries, model.rope.of_keys
        self.n_rotations = 1 + max(map(max, rotations))
        for layer, described, of_queries, of_keys in zip(layers, self.layers, *rotations, strict=True):
            attention = layer.attention
            for name in ("wq", "wk", "wv", "wo"):
                setattr(described, name, self._describe(getattr(attention, name)))
            self._describe_feed_forward(layer.feed_forward, described)
            described.activation.kind = structures.ACTIVATION_IDS[self._args.activation]
            if isinstance(layer.feed_forward, FeedForward) and self._args.activation == "xielu":
                described.activation.slopes = self._vector(layer.feed_forward.xielu.weight)
            for half in ("attention", "ffn"):
                name = f"{half}_output_norm" if self._args.output_norms else f"{half}_norm"
                setattr(described, name, self._describe_norm(getattr(layer, f"{half}_norm")))
            described.sight = structures.SightView(attention.sight.window or 0, attention.sight.chunk or 0)
            described.q_rotation, described.k_rotation = of_queries, of_keys
            self._describe_head_norms(attention, described)
        self.table, self.output = self._describe(model.tok_embeddings), self._describe(model.output)

    def _describe(
        self, module: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding
    ) -> structures.WeightView:
        """Return the C structure of a linear or of the embedding table."""
        weight = module.weight
        assert isinstance(weight, Tensor | PackedWeight), type(weight)
        described = weight.describe() if isinstance(weight, PackedWeight) else ops.float_weight(weight)
        # Where ranks add up results, the bias is added once, after the sum.
        bias = None if isinstance(module, VocabParallelEmbedding) else module.bias
        if bias is not None and (isinstance(module, ColumnParallelLinear) or self._n_ranks == 1):
            described.bias = self._vector(bias)
        if (adapters := module.low_rank) is not None:
            view = ops.low_rank(adapters.a, adapters.b)
            adapters.matmul, adapters.add = ops.multiply_floats, functools.partial(ops.add_low_rank, view)
            self._low_ranks.append(view)
            described.low_rank = ctypes.addressof(view)
        return described

    def _describe_feed_forward(
        self, module: FeedForward | ExpertsFeedForward, to: structures.Layer | structures.Expert
    ) -> None:
        """Write the C structures of a feed-forward to those of a layer, or of an expert."""
        if isinstance(module, FeedForward):
            for name in ("w1", "w2", "w3") if self._args.is_gated else ("w2", "w3"):
                setattr(to, name, self._describe(getattr(module, name)))
            return
        described = (structures.Expert * module.n_experts)()
        for expert, weights in zip(module.experts, described, strict=True):
            self._describe_feed_forward(expert, weights)
        router = structures.ROUTER_IDS[module.router]
        view = structures.ExpertsView(self._describe(module.gate), described, module.n_experts, module.n_active, router)
        self._experts.append(view)
        to.experts = ctypes.addressof(view)
        if module.shared is not None:
            self._describe_feed_forward(module.shared, to)

    def _describe_norm(self, norm: RMSNorm | LayerNorm) -> structures.NormView:
        bias = self._vector(norm.bias) if isinstance(norm, LayerNorm) else None
        return structures.NormView(self._vector(norm.weight), bias)

    def _describe_head_norms(self, attention: Attention, described: structures.Layer) -> None:
        """Write to a layer's C structure how its queries and keys are normalised."""
        kind = attention.qk_norm
        described.head_norm = structures.HEAD_NORM_IDS[kind]
        if kind == "all heads" and self._n_ranks > 1:
            described.head_norm = structures.HEADS_OF_RANKS
        elif kind == "unit":
            described.q_norm = described.k_norm = self._vector(torch.ones(attention.head_dim, device="cpu"))
        elif kind is not None:
            described.q_norm, described.k_norm = (
                self._vector(cast(Tensor, norm.weight)) for norm in (attention.q_norm, attention.k_norm)
            )

    def _vector(self, values: Tensor) -> ctypes.c_void_p:
        """Return the address of values in fp32, which are kept."""
        self._vectors.append(values.float())
        return ops.vector(self._vectors[-1], values.numel())
