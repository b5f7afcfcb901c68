"""Loading puts every weight where it belongs, and copies none that lies on the disk as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.load import WeightFormat
from llama.distributed.groups import ModelParallel
from llama.model import Transformer
from tests.checkpoints import TINY, write_meta
from tests.models import build, one_pass, random_tokens, transformer


def mappings(path: Path) -> Iterator[range]:
    """Addresses at which this process has a file mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if fields[-1] == str(path):
            start, _, stop = fields[0].partition("-")
            yield range(int(start, 16), int(stop, 16))


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    return any(tensor.data_ptr() in span for span in mappings(path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_shard_on_one_rank_is_used_where_it_lies(tmp_path: Path, stored: torch.dtype) -> None:
    """Loading once took twice the memory of the weights."""
    write_meta(tmp_path, dtype=stored)
    model = build(tmp_path, dtype=stored).model
    for name, parameter in model.named_parameters():
        assert is_mapped(parameter, tmp_path / "consolidated.00.pth"), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_another_dtype_is_a_copy(tmp_path: Path) -> None:
    """The check above can fail."""
    write_meta(tmp_path, dtype=torch.bfloat16)
    model = build(tmp_path, dtype="float32").model
    assert not any(is_mapped(parameter, tmp_path / "consolidated.00.pth") for parameter in model.parameters())


@pytest.mark.parametrize("shards", [1, 8])
def test_every_weight_is_where_its_name_says(tmp_path: Path, shards: int) -> None:
    state = write_meta(tmp_path, shards=shards)
    loaded = dict(build(tmp_path).model.named_parameters())
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name
        assert not loaded[name].requires_grad


@torch.inference_mode()
def test_the_loaded_model_computes_what_its_tensors_do(tmp_path: Path) -> None:
    """Rotary frequencies are no weights: on the meta device they once stayed there."""
    state = write_meta(tmp_path, shards=4, embedding_dim=1)
    tokens = random_tokens(3, 7, vocab_size=TINY.vocab_size)
    expected = one_pass(transformer(TINY, state), tokens)
    # The kernels add in an order of their own.
    torch.testing.assert_close(one_pass(build(tmp_path).model, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_weights_have_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    write_meta(tmp_path, dtype=torch.bfloat16)
    model = build(tmp_path, dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.rope.frequencies.dtype == torch.float32


def test_the_file_on_disk_is_never_written_to(tmp_path: Path) -> None:
    write_meta(tmp_path)
    before = (tmp_path / "consolidated.00.pth").read_bytes()
    model = build(tmp_path).model
    for parameter in model.parameters():
        parameter.zero_()
    assert (tmp_path / "consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("size", [1, 2, 16])
def test_a_ranks_columns_lie_in_one_piece(tmp_path: Path, size: int) -> None:
    """A slice of columns, used where it lies, is read with gaps at every token."""
    write_meta(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args, ModelParallel(size - 1, size))
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 16])
def test_a_rank_holds_no_more_than_its_part(tmp_path: Path, size: int) -> None:
    """A slice of the whole tensor once kept the whole tensor alive."""
    state = write_meta(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args, ModelParallel(size - 1, size))
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.bfloat16))
    whole = sum(tensor.numel() for name, tensor in state.items() if "norm" not in name)
    norms = sum(tensor.numel() for name, tensor in state.items() if "norm" in name)
    kv = sum(tensor.numel() for name, tensor in state.items() if ".wk." in name or ".wv." in name)
    replicated = kv // TINY.n_kv_heads if size > TINY.n_kv_heads else kv // size
    held = sum(parameter.untyped_storage().nbytes() // 2 for parameter in model.parameters())
    assert held == (whole - kv) // size + replicated + norms
