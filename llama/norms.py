"""Norms, and activations with learned parameters: what layers compute beside matrix products and attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel


class RMSNorm(nn.Module):
    """Scale x to unit root mean square, then by a learned weight (arXiv:1910.07467); computed in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


class LayerNorm(nn.Module):
    """Scale x to zero mean and unit variance, then by a learned weight, plus a bias (arXiv:1607.06450); in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.type_as(x), self.bias.type_as(x), self.eps)


class AllHeadsNorm(nn.Module):
    """RMSNorm over the heads of all ranks together, of which each has some, and may share KV heads with others."""

    def __init__(self, args: ModelArgs, parallel: ModelParallel, heads_of_ranks: Sequence[Sequence[int]]) -> None:
        """heads_of_ranks: the heads that each rank has."""
        super().__init__()
        self.eps, self.head_dim, self.parallel = args.norm_eps, args.head_dim, parallel
        counts = Counter(head for heads in heads_of_ranks for head in heads)
        local = heads_of_ranks[parallel.rank]
        self.dim = len(counts) * args.head_dim
        repeats = torch.tensor([counts[head] for head in local], device="cpu")
        self.register_buffer("repeats", repeats, persistent=False)
        self.weight = nn.Parameter(torch.empty(len(local) * args.head_dim, dtype=torch.float32), requires_grad=False)

    repeats: Tensor  # (local heads,): how often each is there on all ranks together

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (n_tokens, local heads * head_dim)."""
        squares = (x.float().view(len(x), -1, self.head_dim).square().sum(-1) / self.repeats).sum(-1)
        scale = torch.rsqrt(self.parallel.all_reduce(squares) / self.dim + self.eps)
        return (x.float() * scale[..., None] * self.weight.float()).type_as(x)


def new_norm(args: ModelArgs) -> RMSNorm | LayerNorm:
    """Return a norm of states (..., dim) of the kind that a model has."""
    return (LayerNorm if args.layer_norms else RMSNorm)(args.dim, args.norm_eps)


class XIELU(nn.Module):
    """The activation of arXiv:2411.13010, with a slope for each side.

    weight: (4,): alpha_p and alpha_n as they multiply, beta and eps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n, beta, eps = self.weight.type_as(x).unbind()
        return torch.where(x > 0, alpha_p * x * x, (torch.expm1(torch.minimum(x, eps)) - x) * alpha_n) + beta * x
