"""The LLaMA transformer: a stateless function of tokens, positions and a cache (arXiv:2302.13971, 2307.09288).

Knows nothing of text, of sampling or of where weights come from.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import attend_in_groups, causal_mask
from llama.cache import ForwardBatch, KVCache, pages_for
from llama.config import ModelArgs, Sight
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.feed_forward import ExpertsFeedForward, FeedForward
from llama.norms import AllHeadsNorm, RMSNorm, new_norm
from llama.quantization.weights import LowRank, Weight
from llama.rope import LayerRotations, precompute_freqs_cis, rotate

__all__ = ["ModelArgs", "Transformer", "precompute_freqs_cis"]


# What turns a layer's queries, and what its keys: complex (n_tokens, 1, head_dim / 2).
Rotations = tuple[Tensor, Tensor]
# Of each sight that layers have, the mask of each group of rows.
Masks = Mapping[Sight, Sequence[Tensor | None]]


class LayersBackend(Protocol):
    """What a backend computes for a model; `llama.backends.base.Backend` is the whole protocol."""

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        """See `Transformer.run_layers`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's logits of final states (..., dim): fp32 (..., local vocabulary)."""
        ...


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
        self.sight = args.sight(layer)
        self.norm_eps = args.norm_eps
        self.qk_norm = args.qk_norm if args.norms_heads(layer) else None
        if self.qk_norm == "all heads":
            ranks = [dataclasses.replace(parallel, rank=rank) for rank in range(parallel.size)]
            n, kv_heads = self.n_local_heads, [rank.kv_heads(args.n_heads, args.n_kv_heads) for rank in ranks]
            self.q_norm: nn.Module = AllHeadsNorm(
                args, parallel, [range(i * n, (i + 1) * n) for i in range(len(ranks))]
            )
            self.k_norm: nn.Module = AllHeadsNorm(args, parallel, kv_heads)
        elif self.qk_norm in ("head", "rotated head"):
            self.q_norm = RMSNorm(args.head_dim, args.norm_eps)
            self.k_norm = RMSNorm(args.head_dim, args.norm_eps)

    def forward(self, x: Tensor, rotations: Rotations, masks: Masks, batch: ForwardBatch) -> Tensor:
        of_queries, of_keys = rotations
        q, k, v = self.wq(x), self.wk(x), self.wv(x).view(-1, self.n_local_kv_heads, self.head_dim)
        if self.qk_norm == "all heads":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(-1, self.n_local_heads, self.head_dim), k.view(-1, self.n_local_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.qk_norm == "unit":
            q, k = (F.rms_norm(heads, (self.head_dim,), None, self.norm_eps) for heads in (q, k))
        k = rotate(k, of_keys)
        if self.qk_norm == "rotated head":
            k = self.k_norm(k)
        batch.cache.write(self.layer, batch.slots, k, v)
        del k, v
        q = rotate(q, of_queries)
        if self.qk_norm == "rotated head":
            q = self.q_norm(q)
        return self.wo(attend_in_groups(q, self.layer, masks[self.sight], batch).flatten(1))


class TransformerBlock(nn.Module):
    """One layer: attention and feed-forward, each added to its input; norms are of what goes in, or of what comes."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, parallel, layer)
        experts = args.experts_of(layer)
        self.feed_forward: FeedForward | ExpertsFeedForward = (
            FeedForward(args, parallel.part(args.hidden_dim, parallel.ffn_multiple), parallel)
            if experts is None
            else ExpertsFeedForward(args, experts, parallel)
        )
        self.output_norms = args.output_norms
        self.attention_norm = new_norm(args)
        self.ffn_norm = new_norm(args)

    def forward(self, x: Tensor, rotations: Rotations, masks: Masks, batch: ForwardBatch) -> Tensor:
        if self.output_norms:
            x = x + self.attention_norm(self.attention(x, rotations, masks, batch))
            return x + self.ffn_norm(self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), rotations, masks, batch)
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
        self.norm = new_norm(args)
        self.output = ColumnParallelLinear(args.dim, parallel.part(args.vocab_size))
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.rope = LayerRotations(args)
        self.sights = args.sights
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
        rotations = self.rope(batch.positions, batch.lengths)
        run = self.run_layers if self.backend is None else self.backend.run_layers
        return run(tokens, rotations, batch)

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        """Return final states (n_tokens, dim) of tokens (n_tokens,), and cache their keys and values.

        rotations: (n_rotations, n_tokens, 1, head_dim / 2), complex, of which `LayerRotations` says each layer's.
        """
        x = self.tok_embeddings(tokens).to(self.dtype)
        masks = {sight: [causal_mask(batch.positions, group, sight) for group in batch.groups] for sight in self.sights}
        for layer, of_queries, of_keys in zip(self.layers, self.rope.of_queries, self.rope.of_keys, strict=True):
            x = layer(x, (rotations[of_queries], rotations[of_keys]), masks, batch)
        return self.norm(x)

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
        """Bytes of weights that this rank reads for one token; the embedding table counts if it is the output, too.

        Of experts, as many count as a token passes.
        """
        left_out = 0 if self.args.tied_embeddings else self.tok_embeddings.weight.nbytes
        for module in self.modules():
            if isinstance(module, ExpertsFeedForward):
                held = sum(weight.nbytes for weight in _weights_of(*module.experts))
                left_out += held * (module.n_experts - module.n_active) // module.n_experts
        return sum(weight.nbytes for weight in _weights_of(self)) - left_out

    @property
    def weight_types(self) -> list[str]:
        """Names of the block types and dtypes of this rank's matrices, the one with the most bytes first."""
        floats = str(self.dtype).removeprefix("torch.")
        counts: Counter[str] = Counter()
        for weight in _weights_of(self):
            if len(weight.shape) > 1:
                block_type = getattr(weight, "block_type", None)
                counts[block_type.name if block_type else floats] += weight.nbytes
        return [name for name, _ in counts.most_common()]

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


def _weights_of(*models: nn.Module) -> list[Weight]:
    """Return every weight, bias and adapter of models once, also where two modules share one."""
    modules = [module for model in models for module in model.modules()]
    found = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    found += [each for module in modules if isinstance(module, LowRank) for each in module.buffers()]
    return list({id(weight): weight for weight in found if weight is not None}.values())
