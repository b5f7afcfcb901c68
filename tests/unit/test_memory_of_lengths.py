"""A process that completes prompts of ever new lengths takes no more memory for it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from llama.backends.cpu import ops as kernels
from llama.backends.cpu.build import library
from llama.backends.cpu.packed_weight import PackedWeight
from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES, quantize
from llama.quantization.weights import dense_linear
from tests.checkpoints import BYTE_VOCAB_SIZE, write_meta
from tests.models import BYTE_BOS, build

ARGS = ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=BYTE_VOCAB_SIZE, multiple_of=16)
MORE_MIB = 40  # oneDNN's products for one length alone take 2 to 3
needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


def private_mib() -> float:
    """What this process has written to, and shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_Dirty:"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_new_lengths_take_no_new_memory(tmp_path: Path) -> None:
    """Each new length of a prompt once left 2.8 MB of compiled products behind, in bfloat16: 450 MB after 160."""
    write_meta(tmp_path, ARGS)
    llm = build(tmp_path, dtype="bfloat16", max_seq_len=800)
    lengths = random.Random(0).sample(range(17, 760), 400)
    for count, length in enumerate(lengths):
        llm.generate([[BYTE_BOS] * length], 1, temperature=0)
        if count == 100:
            before = private_mib()
    assert private_mib() - before < MORE_MIB


@pytest.mark.parametrize("n_tokens", [1, 7, 31, 33, 511, 513, 1100])
def test_products_of_few_shapes_are_those_of_the_tokens(n_tokens: int) -> None:
    """Tokens are multiplied in parts, and with others that pad them."""
    x, weight = torch.randn(2, n_tokens, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    expected = torch.einsum("bni,oi->bno", x.double(), weight.double())
    y = dense_linear(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-3)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_products_with_blocks_keep_no_copy_of_all_tokens() -> None:
    """They kept it twice, as floats and rounded, for as long as the process lived: 194 MB of a model of 8B."""
    weight = PackedWeight(torch.zeros(16, 8192 // 32 * 34, dtype=torch.uint8), BLOCK_TYPES["Q8_0"])
    x = torch.ones(4096, 8192, dtype=torch.bfloat16)
    before = private_mib()
    kernels.multiply(weight.describe(), x)
    assert private_mib() - before < MORE_MIB


@needs_kernels
@pytest.mark.parametrize("n_tokens", [511, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_many_tokens_with_blocks_are_those_of_each(n_tokens: int, dtype: torch.dtype) -> None:
    """Tokens are multiplied in parts."""
    weight = PackedWeight(quantize(torch.randn(48, 64), BLOCK_TYPES["Q8_0"]), BLOCK_TYPES["Q8_0"])
    x, threads = torch.randn(n_tokens, 64).to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = kernels.multiply(weight.describe(), x)
    finally:
        torch.set_num_threads(threads)
    alone = [kernels.multiply(weight.describe(), x[i : i + 1]) for i in range(n_tokens)]
    assert torch.equal(torch.cat(alone), together)


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
def test_memory_of_packed_weights_is_given_back() -> None:
    """A chunk that many weights share goes with the last of them."""
    blocks = torch.zeros(1024, 4096 // 32 * 34, dtype=torch.uint8)
    before, one = private_mib(), blocks.nbytes / 2**20
    weights = [PackedWeight(blocks, BLOCK_TYPES["Q8_0"]) for _ in range(40)]
    assert private_mib() - before > 39 * one
    del weights
    assert private_mib() - before < 8 * one
