"""The CPU kernels compute what torch does, at a token's own pace: whatever else is computed with it changes no bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llama.backends.cpu import ops as kernels
from llama.backends.cpu import structures
from llama.backends.cpu.backend import CpuBackend
from llama.backends.cpu.build import library
from llama.backends.cpu.packed_weight import PackedWeight
from llama.cache import PAGE_SIZE, ForwardBatch, KVCache
from llama.config import ModelArgs
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, set_quantized_weight
from llama.model import Transformer
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType, dequantize
from llama.quantization.weights import BlockWeight
from tests.checkpoints import random_state
from tests.gguf_files import SCALES_AT
from tests.models import random_tokens
from tests.models import transformer as on_state

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

TYPES = [block_type for block_type in BLOCK_TYPES.values() if PackedWeight.holds(block_type)]
# More rows than a tile has and no multiple of it; two blocks of 256 columns.
ROWS, COLUMNS = 37, 512


def random_blocks(block_type: BlockType, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Random bytes, but for scales: finite halves, some of them subnormal or zero."""
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (rows, columns // block_type.elements, block_type.size), generator=generator)
    blocks = blocks.to(torch.uint8)
    for at in SCALES_AT[block_type.name]:
        scales = torch.randn(blocks.shape[:2], generator=generator).half()
        scales[::5] *= 1e-6
        scales[::7] = 0
        blocks[:, :, at : at + 2] = scales[..., None].view(torch.uint8).view(*blocks.shape[:2], 2)
    return blocks.flatten(1)


def close(actual: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def in_16_bits(x: Tensor) -> Tensor:
    """Activations as the kernels round them for blocks: whole numbers of 16 bits, with a scale for 32 columns.

    In fp64, as processors round a product and a sum once.
    """
    groups = x.unflatten(-1, (-1, 32))
    limit = groups.abs().amax(dim=-1, keepdim=True)
    largest = 127 * 256 + 127
    return ((groups.double() * (largest / limit).double()).round() * (limit / largest).double()).flatten(-2)


@pytest.mark.parametrize("block_type", TYPES, ids=lambda kind: kind.name)
def test_packed_blocks_keep_every_value(block_type: BlockType) -> None:
    """Rows looked up, and rows made dense for a matrix product, are ggml's values."""
    blocks = random_blocks(block_type)
    weight, expected = PackedWeight(blocks, block_type), dequantize(blocks, block_type)
    ids = torch.tensor([[36, 0, 17], [16, 15, 36]])
    # A sum of two products is rounded once here, and twice there.
    assert torch.allclose(weight.rows(ids), expected[ids], rtol=1e-6, atol=1e-6)
    assert weight.nbytes >= blocks.nbytes


def test_packed_weights_share_memory_and_no_byte_of_it() -> None:
    """They lie in huge pages, next to each other; what is packed later once could have been written over them."""
    block_type = BLOCK_TYPES["Q4_0"]
    stored = [random_blocks(block_type, rows, 4096) for rows in (3, 40, 16384, 17, 1)]
    weights = [PackedWeight(blocks, block_type) for blocks in stored]
    spans = sorted((weight.tiles.data_ptr(), weight.tiles.data_ptr() + weight.nbytes) for weight in weights)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)
    for weight, blocks in zip(weights, stored, strict=True):
        rows = torch.arange(len(blocks))[-40:]
        assert torch.allclose(weight.rows(rows), dequantize(blocks[rows], block_type), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 8, 16, 17, 40, 70])
@pytest.mark.parametrize("block_type", TYPES, ids=lambda kind: kind.name)
def test_products_with_blocks_are_those_of_their_values(block_type: BlockType, n_tokens: int) -> None:
    """Activations are rounded to 16 bits, and nothing else is rounded but as fp32 is."""
    blocks = random_blocks(block_type)
    x = torch.randn(n_tokens, COLUMNS, generator=torch.Generator().manual_seed(n_tokens))
    values = dequantize(blocks, block_type).double()
    expected = (x.double() @ values.t()).float()
    close(BlockWeight(blocks, block_type)(x), expected)
    if n_tokens > kernels.max_few_tokens() and kernels.has_matrix_unit():  # two bf16 terms in place of 16 bits
        close(PackedWeight(blocks, block_type)(x), expected)
    else:
        rounded = in_16_bits(x).float()  # which the kernels find again, however the processor rounds products
        close(PackedWeight(blocks, block_type)(rounded), (rounded.double() @ values.t()).float(), bound=1e-5)
        close(PackedWeight(blocks, block_type)(x), expected, bound=1e-4)
    in_bfloat16 = PackedWeight(blocks, block_type)(x.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    close(in_bfloat16.float(), expected, bound=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, 1), (1, 15), (ROWS, 16), (3, 47), (ROWS, 100), (18, 577)])
def test_products_with_floats_are_torchs(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Of rows that fill no tile, and of columns that fill no vector and no cache line."""
    weight, bias = torch.randn(rows, columns).to(dtype), torch.randn(rows)
    described = kernels.float_weight(weight)
    described.bias = kernels.vector(bias, rows)
    for n_tokens in (1, 2, 3, 4, 5, 6, 7, 16, 33, structures.MAX_FEW_TOKENS):
        x = torch.randn(n_tokens, columns)
        close(kernels.multiply(described, x), (x.double() @ weight.double().t() + bias).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (19, 75)])
def test_products_with_floats_do_not_depend_on_a_tokens_place_or_on_threads(
    dtype: torch.dtype, rows: int, columns: int
) -> None:
    """Tokens are multiplied several at once, and their number decides which loop computes the last ones."""
    floats = torch.randn(rows, columns).to(dtype)
    weight, x = kernels.float_weight(floats), torch.randn(structures.MAX_FEW_TOKENS, columns)
    threads, together = torch.get_num_threads(), kernels.multiply(weight, x)
    for n_tokens in range(1, 12):
        for first in (0, 5, 29):
            part = slice(first, first + n_tokens)
            assert torch.equal(kernels.multiply(weight, x[part]), together[part]), (first, n_tokens)
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.multiply(weight, x), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block_type", TYPES, ids=lambda kind: kind.name)
def test_a_token_does_not_feel_how_many_are_computed_with_it(block_type: BlockType) -> None:
    """Else a speculated token could differ from the plain one."""
    packed = PackedWeight(random_blocks(block_type), block_type)
    x = torch.randn(structures.MAX_FEW_TOKENS, COLUMNS)
    together = kernels.multiply(packed.describe(), x)
    for n_tokens in (1, 2, 3, 5, 8, 11, 16, 17, 47):
        assert torch.equal(kernels.multiply(packed.describe(), x[:n_tokens]), together[:n_tokens])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block_type", TYPES, ids=lambda kind: kind.name)
def test_a_token_that_is_not_a_number_has_no_product_that_is_one(block_type: BlockType, value: float) -> None:
    """Its whole numbers were anything, and their sums beyond 32 bits. Tokens beside it keep theirs."""
    packed, x = PackedWeight(random_blocks(block_type), block_type), torch.randn(3, COLUMNS)
    before = kernels.multiply(packed.describe(), x)
    x[1, 40] = value
    after = kernels.multiply(packed.describe(), x)
    assert after[1].isnan().all()
    assert torch.equal(after[::2], before[::2])


ARCHITECTURES = {
    "grouped": ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=64, hidden_dim=72, max_seq_len=640),
    "odd heads": ModelArgs(dim=40, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=10, vocab_size=64, hidden_dim=50),
    "window": ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=64, hidden_dim=80, sliding_window=9),
    "biases": ModelArgs(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=64, hidden_dim=48, attention_bias=True, mlp_bias=True
    ),
}


def transformer(args: ModelArgs) -> Transformer:
    state = random_state(args)
    generator = torch.Generator().manual_seed(3)
    biased = {"attention": args.attention_bias, "feed_forward": args.mlp_bias}
    for name, weight in list(state.items()):
        if biased.get(name.split(".")[-3] if name.count(".") > 2 else ""):
            state[name.replace(".weight", ".bias")] = torch.randn(len(weight), generator=generator)
    return on_state(args, state)


def fused(model: Transformer) -> Transformer:
    """The same weights, run by the kernels."""
    other = Transformer(model.args)
    other.load_state_dict(model.state_dict())
    CpuBackend(other.device).bind(other)
    return other


def states_of(model: Transformer, tokens: Tensor, start_pos: Tensor, cache: KVCache) -> Tensor:
    """Final states (bsz, seqlen, dim) of tokens (bsz, seqlen) of the cache's first rows from start_pos (bsz,) on."""
    batch = ForwardBatch.of_rows(cache, start_pos, tokens.shape[1])
    return model.hidden(tokens.flatten(), batch).unflatten(0, tokens.shape)


def both(model: Transformer, tokens: Tensor, start_pos: Tensor, caches: tuple[KVCache, KVCache]) -> None:
    plain = states_of(model, tokens, start_pos, caches[0])
    close(states_of(fused(model), tokens, start_pos, caches[1]), plain)
    for plain_side, fused_side in zip(
        (caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values), strict=True
    ):
        close(fused_side, plain_side)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_layers_run_by_kernels_compute_what_the_model_says(name: str) -> None:
    """Of many tokens at once, then of a few for rows of different lengths, then of one."""
    model = transformer(ARCHITECTURES[name])
    caches = model.new_cache(3, 64), model.new_cache(3, 64)
    both(model, random_tokens(3, 13, vocab_size=64), torch.zeros(3, dtype=torch.long), caches)
    both(model, random_tokens(3, 4, vocab_size=64), torch.tensor([13, 5, 9]), caches)
    both(model, random_tokens(3, 1, vocab_size=64), torch.tensor([17, 9, 13]), caches)


@torch.inference_mode()
def test_long_rows_are_attended_to_in_parts() -> None:
    model = transformer(ARCHITECTURES["grouped"])
    caches = model.new_cache(2, 600), model.new_cache(2, 600)
    both(model, random_tokens(2, 580, vocab_size=64), torch.zeros(2, dtype=torch.long), caches)
    both(model, random_tokens(2, 3, vocab_size=64), torch.tensor([580, 250]), caches)


@torch.inference_mode()
def test_states_do_not_depend_on_the_batch_or_on_how_tokens_come() -> None:
    model = fused(transformer(ARCHITECTURES["grouped"]))
    tokens = random_tokens(2, 7, vocab_size=64)
    together = states_of(model, tokens, torch.zeros(2, dtype=torch.long), model.new_cache(2, 16))
    for row in range(2):
        cache = model.new_cache(1, 16)
        for place in range(7):
            alone = states_of(model, tokens[row : row + 1, place : place + 1], torch.tensor([place]), cache)
            assert torch.equal(alone[0, 0], together[row, place]), (row, place)


def filled(model: Transformer, n_pages: int) -> KVCache:
    """A cache of random keys and values, as long rows would leave it."""
    cache, generator = model.new_cache(1, n_pages * PAGE_SIZE), torch.Generator().manual_seed(5)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    return cache


def ragged(cache: KVCache, table: Tensor, starts: list[int], counts: list[int]) -> ForwardBatch:
    return ForwardBatch.of(cache, table, starts, counts, [None] * len(starts))


STARTS, COUNTS = [300, 16, 530, 5], [1, 3, 1, 4]
TABLE = torch.randperm(4 * 34, generator=torch.Generator().manual_seed(2)).int().view(4, 34)


@pytest.mark.parametrize("name", ["grouped", "window"])
@torch.inference_mode()
def test_pages_may_lie_anywhere(name: str) -> None:
    """Parts of attention are counted from a row's first key, and not from where a page happens to begin."""
    model = fused(transformer(ARCHITECTURES[name]))
    in_order = torch.arange(TABLE.numel(), dtype=torch.int32).view(TABLE.shape)
    caches = filled(model, TABLE.numel()), filled(model, TABLE.numel())
    for one, other in zip((caches[0].keys, caches[0].values), (caches[1].keys, caches[1].values), strict=True):
        other[:, TABLE.flatten()] = one
    tokens = random_tokens(sum(COUNTS), vocab_size=64)
    states = [
        model.hidden(tokens, ragged(cache, table, STARTS, COUNTS))
        for cache, table in zip(caches, (in_order, TABLE), strict=True)
    ]
    assert torch.equal(*states)
    assert torch.equal(caches[0].keys, caches[1].keys[:, TABLE.flatten()])
    assert torch.equal(caches[0].values, caches[1].values[:, TABLE.flatten()])


@pytest.mark.parametrize("name", ["grouped", "window"])
@torch.inference_mode()
def test_rows_of_any_lengths_in_one_pass_are_each_row_alone(name: str) -> None:
    model = fused(transformer(ARCHITECTURES[name]))
    tokens = random_tokens(sum(COUNTS), vocab_size=64)
    together = model.hidden(tokens, ragged(filled(model, TABLE.numel()), TABLE, STARTS, COUNTS)).split(COUNTS)
    cache = filled(model, TABLE.numel())
    for row, part in enumerate(tokens.split(COUNTS)):
        alone = model.hidden(part, ragged(cache, TABLE[row : row + 1], STARTS[row : row + 1], COUNTS[row : row + 1]))
        assert torch.equal(alone, together[row]), row


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_rows_that_decode_beside_a_prompt_are_attended_at_their_own_lengths(name: str) -> None:
    """Some tokens of many rows, and two parts of prompts, more than one call of the kernels takes."""
    model = transformer(ARCHITECTURES[name])
    starts = [200, 7, 33, 0, 90, 16, 500, *range(40, 56)]
    counts = [1, 1, 4, 30, 2, 20, 1, *[1] * 16]
    table = torch.randperm(len(starts) * 34, generator=torch.Generator().manual_seed(4)).int().view(-1, 34)
    tokens = random_tokens(sum(counts), vocab_size=64)
    caches = filled(model, table.numel()), filled(model, table.numel())
    plain = model.hidden(tokens, ragged(caches[0], table, starts, counts))
    close(fused(model).hidden(tokens, ragged(caches[1], table, starts, counts)), plain)
    close(caches[1].keys, caches[0].keys)
    close(caches[1].values, caches[0].values)


def packed(args: ModelArgs) -> Transformer:
    """A model whose linears have random blocks of 8 bits, run by the kernels."""
    model = transformer(args)
    for module in list(model.modules()):
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            blocks = random_blocks(BLOCK_TYPES["Q8_0"], *module.weight.shape)
            set_quantized_weight(module, PackedWeight(blocks, BLOCK_TYPES["Q8_0"]))
    CpuBackend(model.device).bind(model)
    return model


@pytest.mark.parametrize("kind", ["blocks", "bfloat16", "float32"])
@torch.inference_mode()
def test_forty_rows_are_each_row_alone(kind: str) -> None:
    """To the bit where there is no matrix unit: there the kernels take up to 64 tokens through all layers."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, hidden_dim=96)
    model = packed(args) if kind == "blocks" else transformer(args).to(getattr(torch, kind))
    CpuBackend(model.device).bind(model)
    starts, table = list(range(40)), torch.arange(120, dtype=torch.int32).view(40, 3)
    tokens = random_tokens(40, vocab_size=64)
    hidden = model.hidden(tokens, ragged(filled(model, 120), table, starts, [1] * 40))
    logits = model.logits(hidden)
    cache = filled(model, 120)
    bound = 1e-2 if kind == "bfloat16" else 1e-3  # beside a matrix unit, many tokens are rounded to bf16
    for row in range(40):
        alone = model.hidden(tokens[row : row + 1], ragged(cache, table[row : row + 1], starts[row : row + 1], [1]))
        close(alone[0], hidden[row], bound)
        close(model.logits(alone)[0], logits[row], bound)
        if not kernels.has_matrix_unit():
            assert torch.equal(alone[0], hidden[row]) and torch.equal(model.logits(alone)[0], logits[row]), row


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@torch.inference_mode()
def test_a_prompt_of_blocks_may_be_cut_anywhere(head_dim: int) -> None:
    """In fp32 and without a matrix unit, to the bit: 100 tokens pass as many, and parts of it as few.

    Rotations are computed in two places, where compilers once rounded another one of the two products of a sum.
    """
    args = ModelArgs(dim=64, n_layers=2, n_heads=16, n_kv_heads=16, head_dim=head_dim, vocab_size=64, hidden_dim=96)
    model = packed(args)
    tokens, table = random_tokens(100, vocab_size=64), torch.arange(20, dtype=torch.int32).view(1, 20)
    caches = filled(model, 20), filled(model, 20)
    whole = model.hidden(tokens, ragged(caches[0], table, [200], [100]))
    parts = []
    for first, stop in ((0, 70), (70, 90), (90, 91), (91, 100)):
        parts.append(model.hidden(tokens[first:stop], ragged(caches[1], table, [200 + first], [stop - first])))
    close(torch.cat(parts), whole, bound=1e-3)
    if not kernels.has_matrix_unit():
        assert torch.equal(torch.cat(parts), whole) and torch.equal(caches[0].keys, caches[1].keys)


@pytest.mark.parametrize(("page", "start"), [(120, 0), (-1, 0), (1, 48)], ids=["beyond", "negative", "position"])
@torch.inference_mode()
def test_what_is_beyond_the_cache_is_not_touched(page: int, start: int) -> None:
    model = fused(transformer(ARCHITECTURES["grouped"]))
    table = torch.tensor([[0, page, 2]], dtype=torch.int32)
    with pytest.raises(AssertionError):
        model.hidden(torch.tensor([1]), ragged(filled(model, 120), table, [start], [1]))


@torch.inference_mode()
def test_threads_change_nothing() -> None:
    model = fused(transformer(ARCHITECTURES["grouped"]))
    tokens = random_tokens(sum(COUNTS), vocab_size=64)
    threads, states = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            states.append(model.hidden(tokens, ragged(filled(model, TABLE.numel()), TABLE, STARTS, COUNTS)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_a_number_stays_none(dtype: torch.dtype, value: float) -> None:
    """Halves that are infinite or NaN once became large numbers, and a damaged model talked on."""
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    weight[3, 5] = value
    x = torch.ones(2, COLUMNS)
    y = kernels.multiply(kernels.float_weight(weight), x)
    assert torch.equal(y[:, 3].isfinite(), torch.zeros(2, dtype=torch.bool))
    assert y[:, 4:].isfinite().all()
    gates = weight.clone()
    assert not kernels.silu_and_mul(gates, torch.ones_like(weight))[3, 5].abs().isfinite() or value < 0
    blocks = random_blocks(BLOCK_TYPES["Q8_0"])
    blocks[3, :2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    assert not PackedWeight(blocks, BLOCK_TYPES["Q8_0"])(x)[:, 3].isfinite().any()


@torch.inference_mode()
def test_a_model_whose_weights_move_is_run_where_they_are() -> None:
    """Kernels once read where the weights had been."""
    model = fused(transformer(ARCHITECTURES["grouped"]))
    tokens, start = random_tokens(1, 5, vocab_size=64), torch.zeros(1, dtype=torch.long)
    expected = model(tokens, start, model.new_cache(1, 8))
    model.double().float()
    assert model.backend is None
    close(model(tokens, start, model.new_cache(1, 8)), expected)
    CpuBackend(model.device).bind(model)
    model.load_state_dict({name: torch.zeros_like(weight) for name, weight in model.state_dict().items()})
    assert not model(tokens, start, model.new_cache(1, 8)).any()
