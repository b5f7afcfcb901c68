"""The layers of a model on a CPU, computed by the C++ kernels.

A few tokens pass through all layers in one call, with activations in fp32; a token's result does not depend on the
tokens beside it (see D30). For many tokens, the kernels compute what lies between matrix products: norms, rotations and
the gates of feed-forwards.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cpu import ops
from llama.backends.cpu.packed_weight import PackedWeight
from llama.backends.eager import EagerBackend
from llama.cache import KVCache
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.model import Transformer, TransformerBlock, attend

# A sliding window longer than any cache.
NO_WINDOW = 1 << 40


class CpuBackend(EagerBackend):
    """Computes a Transformer by kernels, which point at its weights: a model whose weights change drops its backend."""

    name = "cpu"
    own_kernels = True
    weight_cls = PackedWeight
    keeps_stored_blocks = True

    def bind(self, model: Transformer) -> None:
        self.args, self.parallel, self.dtype = model.args, model.parallel, model.dtype
        self.tok_embeddings, self.norm, self.output = model.tok_embeddings, model.norm, model.output
        self._biases: list[Tensor] = []  # fp32 copies, which the C structures point at
        self.layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self._c_layers = (ops.Layer * len(self.layers))()
        self._norms: list[tuple[Tensor, Tensor]] = []
        for layer, described in zip(self.layers, self._c_layers, strict=True):
            attention, feed_forward = layer.attention, layer.feed_forward
            for name in ("wq", "wk", "wv", "wo"):
                setattr(described, name, self._describe(getattr(attention, name)))
            for name in ("w1", "w2", "w3"):
                setattr(described, name, self._describe(getattr(feed_forward, name)))
            norms = layer.attention_norm.weight.float(), layer.ffn_norm.weight.float()
            described.attention_norm, described.ffn_norm = (ops.vector(weight, self.args.dim) for weight in norms)
            self._norms.append(norms)
        self._c_output = self._describe(self.output)
        self._c_table = self._describe(self.tok_embeddings)
        self._norm_weight = self.norm.weight.float()
        attention = self.layers[0].attention
        # Fields of LayersInput that are the same for every call.
        self._constants = {
            "dim": self.args.dim,
            "n_heads": attention.n_local_heads,
            "n_kv_heads": attention.n_local_kv_heads,
            "head_dim": self.args.head_dim,
            "hidden_dim": self.parallel.part(self.args.hidden_dim, self.parallel.ffn_multiple),
            "window": self.args.sliding_window or NO_WINDOW,
            "eps": self.args.norm_eps,
        }
        super().bind(model)

    def run_layers(self, tokens: Tensor, positions: Tensor, rotation: Tensor, kv_len: int, cache: KVCache) -> Tensor:
        """Return final states as `Transformer.run_layers` does, in fp32."""
        bsz, seqlen = tokens.shape
        residual = self._embed(tokens).view(bsz * seqlen, -1)
        positions = positions.contiguous()
        inputs = self._inputs(residual, positions, rotation, cache)
        if bsz * seqlen <= ops.MAX_GEMV_TOKENS:
            self._run_few(residual, inputs)
        else:
            self._run_many(residual, inputs, positions, self.model.mask(positions, kv_len), cache)
        hidden = F.rms_norm(residual, self._norm_weight.shape, self._norm_weight, self.args.norm_eps)
        return hidden.view(bsz, seqlen, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        if ops.is_gemv(hidden):
            return ops.gemv(self._c_output, hidden)
        return self.output(hidden, torch.float32)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens (bsz, seqlen) in new memory, fp32: layers add to them in place."""
        table = self.tok_embeddings.weight
        if self.parallel.size > 1:
            return self.tok_embeddings(tokens).to(torch.float32, copy=True)
        if isinstance(table, Tensor):
            return F.embedding(tokens, table).float()
        return ops.embedding(self._c_table, tokens)

    def _run_few(self, x: Tensor, inputs: ops.LayersInput) -> None:
        """Run the layers in C++ on the residual x (n_tokens, dim), in place; ranks add up results after each half."""
        if self.parallel.size == 1:
            both = ops.ATTENTION | ops.FEED_FORWARD
            ops.run_layers(self._c_layers, 0, len(self._c_layers), both, inputs)
            return
        for i, layer in enumerate(self.layers):
            halves = ((ops.ATTENTION, layer.attention.wo), (ops.FEED_FORWARD, layer.feed_forward.w2))
            for half, last in halves:
                share = torch.empty_like(x)
                (inputs.out,) = ops.pointers((share, torch.float32, x.numel()))
                ops.run_layers(self._c_layers, i, i + 1, half, inputs)
                x += self.parallel.all_reduce(share)
                if last.bias is not None:
                    x += last.bias

    def _run_many(
        self, x: Tensor, inputs: ops.LayersInput, positions: Tensor, mask: Tensor | None, cache: KVCache
    ) -> None:
        """Run the layers on the residual x (n_tokens, dim), in place, with matrix products for many tokens."""
        eps, dtype = self.args.norm_eps, self.dtype
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            delta = self._attend(i, x, delta, inputs, positions, mask, cache)
            h = ops.fused_add_rms_norm(x, delta, self._norms[i][1], eps, dtype)
            feed_forward = layer.feed_forward
            delta = feed_forward.w2(ops.silu_and_mul(feed_forward.w1(h), feed_forward.w3(h)))
        ops.fused_add_rms_norm(x, delta, None, eps, dtype)

    def _attend(
        self,
        layer: int,
        x: Tensor,
        delta: Tensor | None,
        inputs: ops.LayersInput,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """Add delta to the residual x in place, and return a layer's attention of the sum: (n_tokens, dim)."""
        bsz, seqlen = positions.shape
        attention = self.layers[layer].attention
        h = ops.fused_add_rms_norm(x, delta, self._norms[layer][0], self.args.norm_eps, self.dtype)
        q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
        ops.rope_and_append_kv(inputs, layer, q, k, v)
        del h, k, v
        k, v = cache.read(layer, bsz, seqlen if mask is None else mask.shape[-1])
        y = attend(q.view(bsz, seqlen, attention.n_local_heads, attention.head_dim), k, v, mask)
        del q
        return attention.wo(y.reshape(bsz * seqlen, -1))

    def _describe(self, module: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) -> ops.WeightView:
        """Return the C structure of a linear or of the embedding table."""
        weight = module.weight
        assert isinstance(weight, Tensor | PackedWeight), type(weight)
        described = weight.describe() if isinstance(weight, PackedWeight) else ops.float_weight(weight)
        # Where ranks add up results, the bias is added once, after the sum.
        bias = None if isinstance(module, VocabParallelEmbedding) else module.bias
        if bias is not None and (isinstance(module, ColumnParallelLinear) or self.parallel.size == 1):
            self._biases.append(bias.float())
            described.bias = ops.vector(self._biases[-1], weight.shape[0])
        return described

    def _inputs(self, x: Tensor, positions: Tensor, rotation: Tensor, cache: KVCache) -> ops.LayersInput:
        """Return the C structure of what layers read and write; the residual x is (n_tokens, dim), fp32."""
        keys, values = cache.keys, cache.values
        n_tokens = len(x)
        half, cached = self.args.head_dim // 2, keys.numel()
        addresses = ops.pointers(
            (positions, torch.int64, n_tokens),
            (rotation, torch.complex64, n_tokens * half),
            (keys, keys.dtype, cached),
            (values, keys.dtype, cached),
            (x, torch.float32, n_tokens * self.args.dim),
        )
        residual = addresses.pop()
        return ops.LayersInput(
            n_tokens=n_tokens,
            seqlen=positions.shape[1],
            cache_type=ops.FLOAT_TYPE_IDS[keys.dtype],
            **dict(zip(("positions", "rotation", "keys", "values"), addresses, strict=True)),
            layer_stride=keys.stride(0),
            row_stride=keys.stride(1),
            x=residual,
            out=residual,
            threads=torch.get_num_threads(),
            **self._constants,
        )
