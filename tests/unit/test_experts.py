"""Mixtures of experts by kernels: the model's own logits, at a token's own pace, whatever passes the same experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.backends.base import choose_backend
from llama.backends.cpu.backend import CpuBackend
from llama.backends.cpu.build import library
from llama.backends.cpu.packed_weight import PackedWeight
from llama.checkpoint.names import module_name
from llama.checkpoint.shapes import global_shapes
from llama.config import Experts, ModelArgs
from llama.distributed.layers import set_quantized_weight
from llama.model import Transformer
from llama.quantization.gguf_blocks import BLOCK_TYPES, dequantize, quantize
from llama.rope_scaling import QueryScaling
from tests.models import random_tokens, transformer

ARGS = ModelArgs(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=101, hidden_dim=64)
MODELS = {
    "mixtral": dataclasses.replace(ARGS, experts=Experts(5, 2, 160)),
    "softmax of all": dataclasses.replace(ARGS, experts=Experts(7, 3, 32, "softmax")),
    "shared, in two layers": dataclasses.replace(ARGS, experts=Experts(6, 2, 96, "sigmoid of input", 128, (1,))),
    "llama 4": dataclasses.replace(
        ARGS,
        experts=Experts(4, 1, 64, "sigmoid of input", 64),
        attention_chunk=5,
        full_layers=(1,),
        unrotated_layers=(1,),
        qk_norm="unit",
        query_scaling=QueryScaling(0.4, 3, shift=1),
    ),
}
needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


def random_model(args: ModelArgs, dtype: torch.dtype = torch.float32) -> Transformer:
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in global_shapes(args).items():
        values = torch.randn(shape, generator=generator)
        state[name] = 1 + values / 10 if len(shape) == 1 else values * (shape[1] ** -0.5 if "tok" not in name else 1)
    return transformer(args, {name: values.to(dtype) for name, values in state.items()})


def hold_blocks(model: Transformer, block_type: str) -> None:
    """Hold the matrices of feed-forwards in blocks, and their values in the model's own floats."""
    kind = BLOCK_TYPES[block_type]
    for name, module in model.layers.named_modules():
        if name.rpartition(".")[2] in ("w1", "w2", "w3"):
            blocks = quantize(module.weight, kind)
            set_quantized_weight(module, PackedWeight(blocks, kind))


def logits(model: Transformer, prompt_len: int = 12) -> list[Tensor]:
    """Of ragged prompts, and then of steps of three tokens and of one, at positions of each row's own."""
    cache = model.new_cache(3, 128)
    tokens = random_tokens(3, max(24, prompt_len), vocab_size=101)
    start_pos = torch.tensor([12, 4, 9]).clamp(max=prompt_len)
    found = [model(tokens[:, :prompt_len], torch.zeros_like(start_pos), cache)]
    for seqlen in (3, 1):
        found.append(model(tokens[:, :seqlen], start_pos, cache))
        start_pos += seqlen
    return found


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("prompt_len", [12, 90])  # in one call through all layers, and in products of many tokens
@pytest.mark.parametrize("name", MODELS)
def test_cpu_kernels_give_the_models_own_logits(name: str, prompt_len: int) -> None:
    plain, other = random_model(MODELS[name]), random_model(MODELS[name])
    backend = choose_backend(torch.device("cpu"), MODELS[name])
    assert isinstance(backend, CpuBackend)
    backend.bind(other)
    for found, expected in zip(logits(other, prompt_len), logits(plain, prompt_len), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@needs_kernels
@torch.inference_mode()
def test_experts_in_blocks_compute_with_their_values() -> None:
    args = MODELS["shared, in two layers"]
    other = random_model(args)
    state = {
        name: dequantize(quantize(weight, BLOCK_TYPES["Q4_1"]), BLOCK_TYPES["Q4_1"])
        if module_name(name) in ("w1", "w2", "w3")
        else weight
        for name, weight in other.state_dict().items()
    }
    plain = transformer(args, state)
    hold_blocks(other, "Q4_1")
    CpuBackend(torch.device("cpu")).bind(other)
    for found, expected in zip(logits(other), logits(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # activations are rounded to 16 bits


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("block_type", [None, "Q4_1"])
@pytest.mark.parametrize("name", MODELS)
def test_a_token_does_not_feel_who_passes_its_experts(name: str, block_type: str | None) -> None:
    """Its bits would depend on how many tokens an expert has, or on the order in which experts are added."""
    model = random_model(MODELS[name])
    if block_type is not None:
        hold_blocks(model, block_type)
    CpuBackend(torch.device("cpu")).bind(model)
    tokens = random_tokens(11, 1, vocab_size=101)
    together = model(tokens, torch.zeros(11, dtype=torch.long), model.new_cache(11, 16))
    threads = torch.get_num_threads()
    for row in (0, 4, 10):
        torch.set_num_threads(1 + row % 3)
        alone = model(tokens[row : row + 1], torch.zeros(1, dtype=torch.long), model.new_cache(1, 16))
        torch.set_num_threads(threads)
        assert torch.equal(alone[0], together[row])


@torch.inference_mode()
def test_only_experts_that_tokens_pass_are_read() -> None:
    """Others may hold anything: weights that are not numbers here, which a factor of zero would not take away."""
    model = random_model(dataclasses.replace(MODELS["mixtral"], n_layers=1))
    experts: Any = model.layers[0].feed_forward
    tokens = torch.tensor([[3]])
    expected = model(tokens, torch.zeros(1, dtype=torch.long), model.new_cache(1, 16))
    used = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        used.append(module)

    hooks = [expert.w1.register_forward_pre_hook(note) for expert in experts.experts]
    model(tokens, torch.zeros(1, dtype=torch.long), model.new_cache(1, 16))
    for hook in hooks:
        hook.remove()
    assert len(used) == 2
    for expert in experts.experts:
        if expert.w1 not in used:
            for name in ("w1", "w2", "w3"):
                getattr(expert, name).weight.fill_(torch.nan)
    for backend in ("eager", "cpu") if library() is not None else ("eager",):
        if backend == "cpu":
            CpuBackend(torch.device("cpu")).bind(model)
        found = model(tokens, torch.zeros(1, dtype=torch.long), model.new_cache(1, 16))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_weights_read_for_a_token_are_those_of_the_experts_it_passes() -> None:
    args = MODELS["shared, in two layers"]
    with torch.device("meta"):
        model = Transformer(args)
    all_experts = sum(4 * a * b for name, (a, b) in _matrices(args) if ".experts." in name)
    others = sum(4 * a * b for name, (a, b) in _matrices(args) if ".experts." not in name and "tok_emb" not in name)
    norms = 4 * (2 * args.n_layers + 1) * args.dim
    assert model.weight_bytes == others + all_experts * 2 // 6 + norms


def _matrices(args: ModelArgs) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in global_shapes(args).items() if len(shape) == 2]
