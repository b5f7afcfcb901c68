"""The LLaMA transformer: a stateless function of tokens, positions and a cache (arXiv:2302.13971, 2307.09288).

Knows nothing of text, of sampling or of where weights come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import ForwardBatch, KVCache, RowGroup, pages_for
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.quantization.weights import LowRank, Weight
from llama.rope import Rotary, precompute_freqs_cis, rotate

__all__ = ["ModelArgs", "Transformer", "precompute_freqs_cis"]


class LayersBackend(Protocol):
    """What a backend computes for a model; `llama.backends.base.Backend` is the whole protocol."""

    def run_layers(self, tokens: Tensor, rotation: Tensor, batch: ForwardBatch) -> Tensor:
        """See `Transformer.run_layers`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits of final states (..., dim): fp32 (..., local vocabulary)."""
        ...


class RMSNorm(nn.Module):
    """Scale x to unit root mean square, then by a learned weight (arXiv:1910.07467); computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute grouped-query attention (arXiv:2305.13245), softmax(q k^T / sqrt(head_dim)) v, shaped like q.

    q: (bsz, seqlen, n_heads, head_dim); k, v: (bsz, kv_len, n_kv_heads, head_dim).
    mask: (bsz, 1, seqlen, kv_len), True where a query sees a key; None is causal over seqlen == kv_len.
    """
    bsz, seqlen, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if seqlen == 1:
        # Treat the query heads of one KV head as a sequence, so that K and V are read once and never repeated.
        q = q.view(bsz, n_kv_heads, n_heads // n_kv_heads, head_dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(bsz, 1, n_heads, head_dim)
    if n_heads != n_kv_heads and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # There torch's kernels for these take no heads that are shared: it would hold all scores.
        k, v = (each.repeat_interleave(n_heads // n_kv_heads, dim=1) for each in (k, v))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_heads != k.shape[1]
    )
    return y.transpose(1, 2)


def attend_in_groups(q: Tensor, layer: int, masks: Sequence[Tensor | None], batch: ForwardBatch) -> Tensor:
    """Compute attention of queries (n_tokens, n_heads, head_dim) over the cached keys of a layer, shaped like q.

    masks: of each group of rows, as `Transformer.mask` returns it.
    """
    parts = []
    for group, mask in zip(batch.groups, masks, strict=True):
        queries = q[group.tokens].unflatten(0, (group.n_rows, group.seqlen))
        parts.append(attend(queries, *batch.read(layer, group), mask).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    """Grouped-query self-attention over this rank's heads."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.n_local_heads = parallel.heads(args.n_heads)
        self.n_local_kv_heads = len(parallel.kv_heads(args.n_heads, args.n_kv_heads))
        q_dim, kv_dim = self.n_local_heads * args.head_dim, self.n_local_kv_heads * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, q_dim, args.attention_bias)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, args.attention_bias)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, args.attention_bias)
        self.wo = RowParallelLinear(q_dim, args.dim, parallel, args.attention_bias)

    def forward(self, x: Tensor, rotation: Tensor, masks: Sequence[Tensor | None], batch: ForwardBatch) -> Tensor:
        q = self.wq(x).view(-1, self.n_local_heads, self.head_dim)
        k = self.wk(x).view(-1, self.n_local_kv_heads, self.head_dim)
        v = self.wv(x).view(-1, self.n_local_kv_heads, self.head_dim)
        batch.cache.write(self.layer, batch.slots, rotate(k, rotation), v)
        del k, v
        q = rotate(q, rotation)
        return self.wo(attend_in_groups(q, self.layer, masks, batch).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202) over this rank's hidden features; padding features are zero and stay zero."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel) -> None:
        super().__init__()
        hidden_dim = parallel.part(args.hidden_dim, parallel.ffn_multiple)
        self.w1 = ColumnParallelLinear(args.dim, hidden_dim, args.mlp_bias)
        self.w2 = RowParallelLinear(hidden_dim, args.dim, parallel, args.mlp_bias)
        self.w3 = ColumnParallelLinear(args.dim, hidden_dim, args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: attention and feed-forward, each of the normalised input and added to it."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, parallel, layer)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, rotation: Tensor, masks: Sequence[Tensor | None], batch: ForwardBatch) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, masks, batch)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """This rank's share of a LLaMA model, with Meta's names of parameters.

    Raises ValueError where the number of ranks does not divide the number of heads.
    """

    def __init__(self, args: ModelArgs, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        assert args.vocab_size > 0, "vocab_size must be known here"
        self.args = args
        self.parallel = parallel = parallel or ModelParallel()
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim, parallel)
        self.layers = nn.ModuleList(TransformerBlock(args, parallel, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, parallel.part(args.vocab_size))
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.rope = Rotary(args.head_dim, args.rope_theta, args.rope_scaling, args.rotary_dim, args.score_factor)
        # Computes the layers in place of their own forward; bound from outside (see backends/base.py).
        self.backend: LayersBackend | None = None

    def forward(self, tokens: Tensor, start_pos: Tensor, cache: KVCache) -> Tensor:
        """Compute tokens (bsz, seqlen) of the cache's first rows from start_pos (bsz,) on, as Meta's code does.

        Returns the logits of every position: (bsz, seqlen, vocab_size), fp32. Short rows are padded on the right with
        any token: the logits of padding mean nothing, and its cache positions are overwritten when the row reaches
        them.
        """
        batch = ForwardBatch.of_rows(cache, start_pos, tokens.shape[1])
        return self.logits(self.hidden(tokens.flatten(), batch)).unflatten(0, tokens.shape)

    def hidden(self, tokens: Tensor, batch: ForwardBatch) -> Tensor:
        """Return the final states of tokens (n_tokens,) where `batch` says they are, (n_tokens, dim); cache them."""
        rotation = self.rope(batch.positions, batch.lengths)
        run = self.run_layers if self.backend is None else self.backend.run_layers
        return run(tokens, rotation, batch)

    def run_layers(self, tokens: Tensor, rotation: Tensor, batch: ForwardBatch) -> Tensor:
        """Return final states (n_tokens, dim) of tokens (n_tokens,), and cache their keys and values.

        rotation: (n_tokens, 1, head_dim / 2), complex.
        """
        x = self.tok_embeddings(tokens).to(self.dtype)
        masks = [self.mask(batch.positions, group) for group in batch.groups]
        for layer in self.layers:
            x = layer(x, rotation, masks, batch)
        return self.norm(x)

    def mask(self, positions: Tensor, group: RowGroup) -> Tensor | None:
        """Return where queries of a group see keys: bool (n_rows, 1, seqlen, kv_len); None is causal.

        positions: (n_tokens,), of all groups.
        """
        kv_len = group.kv_len
        window = self.args.sliding_window or kv_len
        if group.from_start and kv_len <= window:
            return None
        queries = positions[group.tokens].view(group.n_rows, 1, group.seqlen, 1)
        keys = torch.arange(kv_len, device=positions.device)
        mask = keys <= queries
        return mask & (keys > queries - window) if window < kv_len else mask

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits of final states (..., dim): (..., vocab_size) in fp32, the same on every rank."""
        backend = self.backend
        logits = self.output(hidden, torch.float32) if backend is None else backend.logits(hidden)
        if self.parallel.size > 1:
            logits = self.parallel.all_gather(logits)[..., : self.args.vocab_size]
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        self.backend = None  # it points at the memory that the weights had
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.backend = None
        return super().load_state_dict(*args, **kwargs)

    @property
    def params(self) -> ModelArgs:
        """The architecture and limits, as Meta's code calls them."""
        return self.args

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the cache; quantized weights have no dtype of their own."""
        return self.norm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that this rank reads for one token; the embedding table counts if it is the output, too."""
        table = 0 if self.args.tied_embeddings else self.tok_embeddings.weight.nbytes
        return sum(weight.nbytes for weight in self._weights()) - table

    @property
    def weight_types(self) -> list[str]:
        """Names of the block types and dtypes of this rank's matrices, the one with the most bytes first."""
        floats = str(self.dtype).removeprefix("torch.")
        counts: Counter[str] = Counter()
        for weight in self._weights():
            if len(weight.shape) > 1:
                block_type = getattr(weight, "block_type", None)
                counts[block_type.name if block_type else floats] += weight.nbytes
        return [name for name, _ in counts.most_common()]

    def _weights(self) -> list[Weight]:
        """Return every weight, bias and adapter once, also where two modules share one."""
        found = [getattr(module, name, None) for module in self.modules() for name in ("weight", "bias")]
        found += [each for module in self.modules() if isinstance(module, LowRank) for each in module.buffers()]
        return list({id(weight): weight for weight in found if weight is not None}.values())

    def new_cache(self, bsz: int, max_seq_len: int) -> KVCache:
        """Return an empty cache for `bsz` rows of max_seq_len positions or more, with the model's dtype and device."""
        args = self.args
        n_local_kv_heads = len(self.parallel.kv_heads(args.n_heads, args.n_kv_heads))
        per_row = pages_for(max_seq_len)
        return KVCache(
            args.n_layers,
            bsz * per_row,
            n_local_kv_heads,
            args.head_dim,
            device=self.device,
            dtype=self.dtype,
            pages_per_row=per_row,
        )
