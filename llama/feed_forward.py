"""Feed-forwards of a layer: one that every token passes, or many experts, of which each token passes a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import Experts, ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.norms import XIELU


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202), or another activation without a gate, over this rank's hidden features.

    Padding features have columns of zeros in w2, so that they add nothing.
    """

    def __init__(self, args: ModelArgs, local_hidden_dim: int, parallel: ModelParallel) -> None:
        """Have hidden features of this rank alone; parallel: the ranks whose results are summed."""
        super().__init__()
        if args.is_gated:
            self.w1 = ColumnParallelLinear(args.dim, local_hidden_dim, args.mlp_bias)
        self.w2 = RowParallelLinear(local_hidden_dim, args.dim, parallel, args.mlp_bias)
        self.w3 = ColumnParallelLinear(args.dim, local_hidden_dim, args.mlp_bias)
        self.activation = args.activation
        if args.activation == "xielu":
            self.xielu = XIELU()

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            hidden = F.silu(self.w1(x)) * self.w3(x)
        elif self.activation == "relu2":
            hidden = F.relu(self.w3(x)).square()
        else:
            hidden = self.xielu(self.w3(x))
        y: Tensor = self.w2(hidden)
        return y

    @property
    def n_features(self) -> int:
        """Hidden features of a token on this rank."""
        return self.w3.weight.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """What is added to the sum over the ranks."""
        return self.w2.bias


class ExpertsFeedForward(nn.Module):
    """A mixture of experts (arXiv:2101.03961), of each of which every rank has some hidden features.

    Experts that no token is for are not read. Results are summed over the ranks once, for all experts together.
    """

    def __init__(self, args: ModelArgs, experts: Experts, parallel: ModelParallel) -> None:
        super().__init__()
        self.n_experts, self.n_active, self.router = experts.n_experts, experts.n_active, experts.router
        self.parallel = parallel
        self.gate = ColumnParallelLinear(args.dim, experts.n_experts)  # which is whole on every rank

        def new(hidden_dim: int) -> FeedForward:
            return FeedForward(args, parallel.part(hidden_dim, parallel.ffn_multiple), ModelParallel())

        self.experts = cast(
            Sequence[FeedForward], nn.ModuleList(new(experts.hidden_dim) for _ in range(experts.n_experts))
        )
        self.shared = None if experts.shared_hidden_dim is None else new(experts.shared_hidden_dim)

    bias = None

    @property
    def n_features(self) -> int:
        """Hidden features of a token on this rank, in all experts that it passes."""
        return self.n_active * self.experts[0].n_features + (0 if self.shared is None else self.shared.n_features)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of tokens (n_tokens, dim), the best first, and what each counts: (n_tokens, n_active).

        What they count is fp32. Of experts with equal scores, any may be first.
        """
        scores = self.gate(x, torch.float32)
        if self.router == "softmax":
            counts, chosen = torch.topk(scores.softmax(-1), self.n_active)
            return chosen, counts
        best, chosen = torch.topk(scores, self.n_active)
        return chosen, best.sigmoid() if self.router == "sigmoid of input" else best.softmax(-1)

    def local_sum(self, x: Tensor, run: Callable[[FeedForward, Tensor], Tensor] = FeedForward.forward) -> Tensor:
        """Return this rank's part of the result for x (n_tokens, dim): fp32, of the same shape.

        run: computes one of the experts for tokens (n, dim).
        """
        chosen, counts = self.route(x)
        order = chosen.flatten().argsort(stable=True)  # by expert, then by token
        tokens, counts = order // self.n_active, counts.flatten()[order]
        results = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
        first = 0
        for expert, n in enumerate(chosen.flatten().bincount(minlength=self.n_experts).tolist()):
            if n:
                part = x[tokens[first : first + n]]
                if self.router == "sigmoid of input":
                    part = (part * counts[first : first + n, None]).type_as(x)
                results[first : first + n] = run(self.experts[expert], part)
                first += n
        # Each token's places in results, in the order of the experts, in which they are added.
        places = order.argsort().view(chosen.shape).sort(-1).values
        factors = None if self.router == "sigmoid of input" else counts[places]
        y = F.embedding_bag(places, results, per_sample_weights=factors, mode="sum")
        if self.shared is not None:
            y += run(self.shared, x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.parallel.all_reduce(self.local_sum(x).type_as(x))
