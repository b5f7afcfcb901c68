"""The layers of a model on a CPU, computed by the C++ kernels.

A few tokens, of any rows, pass through all layers in one call, with activations in fp32; a token's result does not
depend on the tokens beside it (see D30). For many tokens, the kernels compute what lies between matrix products: norms,
rotations, the gates of feed-forwards, and attention.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cpu import ops, structures
from llama.backends.cpu.cpu_times import CpuTimes
from llama.backends.cpu.described_model import DescribedModel
from llama.backends.cpu.packed_weight import PackedWeight
from llama.backends.eager import EagerBackend
from llama.cache import ForwardBatch
from llama.distributed.threads import allowed_cpus, user_chose_threads
from llama.feed_forward import FeedForward
from llama.model import Transformer, TransformerBlock
from llama.norms import LayerNorm
from llama.sampling import FilterTensors, SamplingTensors, TokenSampler, sample

# Seconds between looks at what other processes take: 25 of the kernel's ticks.
SECONDS_TO_LOOK = 0.25
# Cores that others may keep busy before a thread gives way; one that shares its core with another process counts half.
TOLERATED = 0.3

ALL_PARTS = structures.PROJECTION | structures.ATTENTION | structures.FEED_FORWARD

# Runs all layers on the residual (n_tokens, dim), in place.
Layers = Callable[[Tensor, structures.LayersInput], None]


class StepThreads:
    """A context with as many threads as other processes leave cores free, and at most torch's number of them.

    Threads wait for each other some 150 times a token: where one has to wait for a core, all wait. It is for work whose
    results do not depend on the number (see D30), which torch's matrix products do not promise. Only the thread that
    enters is told. A number that the user chose stays.
    """

    def __init__(self, share: int, root: Path = Path("/"), seconds: float = SECONDS_TO_LOOK) -> None:
        """Give way where torch's number of threads is `share`; look every `seconds`. root: of the file system."""
        self._root, self._seconds = root, seconds
        self._share = self._threads = share
        self._cpus = allowed_cpus()
        self._look_at = math.inf
        if self._share > 1:
            with contextlib.suppress(OSError):
                self._times = CpuTimes.read(self._cpus, root)
                self._look_at = time.monotonic() + seconds

    def __enter__(self) -> None:
        if time.monotonic() >= self._look_at:
            self._look()
        self._torchs = torch.get_num_threads()
        if self._threads < self._torchs == self._share:
            ops.set_openmp_threads(self._threads)

    def __exit__(self, *error: object) -> None:
        if self._threads < self._torchs == self._share:
            ops.set_openmp_threads(self._torchs)

    def _look(self) -> None:
        self._look_at = time.monotonic() + self._seconds
        try:
            before, now = self._times, CpuTimes.read(self._cpus, self._root)
        except OSError:  # too many open files, at the moment
            return
        elapsed = now.elapsed - before.elapsed
        if elapsed > 0:
            others = ((now.busy - before.busy) - (now.own - before.own)) / elapsed
            free = int(len(self._cpus) - others + TOLERATED)
            self._threads, self._times = max(1, min(self._share, free)), now


class CpuSampler:
    """Draws tokens with torch's operations on the threads of a step; a single row is not worth waking others."""

    def __init__(self, threads: StepThreads) -> None:
        self._threads = threads

    def __call__(self, logits: Tensor, uniform: Tensor, rows: SamplingTensors) -> Tensor:
        if len(logits) > 1:
            with self._threads:
                return sample(logits, uniform, rows)
        threads = torch.get_num_threads()
        ops.set_openmp_threads(1)
        try:
            return sample(logits, uniform, rows)
        finally:
            ops.set_openmp_threads(threads)

    def filter(
        self, logits: Tensor, filters: FilterTensors, temperature: Tensor, xtc_uniform: Tensor | None = None
    ) -> Tensor:
        """See `TokenSampler`."""
        with self._threads:
            return filters.apply(logits, temperature, xtc_uniform)


class CpuBackend(EagerBackend):
    """Computes a Transformer by kernels, which point at its weights: a model whose weights change drops its backend."""

    name = "cpu"
    own_kernels = True
    weight_cls = PackedWeight
    keeps_stored_blocks = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._threads = StepThreads(1 if user_chose_threads() else torch.get_num_threads())

    def bind(self, model: Transformer) -> None:
        self.args, self.parallel, self.dtype = model.args, model.parallel, model.dtype
        self.tok_embeddings, self.norm, self.output = model.tok_embeddings, model.norm, model.output
        self.layers = [cast(TransformerBlock, layer) for layer in model.layers]
        self._described = DescribedModel(model)
        self._c_layers = self._described.layers
        self._max_few = ops.max_few_tokens()
        self._norm_weight = self.norm.weight.float()
        self._norm_bias = self.norm.bias.float() if isinstance(self.norm, LayerNorm) else None
        attention = self.layers[0].attention
        # Fields of LayersInput that are the same for every call.
        self._constants = {
            "dim": self.args.dim,
            "n_heads": attention.n_local_heads,
            "n_kv_heads": attention.n_local_kv_heads,
            "head_dim": self.args.head_dim,
            "hidden_dim": max(layer.feed_forward.n_features for layer in self.layers),
            "eps": self.args.norm_eps,
        }
        super().bind(model)

    def run_layers(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch) -> Tensor:
        """Return final states as `Transformer.run_layers` does, in fp32."""
        if len(batch.positions) > self._max_few:
            return self._run(tokens, rotations, batch, self._run_many)
        with self._threads:
            return self._run(tokens, rotations, batch, self._run_few)

    def logits(self, hidden: Tensor) -> Tensor:
        if hidden.numel() <= self._max_few * self.args.dim and self.output.low_rank is None:
            with self._threads:
                return ops.multiply(self._described.output, hidden)
        return self.output(hidden, torch.float32)

    def token_sampler(self) -> TokenSampler:
        return CpuSampler(self._threads)

    def _run(self, tokens: Tensor, rotations: Tensor, batch: ForwardBatch, layers: Layers) -> Tensor:
        residual = self._embed(tokens)
        layers(residual, self._inputs(residual, rotations, batch))
        if self._norm_bias is not None:
            return F.layer_norm(
                residual, self._norm_weight.shape, self._norm_weight, self._norm_bias, self.args.norm_eps
            )
        return F.rms_norm(residual, self._norm_weight.shape, self._norm_weight, self.args.norm_eps)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens (n_tokens,) in new memory, fp32: layers add to them in place."""
        table = self.tok_embeddings.weight
        if self.parallel.size > 1 or self.tok_embeddings.low_rank is not None:
            return self.tok_embeddings(tokens).to(torch.float32, copy=True)
        if isinstance(table, Tensor):
            return F.embedding(tokens, table).float()
        return ops.embedding(self._described.table, tokens)

    def _run_few(self, x: Tensor, inputs: structures.LayersInput) -> None:
        """Run the layers in C++ on the residual x (n_tokens, dim), in place; ranks add up results after each half."""
        if self.parallel.size == 1:
            ops.run_layers(self._c_layers, 0, len(self._c_layers), ALL_PARTS, inputs)
            return
        share = torch.empty_like(x)
        (inputs.out,) = ops.pointers((share, torch.float32, x.numel()))
        heads = [ops.new(len(x), n * inputs.head_dim) for n in (inputs.n_heads, inputs.n_kv_heads)]
        inputs.q, inputs.k = ops.pointers(*((each, torch.float32, each.numel()) for each in heads))
        for i, layer in enumerate(self.layers):
            parts = structures.PROJECTION | structures.ATTENTION
            if self._c_layers[i].head_norm == structures.HEADS_OF_RANKS:
                ops.run_layers(self._c_layers, i, i + 1, structures.PROJECTION, inputs)
                parts = structures.ATTENTION
                for each, norm in zip(heads, (layer.attention.q_norm, layer.attention.k_norm), strict=True):
                    each.copy_(norm(each))
            ops.run_layers(self._c_layers, i, i + 1, parts, inputs)
            self._add_shares(x, share, layer.attention.wo.bias, layer.attention_norm)
            ops.run_layers(self._c_layers, i, i + 1, structures.FEED_FORWARD, inputs)
            self._add_shares(x, share, layer.feed_forward.bias, layer.ffn_norm)

    def _add_shares(self, x: Tensor, share: Tensor, bias: Tensor | None, norm: torch.nn.Module) -> None:
        """Add to the residual x (n_tokens, dim), in place, what half a layer gives: each rank has its share."""
        delta = self.parallel.all_reduce(share)
        if bias is not None:
            delta = delta + bias
        x += norm(delta) if self.args.output_norms else delta

    def _run_many(self, x: Tensor, inputs: structures.LayersInput) -> None:
        """Run the layers on the residual x (n_tokens, dim), in place, with matrix products for many tokens."""
        eps, dtype = self.args.norm_eps, self.dtype
        delta, of_delta = None, structures.NormView()
        for i, described in enumerate(self._c_layers):
            delta = self._attend(i, x, delta, of_delta, inputs)
            h = ops.fused_add_norm(x, delta, described.attention_output_norm, described.ffn_norm, eps, dtype)
            delta, of_delta = self._feed_forward(i, h), described.ffn_output_norm
            del h
        ops.fused_add_norm(x, delta, of_delta, None, eps, dtype)

    def _attend(
        self, layer: int, x: Tensor, delta: Tensor | None, of_delta: structures.NormView, inputs: structures.LayersInput
    ) -> Tensor:
        """Add the norm of delta to the residual x in place; return a layer's attention of the sum: (n_tokens, dim)."""
        attention, of_sum = self.layers[layer].attention, self._c_layers[layer].attention_norm
        h = ops.fused_add_norm(x, delta, of_delta, of_sum, self.args.norm_eps, self.dtype)
        q, k, v = attention.wq(h), attention.wk(h), attention.wv(h)
        if self._c_layers[layer].head_norm == structures.HEADS_OF_RANKS:
            q, k = attention.q_norm(q), attention.k_norm(k)
        ops.rope_and_append_kv(self._c_layers, layer, inputs, q, k, v)
        del h, k, v
        ops.attend(self._c_layers, layer, inputs, q)
        y: Tensor = attention.wo(q)
        return y

    def _feed_forward(self, layer: int, h: Tensor) -> Tensor:
        """Return a layer's feed-forward of h (n_tokens, dim)."""
        feed_forward = self.layers[layer].feed_forward
        activation = self._c_layers[layer].activation

        def run(module: FeedForward, x: Tensor) -> Tensor:
            if self.args.is_gated:
                hidden = ops.silu_and_mul(module.w1(x), module.w3(x))
            else:
                hidden = ops.activate(activation, module.w3(x))
            y: Tensor = module.w2(hidden)
            return y

        if isinstance(feed_forward, FeedForward):
            return run(feed_forward, h)
        return self.parallel.all_reduce(feed_forward.local_sum(h, run).to(self.dtype))

    def _inputs(self, x: Tensor, rotations: Tensor, batch: ForwardBatch) -> structures.LayersInput:
        """Return the C structure of what layers read and write; the residual x is (n_tokens, dim), fp32."""
        keys, values, table = batch.cache.keys, batch.cache.values, batch.page_table
        (n_rows, pages_per_row), n_pages, cached = table.shape, keys.shape[1], keys.numel()
        attention = self.layers[0].attention
        shape = (len(self.layers), n_pages, structures.PAGE_SIZE, attention.n_local_kv_heads, attention.head_dim)
        assert keys.shape == shape, (keys.shape, shape)
        n_tokens, half = len(x), self.args.head_dim // 2
        addresses = ops.pointers(
            (batch.positions, torch.int64, n_tokens),
            (batch.rows, torch.int32, n_tokens),
            (table, torch.int32, n_rows * pages_per_row),
            (rotations, torch.complex64, self._described.n_rotations * n_tokens * half),
            (keys, keys.dtype, cached),
            (values, keys.dtype, cached),
            (x, torch.float32, n_tokens * self.args.dim),
        )
        residual = addresses.pop()
        inputs = structures.LayersInput(
            n_tokens=n_tokens,
            n_rows=n_rows,
            pages_per_row=pages_per_row,
            n_pages=n_pages,
            cache_type=structures.FLOAT_TYPE_IDS[keys.dtype],
            **dict(zip(("positions", "rows", "page_table", "rotations", "keys", "values"), addresses, strict=True)),
            x=residual,
            out=residual,
            threads=torch.get_num_threads(),
            **self._constants,
        )
        assert ops.is_within_cache(inputs)
        return inputs
