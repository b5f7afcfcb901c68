"""The layers of a model on a CPU, run by the kernels: set as `Transformer.fused`, from outside.

A few tokens pass through all layers in one call, in fp32 from the weights on; the result for a token does not depend
on how many pass with it. Of many tokens, the kernels do what lies between torch's matrix products.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from llama.backends.cpu import ops as kernels
from llama.backends.cpu.build import library
from llama.cache import KVCache
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.model import Transformer, TransformerBlock, attend
from llama.quantization.linear import PackedWeight, Quantized

# Further back than any cache reaches.
NO_WINDOW = 1 << 40


def can_fuse(model: Transformer) -> bool:
    """Whether there are kernels for this model here."""
    return (
        model.device.type == "cpu"
        and model.dtype in kernels.FLOATS
        and all(isinstance(module, PackedWeight) for module in model.modules() if isinstance(module, Quantized))
        and library() is not None
    )


class FusedLayers:
    """Runs a Transformer's layers. It knows where the weights lie: a model whose weights change drops it."""

    def __init__(self, model: Transformer) -> None:
        self.args, self.parallel, self.dtype = model.args, model.parallel, model.dtype
        self.tok_embeddings, self.norm, self.mask = model.tok_embeddings, model.norm, model.mask
        self._kept: list[Tensor] = []  # what the structures point at, beside the model's own
        self.layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self._described = (kernels.Layer * len(self.layers))()
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

    def __call__(self, tokens: Tensor, positions: Tensor, rotation: Tensor, kv_len: int, cache: KVCache) -> Tensor:
        """See `Transformer.run_layers`; in fp32."""
        bsz, seqlen = tokens.shape
        residual = self.tok_embeddings(tokens).float().view(bsz * seqlen, -1)  # new memory, which is added to
        positions = positions.contiguous()
        step = self._step(residual, positions, rotation, cache)
        if bsz * seqlen <= kernels.FEW:
            self._few(residual, step)
        else:
            self._many(residual, step, positions, self.mask(positions, kv_len), cache)
        return self.norm(residual.view(bsz, seqlen, -1))

    def _few(self, x: Tensor, step: kernels.Step) -> None:
        if self.parallel.size == 1:
            kernels.run_layers(self._described, 0, len(self._described), kernels.ATTENTION | kernels.FEED_FORWARD, step)
            return
        for i, layer in enumerate(self.layers):
            halves = ((kernels.ATTENTION, layer.attention.wo), (kernels.FEED_FORWARD, layer.feed_forward.w2))
            for half, last in halves:
                share = torch.empty_like(x)
                step.out = share.data_ptr()
                kernels.run_layers(self._described, i, i + 1, half, step)
                x += self.parallel.all_reduce(share)
                if last.bias is not None:
                    x += last.bias

    def _many(self, x: Tensor, step: kernels.Step, positions: Tensor, mask: Tensor | None, cache: KVCache) -> None:
        eps, dtype = self.args.norm_eps, self.dtype
        delta: Tensor | None = None
        for i, layer in enumerate(self.layers):
            delta = self._attend(i, x, delta, step, positions, mask, cache)
            h = kernels.add_and_norm(x, delta, self._norms[i][1], eps, dtype)
            feed_forward = layer.feed_forward
            delta = feed_forward.w2(kernels.gate(feed_forward.w1(h), feed_forward.w3(h)))
        kernels.add_and_norm(x, delta, None, eps, dtype)

    def _attend(
        self,
        layer: int,
        x: Tensor,
        delta: Tensor | None,
        step: kernels.Step,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        """A layer's attention over the sum of x, which grows by delta: (n_tokens, dim)."""
        bsz, seqlen = positions.shape
        attention = self.layers[layer].attention
        h = kernels.add_and_norm(x, delta, self._norms[layer][0], self.args.norm_eps, self.dtype)
        q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
        kernels.rotate_and_keep(step, layer, q, k, v)
        del h, k, v
        k, v = cache.read(layer, bsz, seqlen if mask is None else mask.shape[-1])
        y = attend(q.view(bsz, seqlen, attention.n_local_heads, attention.head_dim), k, v, mask)
        del q
        return attention.wo(y.reshape(bsz * seqlen, -1))

    def _describe(self, linear: ColumnParallelLinear | RowParallelLinear) -> kernels.Weight:
        weight = linear.weight
        assert isinstance(weight, Tensor | PackedWeight), "see can_fuse"
        described = weight.describe() if isinstance(weight, PackedWeight) else kernels.float_weight(weight)
        # A bias of a sum over ranks is added once, after it.
        if linear.bias is not None and (isinstance(linear, ColumnParallelLinear) or self.parallel.size == 1):
            self._kept.append(linear.bias.float())
            described.bias = self._kept[-1].data_ptr()
        return described

    def _step(self, x: Tensor, positions: Tensor, rotation: Tensor, cache: KVCache) -> kernels.Step:
        attention, args = self.layers[0].attention, self.args
        assert rotation.is_contiguous() and rotation.dtype == torch.complex64
        return kernels.Step(
            n_tokens=len(x),
            seqlen=positions.shape[1],
            dim=args.dim,
            n_heads=attention.n_local_heads,
            n_kv_heads=attention.n_local_kv_heads,
            head_dim=args.head_dim,
            hidden_dim=self.parallel.part(args.hidden_dim, self.parallel.ffn_multiple),
            cache_type=kernels.FLOATS[cache.keys.dtype],
            window=args.sliding_window or NO_WINDOW,
            positions=positions.data_ptr(),
            rotation=rotation.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            layer_stride=cache.keys.stride(0),
            row_stride=cache.keys.stride(1),
            x=x.data_ptr(),
            out=x.data_ptr(),
            eps=args.norm_eps,
            threads=torch.get_num_threads(),
        )
