"""Loading puts every weight where it belongs, and copies none that lies on the disk as it is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from llama.backends.base import choose_backend
from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.load import WeightFormat
from llama.checkpoint.mapped_file import MappedMemory
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.model import Transformer
from tests.checkpoints import BYTE_VOCAB_SIZE, TINY, write_meta
from tests.gguf_files import write_gguf_model
from tests.models import build, one_pass, random_tokens, transformer

MODEL = ModelArgs(dim=512, n_layers=4, n_heads=8, n_kv_heads=8, vocab_size=BYTE_VOCAB_SIZE)


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


def pages_in_memory(folder: Path) -> int:
    """Bytes of a folder's files that count as this process's memory."""
    found = re.findall(
        r"^[0-9a-f].* (/.*)\n(?:\w+:.*\n)*?Rss: +(\d+)", Path("/proc/self/smaps").read_text(), re.MULTILINE
    )
    return sum(int(kilobytes) * 1024 for file, kilobytes in found if file.startswith(f"{folder}/"))


def write_as(file_format: str, folder: Path) -> Path:
    """MODEL, in bfloat16 or Q8_0, with its tokenizer; returns the path that it is opened by."""
    state = write_meta(folder / "meta", MODEL, dtype=torch.bfloat16)
    if file_format == "meta":
        return folder / "meta"
    if file_format == "gguf":
        write_gguf_model(folder / "m.gguf", MODEL, state, gguf.GGMLQuantizationType.Q8_0)
        return folder / "m.gguf"
    checkpoint = open_checkpoint(folder / "meta")
    quantize = "int8" if file_format == "hf, quantized" else None
    made = writer(checkpoint, tokenizer_source(checkpoint), "hf", quantize=quantize)
    write_checkpoint(made, folder / "hf", lambda n_bytes: None)
    return folder / "hf"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc here")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("file_format", ["meta", "hf", "hf, quantized", "gguf"])
def test_what_was_copied_of_a_file_leaves_the_memory(tmp_path: Path, file_format: str, size: int) -> None:
    """A file and its packed copy were once both in memory, which took twice that of llama.cpp.

    Who reads the checkpoint a second time, or still has a view of it, gets what was there at first.
    """
    path = write_as(file_format, tmp_path)
    backend = choose_backend(torch.device("cpu"), MODEL)
    held = WeightFormat(torch.float32, None, backend.weight_cls, backend.keeps_stored_blocks)
    checkpoint = open_checkpoint(path)
    views = {name: checkpoint.read(name) for name in checkpoint.names()}
    before = {name: view.clone() for name, view in views.items()}
    n_bytes = pages_in_memory(tmp_path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args, ModelParallel(size - 1, size))
    load_weights(model, checkpoint, torch.device("cpu"), held)
    assert pages_in_memory(tmp_path) < 0.1 * n_bytes
    for name, tensor in before.items():
        assert torch.equal(views[name], tensor) and torch.equal(checkpoint.read(name), tensor), name
    assert n_bytes > 8 * 2**20


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc here")
def test_experts_that_lie_transposed_in_metas_shards_leave_the_memory_too(tmp_path: Path) -> None:
    """Only tensors whose rows lie one after another were released: of Llama 4 most of the file stayed."""
    stacked = torch.rand(4 * 512, 1024)
    torch.save({"layers.0.feed_forward.experts.moe_w_in_eD_F": stacked}, tmp_path / "consolidated.00.pth")
    params = {"dim": 512, "n_layers": 1, "n_heads": 4, "vocab_size": 512, "moe_args": {"num_experts": 4}}
    (tmp_path / "params.json").write_text(json.dumps(params))
    checkpoint = open_checkpoint(tmp_path)
    experts = [f"layers.0.feed_forward.experts.{number}.w1.weight" for number in range(4)]
    for name, matrix in zip(experts, stacked.split(512), strict=True):
        assert torch.equal(checkpoint.read(name), matrix.t())
    assert pages_in_memory(tmp_path) > 0.9 * stacked.nbytes
    for name in experts:
        checkpoint.release(name)
    assert pages_in_memory(tmp_path) < 0.1 * stacked.nbytes


def test_memory_that_is_no_files_is_never_released() -> None:
    """The system gives anonymous memory back as zeros."""
    values = torch.ones(1 << 20)
    MappedMemory().release(values)
    assert values.all()


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
    assert model.rope.kinds[0].frequencies.dtype == torch.float32


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
