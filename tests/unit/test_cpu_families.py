"""The CPU kernels compute what further families do, as the model's own modules say it, and a token at its own pace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llama.backends.cpu import ops as kernels
from llama.backends.cpu.backend import CpuBackend
from llama.backends.cpu.build import library
from llama.backends.cpu.packed_weight import PackedWeight
from llama.cache import PAGE_SIZE, ForwardBatch
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, set_quantized_weight
from llama.model import Transformer
from llama.quantization.gguf_blocks import BLOCK_TYPES, quantize
from llama.quantization.weights import BlockWeight
from llama.rope_scaling import QueryScaling
from tests.models import random_tokens
from tests.unit.test_kernels import close

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

Q8_0 = BLOCK_TYPES["Q8_0"]


def args_of(**fields: Any) -> ModelArgs:
    base = {"dim": 64, "n_layers": 4, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "vocab_size": 64, "hidden_dim": 96}
    return ModelArgs(**base | fields)


FAMILIES = {
    "window": args_of(sliding_window=70, full_layers=(3,)),
    "chunk": args_of(attention_chunk=90, full_layers=(1,), unrotated_layers=(1,)),
    "window and chunk": args_of(sliding_window=50, attention_chunk=129),
    "two thetas": args_of(sliding_window=40, full_layers=(0, 2), window_rope_theta=500.0, rotary_dim=16),
    "scaled queries": args_of(query_scaling=QueryScaling(0.3, 64), unrotated_layers=(0, 3), score_factor=1.5),
    "heads": args_of(qk_norm="head", attention_bias=True),
    "rotated heads": args_of(qk_norm="rotated head", score_factor=0.7),
    "all heads": args_of(qk_norm="all heads", output_norms=True),
    "unit": args_of(qk_norm="unit", unrotated_layers=(1, 3), attention_chunk=64),
    "narrow heads": args_of(qk_norm="head", head_dim=10, output_norms=True),
    "layer norms": args_of(layer_norms=True, attention_bias=True, mlp_bias=True),
    "layer norms of outputs": args_of(layer_norms=True, output_norms=True, mlp_bias=True, dim=50),
    "relu2": args_of(activation="relu2", hidden_dim=90),
    "xielu": args_of(activation="xielu", mlp_bias=True),
    "everything": args_of(
        sliding_window=70,
        full_layers=(3,),
        unrotated_layers=(1,),
        window_rope_theta=700.0,
        query_scaling=QueryScaling(0.2, 100),
        qk_norm="all heads",
        output_norms=True,
        layer_norms=True,
        activation="xielu",
    ),
}
# Whose rows are whole blocks of 32 values.
IN_BLOCKS = [name for name, of in FAMILIES.items() if not any(n % 32 for n in (of.dim, of.hidden_dim, of.head_dim))]


def random_model(args: ModelArgs, in_blocks: bool = False, parallel: ModelParallel | None = None) -> Transformer:
    """A model of random weights, which are near 1 in norms. In blocks, its linears have Q8_0 that torch multiplies."""
    model = Transformer(args, parallel)
    own = torch.Generator().manual_seed(7 + model.parallel.rank)
    for name, weight in model.state_dict().items():
        is_split = ".w" in name and not name.endswith(("wo.bias", "w2.bias"))
        values = torch.randn(weight.shape, generator=own if is_split else torch.Generator().manual_seed(len(name)))
        if name.endswith("xielu.weight"):
            values = torch.tensor([0.8, 0.6, 0.5, -1e-6])
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * values
        elif weight.dim() > 1 and "embeddings" not in name:
            values /= weight.shape[1] ** 0.5
        weight.copy_(values)
    if in_blocks:
        for module in model.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                assert isinstance(module.weight, Tensor)
                set_quantized_weight(module, BlockWeight(quantize(module.weight, Q8_0), Q8_0))
    return model


def bind_kernels(model: Transformer) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, BlockWeight):
            module.weight = PackedWeight(weight.blocks, Q8_0)
    CpuBackend(model.device).bind(model)


PAGES = 40  # of a row
# Few tokens, and many: rows at positions beyond windows, chunks and several pages; some decode, and some prefill.
STEPS = {
    "few": ([300, 16, 530, 88], [1, 3, 1, 5]),
    "many": ([200, 7, 33, 0, 90, 500], [1, 1, 40, 80, 20, 1]),
}


def step(model: Transformer, starts: list[int], counts: list[int], rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Final states of random tokens of these rows, whose pages are scattered, and the cached keys."""
    generator, n_pages = torch.Generator().manual_seed(5), PAGES * len(starts)
    cache = model.new_cache(1, n_pages * PAGE_SIZE)
    for cached in (cache.keys, cache.values):
        cached.normal_(generator=generator)
    table = torch.randperm(n_pages, generator=generator).int().view(len(starts), PAGES)
    tokens = torch.cat(random_tokens(sum(counts), vocab_size=64).split(counts)[rows])
    starts, counts = starts[rows], counts[rows]
    batch = ForwardBatch.of(cache, table[rows], starts, counts, [None] * len(starts))
    return model.hidden(tokens, batch), cache.keys


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "floats") for name in FAMILIES), *((name, "blocks") for name in IN_BLOCKS), ("everything", "bfloat16")],
)
@torch.inference_mode()
def test_layers_of_every_family_are_what_the_model_says(name: str, kind: str) -> None:
    """In both ways through the layers: of few tokens in C++ alone, and of many with matrix products between."""
    bound = {"floats": 2e-5, "blocks": 2e-4, "bfloat16": 1e-2}[kind]
    model = random_model(FAMILIES[name], kind == "blocks")
    if kind == "bfloat16":
        model = model.bfloat16().float()
    expected = [step(model, *of) for of in STEPS.values()]
    bind_kernels(model.bfloat16() if kind == "bfloat16" else model)
    for (states, keys), of in zip(expected, STEPS.values(), strict=True):
        actual = step(model, *of)
        close(actual[0].float(), states, bound)
        close(actual[1].float(), keys, bound)


@pytest.mark.parametrize("name", ["window", "chunk", "heads", "all heads", "unit", "layer norms", "everything"])
@torch.inference_mode()
def test_tokens_of_every_family_are_computed_at_their_own_pace(name: str) -> None:
    """To the bit, whatever is beside them, on any number of threads and however a prompt is cut."""
    model = random_model(FAMILIES[name], in_blocks=True)
    bind_kernels(model)
    starts, counts = STEPS["few"]
    together = step(model, starts, counts)[0].split(counts)
    for row in range(len(starts)):
        assert torch.equal(step(model, starts, counts, slice(row, row + 1))[0], together[row]), row
    threads = torch.get_num_threads()
    try:
        for n_threads in (2, 3):
            torch.set_num_threads(n_threads)
            assert torch.equal(step(model, starts, counts)[0], torch.cat(together)), n_threads
    finally:
        torch.set_num_threads(threads)
    tokens, table = random_tokens(100, vocab_size=64), torch.arange(PAGES, dtype=torch.int32).view(1, -1)
    whole, parts = (
        torch.cat(
            [
                model.hidden(tokens[first:stop], ForwardBatch.of(cache, table, [first], [stop - first], [None]))
                for first, stop in spans
            ]
        )
        for cache, spans in (
            (model.new_cache(1, 640), [(0, 100)]),
            (model.new_cache(1, 640), [(0, 70), (70, 90), (90, 91), (91, 100)]),
        )
    )
    close(parts, whole, bound=1e-3)
    if not kernels.has_matrix_unit():
        assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", ["all heads", "layer norms of outputs", "everything"])
def test_ranks_that_share_heads_and_features_compute_the_same(name: str) -> None:
    """Norms of all heads, and those of what all ranks add up, need what other ranks have."""
    store, size = torch._C._distributed_c10d.HashStore(), 2

    def run(rank: int) -> list[tuple[Tensor, Tensor]]:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        with torch.inference_mode():
            model = random_model(FAMILIES[name], parallel=ModelParallel(rank, size, cast(dist.ProcessGroup, group)))
            results = [step(model, *of) for of in STEPS.values()]
            bind_kernels(model)
            return results + [step(model, *of) for of in STEPS.values()]

    with ThreadPoolExecutor(size) as ranks:
        for results in ranks.map(run, range(size)):
            for (states, keys), actual in zip(results[:2], results[2:], strict=True):
                close(actual[0], states)
                close(actual[1], keys)
