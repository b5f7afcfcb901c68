"""The LLaMA transformer: a stateless function of tokens, positions and a cache (arXiv:2302.13971, 2307.09288).

Knows nothing of text, of sampling or of where weights come from.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import KVCache
from llama.config import ModelArgs, RopeScaling
from llama.parallel import ColumnParallelLinear, ModelParallel, RowParallelLinear, VocabParallelEmbedding

__all__ = ["ModelArgs", "Transformer"]


class RMSNorm(nn.Module):
    """Scale x to unit root mean square, then by a learned weight (arXiv:1910.07467); computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each rotated pair: (head_dim / 2,), fp32 (arXiv:2104.09864)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is not None:
        turns = scaling.old_context_len * frequencies / (2 * math.pi)  # full turns within the old context
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequencies = frequencies * (blend + (1 - blend) / scaling.factor)
    return frequencies.float()


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers that rotate each pair to its position: (bsz, seqlen, 1, head_dim / 2)."""
    # fp32: bf16 represents every integer only up to 256.
    angles = positions.float()[..., None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the adjacent pairs of x (bsz, seqlen, heads, head_dim), as in Meta's order of dimensions."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention (arXiv:2305.13245): softmax(q k^T / sqrt(head_dim)) v.

    q: (bsz, seqlen, n_heads, head_dim); k, v: (bsz, kv_len, n_kv_heads, head_dim).
    mask: (bsz, 1, seqlen, kv_len), True where a query sees a key; None is causal over seqlen == kv_len.
    """
    bsz, seqlen, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if seqlen == 1:
        # The query heads of one KV head as a sequence: K and V are read once and never repeated.
        q = q.view(bsz, n_kv_heads, n_heads // n_kv_heads, head_dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(bsz, 1, n_heads, head_dim)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=n_heads != n_kv_heads
    )
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query self-attention over this rank's heads."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = args.head_dim
        self.n_local_heads = parallel.heads(args.n_heads)
        self.n_local_kv_heads = len(parallel.kv_heads(args.n_heads, args.n_kv_heads))
        self.wq = ColumnParallelLinear(args.dim, self.n_local_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, self.n_local_kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, self.n_local_kv_heads * args.head_dim)
        self.wo = RowParallelLinear(self.n_local_heads * args.head_dim, args.dim, parallel)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache, slots: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        q = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)
        k = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        v = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        cache.write(self.layer, slots, rotate(k, rotation), v)
        k, v = cache.read(self.layer, bsz, seqlen if mask is None else mask.shape[-1])
        return self.wo(attend(rotate(q, rotation), k, v, mask).reshape(bsz, seqlen, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202) over this rank's hidden features; padded ones are zero and stay zero."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel) -> None:
        super().__init__()
        hidden_dim = parallel.part(args.hidden_dim)
        self.w1 = ColumnParallelLinear(args.dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, args.dim, parallel)
        self.w3 = ColumnParallelLinear(args.dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, parallel: ModelParallel, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, parallel, layer)
        self.feed_forward = FeedForward(args, parallel)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache, slots: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache, slots)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """This rank's share of a LLaMA. Parameters have Meta's names; ValueError when the heads cannot be split."""

    rope: Tensor

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
        self.register_buffer(
            "rope", rope_frequencies(args.head_dim, args.rope_theta, args.rope_scaling), persistent=False
        )

    def forward(self, tokens: Tensor, start_pos: Tensor, cache: KVCache, kv_len: int | None = None) -> Tensor:
        """Logits of every position, (bsz, seqlen, vocab_size) in fp32: `hidden` and then `logits`."""
        return self.logits(self.hidden(tokens, start_pos, cache, kv_len))

    def hidden(self, tokens: Tensor, start_pos: Tensor, cache: KVCache, kv_len: int | None = None) -> Tensor:
        """Write tokens (bsz, seqlen) into the cache from start_pos (bsz,) on; final states (bsz, seqlen, dim).

        Row i is row i of the cache; a short row is padded on the right with any tokens, whose outputs mean nothing
        and whose places in the cache are overwritten when the row gets there. kv_len is how much of the cache is
        looked at, at least max(start_pos) + seqlen, which is taken (with a device sync) when it is not given.
        """
        bsz, seqlen = tokens.shape
        if kv_len is None:
            kv_len = int(start_pos.max()) + seqlen
        # One place further would be the next row's first.
        assert seqlen <= kv_len <= cache.keys.shape[2], (seqlen, kv_len, cache.keys.shape)
        positions = start_pos[:, None] + torch.arange(seqlen, device=tokens.device)  # (bsz, seqlen)
        mask = None
        if kv_len > seqlen:  # else all rows start at 0, and attention is plainly causal
            mask = torch.arange(kv_len, device=tokens.device) <= positions[:, None, :, None]
        rotation = rotations(positions, self.rope)
        slots = cache.slots(positions)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, rotation, mask, cache, slots)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of final states (..., dim): (..., vocab_size) in fp32, the same on every rank."""
        return self.parallel.all_gather(self.output(hidden))[..., : self.args.vocab_size].float()

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that this rank reads for one token: an embedding table only where it is the output too."""
        table = 0 if self.args.tied_embeddings else self.tok_embeddings.weight.nbytes
        return sum(weight.nbytes for weight in self.parameters()) - table

    def new_cache(self, bsz: int, max_seq_len: int) -> KVCache:
        """An empty cache for `bsz` rows of `max_seq_len` positions, in the dtype and on the device of the weights."""
        args, weight = self.args, self.tok_embeddings.weight
        n_local_kv_heads = len(self.parallel.kv_heads(args.n_heads, args.n_kv_heads))
        return KVCache(
            args.n_layers, bsz, max_seq_len, n_local_kv_heads, args.head_dim, device=weight.device, dtype=weight.dtype
        )
