"""The layers of a model on a CPU, computed by the C++ kernels.

A few tokens pass through all layers in one call, in fp32 from the weights on; the result for a token does not depend
on how many pass with it (see D30). Of many tokens, the kernels do what lies between torch's matrix products.
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

# Further back than any cache reaches.
NO_WINDOW = 1 << 40


class CpuBackend(EagerBackend):
    """Computes a Transformer by kernels. It knows where the weights lie: a model whose weights change drops it."""

    name = "cpu"
    own_kernels = True
    weight_cls = PackedWeight
    keeps_stored_blocks = True

    def bind(self, model: Transformer) -> None:
        self.args, self.parallel, self.dtype = model.args, model.parallel, model.dtype
        self.tok_embeddings, self.norm, self.output, self.mask = (
            model.tok_embeddings,
            model.norm,
            model.output,
            model.mask,
        )
        self._kept: list[Tensor] = []  # what the C structures point at, beside the model's own
        self.layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self._described = (ops.Layer * len(self.layers))()
        self._norms: list[tuple[Tensor, Tensor]] = []
        for layer, described in zip(self.layers, self._described, strict=True):
            attention, feed_forward = layer.attention, layer.feed_forward
            for name in ("wq", "wk", "wv", "wo"):
                setattr(described, name, self._describe(getattr(attention, name)))
            for name in ("w1", "w2", "w3"):
                setattr(described, name, self._describe(getattr(feed_forward, name)))
            norms = layer.attention_norm.weight.float(), layer.ffn_norm.weight.float()
            described.attention_norm, described.ffn_norm = (weight.data_ptr() for weight in norms)
            self._norms.append(norms)
        self._described_output = self._describe(self.output)
        self._described_table = self._describe(self.tok_embeddings)
        self._norm_weight = self.norm.weight.float()
        attention = self.layers[0].attention
        # What is the same for every call.
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
        """See `Transformer.run_layers`; the states are fp32."""
        bsz, seqlen = tokens.shape
        residual = self._embed(tokens).view(bsz * seqlen, -1)
        positions = positions.contiguous()
        inputs = self._inputs(residual, positions, rotation, cache)
        if bsz * seqlen <= ops.MAX_GEMV_TOKENS:
            self._run_few(residual, inputs)
        else:
            self._run_many(residual, inputs, positions, self.mask(positions, kv_len), cache)
        hidden = F.rms_norm(residual, self._norm_weight.shape, self._norm_weight, self.args.norm_eps)
        return hidden.view(bsz, seqlen, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        if ops.is_gemv(hidden):
            return ops.gemv(self._described_output, hidden)
        return self.output(hidden, torch.float32)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens (bsz, seqlen), fp32 in new memory, which is added to."""
        table = self.tok_embeddings.weight
        if self.parallel.size > 1:
            return self.tok_embeddings(tokens).to(torch.float32, copy=True)
        if isinstance(table, Tensor):
            return F.embedding(tokens, table).float()
        return ops.embedding(self._described_table, tokens)

    def _run_few(self, x: Tensor, inputs: ops.LayersInput) -> None:
        if self.parallel.size == 1:
            both = ops.ATTENTION | ops.FEED_FORWARD
            ops.run_layers(self._described, 0, len(self._described), both, inputs)
            return
        for i, layer in enumerate(self.layers):
            halves = ((ops.ATTENTION, layer.attention.wo), (ops.FEED_FORWARD, layer.feed_forward.w2))
            for half, last in halves:
                share = torch.empty_like(x)
                inputs.out = share.data_ptr()
                ops.run_layers(self._described, i, i + 1, half, inputs)
                x += self.parallel.all_reduce(share)
                if last.bias is not None:
                    x += last.bias

    def _run_many(
        self, x: Tensor, inputs: ops.LayersInput, positions: Tensor, mask: Tensor | None, cache: KVCache
    ) -> None:
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
        """Compute a layer's attention over the sum of x, which grows by delta: (n_tokens, dim)."""
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

    def _describe(self, module: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) -> ops.Weight:
        weight = module.weight
        assert isinstance(weight, Tensor | PackedWeight), type(weight)
        described = weight.describe() if isinstance(weight, PackedWeight) else ops.float_weight(weight)
        # A bias of a sum over ranks is added once, after it.
        bias = None if isinstance(module, VocabParallelEmbedding) else module.bias
        if bias is not None and (isinstance(module, ColumnParallelLinear) or self.parallel.size == 1):
            self._kept.append(bias.float())
            described.bias = self._kept[-1].data_ptr()
        return described

    def _inputs(self, x: Tensor, positions: Tensor, rotation: Tensor, cache: KVCache) -> ops.LayersInput:
        assert rotation.is_contiguous() and rotation.dtype == torch.complex64
        keys, values = cache.keys, cache.values
        return ops.LayersInput(
            n_tokens=len(x),
            seqlen=positions.shape[1],
            cache_type=ops.FLOAT_TYPE_IDS[keys.dtype],
            positions=positions.data_ptr(),
            rotation=rotation.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            layer_stride=keys.stride(0),
            row_stride=keys.stride(1),
            x=x.data_ptr(),
            out=x.data_ptr(),
            threads=torch.get_num_threads(),
            **self._constants,
        )
