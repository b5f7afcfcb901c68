"""Attention as torch's operations compute it: which keys a query sees, and what it makes of their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import ForwardBatch, RowGroup
from llama.config import Sight


def causal_mask(positions: Tensor, group: RowGroup, sight: Sight) -> Tensor | None:
    """Return where queries of a group see keys: bool (n_rows, 1, seqlen, kv_len); None is causal.

    positions: (n_tokens,), of all groups.
    """
    kv_len = group.kv_len
    sees_all = sight.reaches(kv_len)
    if group.from_start and sees_all:
        return None
    queries = positions[group.tokens].view(group.n_rows, 1, group.seqlen, 1)
    keys = torch.arange(kv_len, device=positions.device)
    mask = keys <= queries
    if sees_all:
        return mask
    if sight.window is not None:
        mask &= keys > queries - sight.window
    if sight.chunk is not None:
        mask &= keys >= queries // sight.chunk * sight.chunk
    return mask


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

    masks: of each group of rows, as `causal_mask` returns it.
    """
    parts = []
    for group, mask in zip(batch.groups, masks, strict=True):
        queries = q[group.tokens].view(group.n_rows, group.seqlen, *q.shape[1:])
        parts.append(attend(queries, *batch.read(layer, group), mask).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
