"""Layers run by the GPU's kernels give the model's own logits; on a CPU Triton's interpreter runs the kernels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is for Linux")

from llama.backends.cuda import attention, elementwise, gemm, gemv
from llama.backends.cuda.backend import CudaBackend
from llama.cache import PAGE_SIZE, ForwardBatch, KVCache
from llama.checkpoint.shapes import global_shapes
from llama.config import Experts, ModelArgs
from llama.distributed.layers import set_quantized_weight
from llama.model import Transformer
from llama.quantization.gguf_blocks import BLOCK_TYPES, QUANTIZE, quantize
from llama.quantization.planar import MAX_DEQUANT_GEMM_TOKENS, MAX_GEMV_TOKENS, Fp8Weight, PlanarWeight
from llama.quantization.weights import LowRank
from llama.rope_scaling import QueryScaling
from tests.checkpoints import TINY, random_state, write_meta
from tests.models import build, random_tokens, transformer

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=64, hidden_dim=96, head_dim=16)


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a few rows as for many."""
    if DEVICE == "cpu":
        tile = gemm.Tile(64, 4, 4, 1)
        tiles = dict.fromkeys((MAX_GEMV_TOKENS, MAX_DEQUANT_GEMM_TOKENS), (tile, tile))
        monkeypatch.setattr(gemm, "TILES", dict.fromkeys(gemm.TILES, tiles))
        monkeypatch.setattr(gemm, "FP32_TILE", tile)
        monkeypatch.setattr(gemv, "ROWS", dict.fromkeys(gemv.ROWS, 64))
        monkeypatch.setattr(elementwise, "VECTOR", 4096)
        monkeypatch.setattr(attention, "PROGRAMS", 1)


def state_of(args: ModelArgs) -> dict[str, Tensor]:
    """Random tensors of all names, of vectors beside Llama's too."""
    generator = torch.Generator().manual_seed(3)
    state = random_state(args)

    def made(name: str, shape: tuple[int, ...]) -> Tensor:
        if "bias" in name:
            return torch.randn(shape, generator=generator) / 8
        if "xielu" in name:
            return torch.tensor([0.7, 1.3, 0.5, -1e-6])
        return state.get(name, 1 + torch.randn(shape, generator=generator) / 4)

    return {name: made(name, shape) for name, shape in global_shapes(args).items()}


MODELS = {
    "floats": ARGS,
    "biases": dataclasses.replace(ARGS, attention_bias=True, mlp_bias=True),
    "window": dataclasses.replace(ARGS, sliding_window=7),
    "tied": dataclasses.replace(ARGS, tied_embeddings=True),
    "experts": dataclasses.replace(ARGS, n_layers=1, experts=Experts(4, 2, 96)),
}
# What further families compute, in a few models that have all of it.
FURTHER = {
    "chunks": dataclasses.replace(
        ARGS,
        attention_chunk=5,
        full_layers=(1,),
        unrotated_layers=(1,),
        qk_norm="unit",
        query_scaling=QueryScaling(beta=0.5, period=4),
        activation="relu2",
        mlp_bias=True,
    ),
    "windows": dataclasses.replace(
        ARGS,
        sliding_window=7,
        full_layers=(1,),
        window_rope_theta=50.0,
        qk_norm="all heads",
        output_norms=True,
        activation="xielu",
    ),
    "layer norms": dataclasses.replace(
        ARGS,
        layer_norms=True,
        rotary_dim=8,
        qk_norm="rotated head",
        query_scaling=QueryScaling(beta=0.5, period=4, shift=1),
    ),
}


def pair(args: ModelArgs, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Transformer]:
    """A model run by torch's operations, and the same run by the kernels."""
    plain, other = (transformer(args, state_of(args)).to(DEVICE, dtype) for _ in range(2))
    CudaBackend(other.device).bind(other)
    return plain, other


def logits(model: Transformer, prompt_len: int = 12, chunk_len: int = 11) -> Iterator[Tensor]:
    """Of ragged prompts, and then of steps of three tokens and of one, at positions of each row's own."""
    cache = model.new_cache(3, 32)
    tokens = random_tokens(3, 24, vocab_size=64).to(DEVICE)
    start_pos = torch.tensor([12, 4, 9], device=DEVICE).clamp(max=prompt_len)
    yield model(tokens[:, :prompt_len], torch.zeros_like(start_pos), cache)
    for seqlen in (3, 1):  # nine tokens, and three
        yield model(tokens[:, :seqlen], start_pos, cache)
        start_pos += seqlen
    yield model(tokens[:2, :chunk_len], start_pos[:2], cache)  # a chunk of a prompt, of two rows
    yield model(tokens[:1, 11:12], start_pos[:1] + chunk_len, cache)  # one token


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_layers_by_kernels_give_the_models_own_logits(name: str) -> None:
    plain, other = pair(MODELS[name])
    for found, expected in zip(logits(other), logits(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_in_bf16_the_kernels_are_as_near_to_fp32_as_torch() -> None:
    """Prompts, too, which take torch's own attention."""
    plain, other = pair(ARGS, torch.bfloat16)
    state = {name: weight.bfloat16() for name, weight in random_state(ARGS).items()}
    exact = transformer(ARGS, {name: weight.float() for name, weight in state.items()}).to(DEVICE)
    for found, expected, truth in zip(logits(other), logits(plain), logits(exact), strict=True):
        # The interpreter cuts off the bits that a GPU rounds, which doubles an error.
        factor = 1.2 if DEVICE == "cuda" else 2
        assert (found - truth).norm() <= factor * (expected - truth).norm()


def hold(model: Transformer, how: dict[str, str]) -> Transformer:
    """Hold linears as `how` says by their names; the same model in fp32 on their values."""
    dense = transformer(model.args, {name: weight.clone() for name, weight in model.state_dict().items()}).to(DEVICE)
    for layer, other in zip(model.layers, dense.layers, strict=True):
        for name, kind in how.items():
            half = "attention" if name in ("wq", "wk", "wv", "wo") else "feed_forward"
            linear: Any = getattr(getattr(layer, half), name)
            held: PlanarWeight | Fp8Weight
            if kind == "fp8":
                held = Fp8Weight.of(linear.weight)
            else:
                held = PlanarWeight(quantize(linear.weight, BLOCK_TYPES[QUANTIZE[kind]]), BLOCK_TYPES[QUANTIZE[kind]])
            set_quantized_weight(linear, held)
            getattr(getattr(other, half), name).weight.copy_(held.dense(torch.float32))
    CudaBackend(model.device).bind(model)
    return dense


@torch.inference_mode()
@pytest.mark.parametrize(
    "how",
    [
        dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "int4"),
        dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "fp8"),
        {"wq": "int4", "wk": "int4", "wv": "int8", "w1": "int8", "w2": "int8"},  # as Q4_K_M mixes types
    ],
    ids=["int4", "fp8", "mixed"],
)
def test_quantized_layers_give_the_logits_of_their_values(how: dict[str, str]) -> None:
    args = MODELS["biases"] if "wo" not in how else ARGS
    model = transformer(args, state_of(args)).to(DEVICE)
    dense = hold(model, how)
    # More than 16 tokens make weights dense, for which the interpreter runs a program a row: in the mixed model alone.
    lengths = (5, 11) if "wo" not in how else (5, 8)
    for found, expected in zip(logits(model, *lengths), logits(dense, *lengths), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of what a tile has beyond the last token
@pytest.mark.parametrize("name", FURTHER)
def test_layers_of_further_families_give_the_models_own_logits(name: str) -> None:
    """Prompts beyond windows and chunks, and a step, in which blocks are multiplied as they are stored."""
    assert CudaBackend.computes(FURTHER[name])
    model = transformer(FURTHER[name], state_of(FURTHER[name])).to(DEVICE)
    dense = hold(model, {"w3": "int4"} if name == "windows" else {})
    for found, expected in itertools.islice(zip(logits(model), logits(dense), strict=True), 2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("n_tokens", [1, MAX_GEMV_TOKENS + 1])
def test_logits_are_not_rounded_to_the_models_dtype(n_tokens: int) -> None:
    """Of more than 8 rows they once were: a text depended on whether 8 or 9 ran together."""
    if DEVICE == "cpu" and n_tokens > MAX_GEMV_TOKENS:
        pytest.skip("on a CPU torch's own product of 16-bit floats rounds to 16 bits")
    _, model = pair(ARGS, torch.bfloat16)
    found = model.logits(torch.randn(n_tokens, ARGS.dim, device=DEVICE).bfloat16())
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@torch.inference_mode()
def test_joined_weights_are_held_once() -> None:
    model = transformer(ARGS, random_state(ARGS)).to(DEVICE)
    before = model.weight_bytes
    CudaBackend(model.device).bind(model)
    attention: Any = model.layers[0].attention
    assert attention.wk.weight.data_ptr() == attention.wq.weight.data_ptr() + attention.wq.weight.nbytes
    assert model.weight_bytes == before
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in random_state(ARGS).items()
    }


@pytest.mark.parametrize(("name", "dtype"), [("floats", torch.bfloat16), ("experts", torch.float32)], ids=str)
@torch.inference_mode()
def test_a_token_is_the_same_alone_and_among_guesses(name: str, dtype: torch.dtype) -> None:
    """To the bit: so that checking guesses changes no text. Scores of experts hung on how many tokens had them."""
    _, model = pair(MODELS[name], dtype)
    tokens = random_tokens(1, 12, vocab_size=64).to(DEVICE)
    start = torch.zeros(1, dtype=torch.long, device=DEVICE)
    one, many = model.new_cache(1, 32), model.new_cache(1, 32)
    for cache in (one, many):
        model(tokens[:, :7], start, cache)
    together = model(tokens[:, 7:], start + 7, many)
    for i in range(5):
        alone = model(tokens[:, 7 + i : 8 + i], start + 7 + i, one)
        assert torch.equal(alone[:, 0], together[:, i])


PAGES = torch.tensor([[7, 2, 5], [1, 9, 4], [8, 3, 6]], dtype=torch.int32, device=DEVICE)


def run_ragged(model: Transformer, starts: list[int], counts: list[int], cache: KVCache) -> Tensor:
    """Logits (n_tokens, vocab_size) of some tokens of each row; their pages lie anywhere."""
    tokens = random_tokens(3, 40, vocab_size=64).to(DEVICE)
    new = [tokens[row, start : start + n] for row, (start, n) in enumerate(zip(starts, counts, strict=True))]
    batch = ForwardBatch.of(cache, PAGES[: len(new)], starts, counts, [None] * len(new))
    return model.logits(model.hidden(torch.cat(new), batch))


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_steps_parts_of_prompts_and_prompts_are_one_pass(dtype: torch.dtype, bound: float) -> None:
    """Prompts were read before anything else; a step waits for no prompt now."""
    passes = [
        ([0], [19]),
        ([19, 0], [1, 10]),  # a step, beside the first part of a prompt
        ([20, 10, 0], [1, 12, 11]),  # beside the second, and a whole prompt
        ([21, 22, 11], [1, 1, 3]),
        ([22, 23, 14], [1, 1, 1]),
    ]
    models = pair(ARGS, dtype)
    caches = [model.new_cache(1, 10 * PAGE_SIZE) for model in models]
    for starts, counts in passes:
        expected, found = (
            run_ragged(model, starts, counts, cache) for model, cache in zip(models, caches, strict=True)
        )
        assert (found - expected).norm() <= bound * expected.norm(), (starts, counts)
    unused = [page for page in range(10) if page not in PAGES]
    assert not caches[1].keys[:, unused].any() and not caches[1].values[:, unused].any()


class NoWait(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: a value that the host asks the device for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")), func
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of what a tile has beyond the last token
@pytest.mark.parametrize(
    ("seqlen", "args"), [(1, ARGS), (3, ARGS), (1, FURTHER["chunks"])], ids=["one token", "three", "chunks"]
)
def test_a_step_whose_lengths_the_host_does_not_know_is_the_same(seqlen: int, args: ModelArgs) -> None:
    """As a CUDA graph captures it, which holds at every length."""
    _, model = pair(args, torch.bfloat16)
    starts = [19, 2, 9]
    tokens = random_tokens(3, seqlen, vocab_size=64).flatten().to(DEVICE)
    caches = [model.new_cache(1, 10 * PAGE_SIZE) for _ in range(2)]
    for cache in caches:
        run_ragged(model, [0, 0, 0], starts, cache)
    expected = model.hidden(tokens, ForwardBatch.of(caches[0], PAGES, starts, [seqlen] * 3, [None] * 3))
    start_pos = torch.tensor(starts, device=DEVICE)
    with NoWait():
        found = model.hidden(tokens, ForwardBatch.of_steps(caches[1], start_pos, seqlen, PAGES))
    if seqlen == 1:  # else each row is a group, and may be split otherwise
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(caches[1].keys, caches[0].keys, rtol=0.02, atol=0.02)


class RepeatingBackend(CudaBackend):
    """Steps run again instead of captured ones, as there is nothing to capture without a GPU."""

    captures_graphs = True  # type: ignore[assignment]

    def graph_capture(self) -> Any:
        return lambda run: run


def test_a_checkpoint_is_built_and_completed_as_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in planes, layers by kernels, steps that are captured and launched ahead."""
    write_meta(tmp_path, dataclasses.replace(TINY, n_heads=4, n_kv_heads=2, multiple_of=64, hidden_dim=None))
    prompts, options = [[5, 6, 7], [8]], {"temperature": 0.8, "top_p": 0.9, "seed": 2}
    expected = build(tmp_path, quantize="int8").generate(prompts, 4, logprobs=True, **options)
    monkeypatch.setattr("llama.engine.build.choose_backend", lambda device, *_: RepeatingBackend(device))
    llm = build(tmp_path, quantize="int8")
    assert llm.model.weight_types[0] == "Q8_0"
    tokens, scores = llm.generate(prompts, 4, logprobs=True, **options)
    assert llm.engine.room.runners[0].runs_ahead
    assert tokens == expected[0]
    for row, wanted in zip(scores or [], expected[1] or [], strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@torch.inference_mode()
def test_adapters_beside_quantized_weights_give_the_same_logits() -> None:
    """Of q and w3 alone: products of joined weights get them in their rows. Of the table and the output, too."""
    args = dataclasses.replace(ARGS, n_layers=1)
    generator = torch.Generator().manual_seed(1)
    without, plain, other = (transformer(args, state_of(args)).to(DEVICE) for _ in range(3))
    names = ("layers.0.attention.wq", "layers.0.feed_forward.w3", "layers.0.attention.wo", "output", "tok_embeddings")
    for name in names:
        rows, columns = plain.get_submodule(name).weight.shape  # type: ignore[union-attr, misc]
        a, b = torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator) / 5
        for model in (plain, other):
            module, block_type = model.get_submodule(name), BLOCK_TYPES["Q8_0"]
            held = PlanarWeight(quantize(module.weight, block_type), block_type)  # type: ignore[arg-type]
            set_quantized_weight(module, held, LowRank(a.to(DEVICE), b.to(DEVICE)))
    CudaBackend(other.device).bind(other)
    for expected, found, before in zip(logits(plain), logits(other), logits(without), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        assert (expected - before).abs().max() > 0.1
