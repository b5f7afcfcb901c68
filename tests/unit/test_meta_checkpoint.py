"""Meta's folders are opened whole or not at all, and what is wrong with them is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.meta import MetaCheckpoint
from tests.checkpoints import TINY, random_state, split_state, write_meta
from tests.models import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_meta(tmp_path, shards=2)
    return tmp_path


def edit(folder: Path, shard: int, **changes: torch.Tensor | None) -> None:
    """Replace or, with None, remove tensors of a shard; names have __ for dots."""
    path = folder / f"consolidated.{shard:02d}.pth"
    state = torch.load(path)
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    torch.save(state, path)


def rejected(folder: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        build(folder)
    assert str(folder) in str(caught.value)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    """A bias that nobody adds is a wrong model that still talks."""
    for shard in (0, 1):
        edit(folder, shard, layers__0__attention__wq__bias=torch.zeros(32))
    rejected(folder, r"has unexpected tensors layers\.0\.attention\.wq\.bias")


def test_derived_tensors_are_not_unexpected(folder: Path) -> None:
    """Llama 1 and 2 store rope.freqs."""
    for shard in (0, 1):
        edit(folder, shard, rope__freqs=torch.zeros(2))
    build(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm__weight", (65,)),
        ("norm__weight", ()),
        ("norm__weight", (64, 1)),
        ("tok_embeddings__weight", (64,)),
        ("tok_embeddings__weight", (256, 65)),
        ("output__weight", (255, 64)),
        ("layers__0__attention__wk__weight", (16, 64)),
        ("layers__0__attention__wk__weight", (0, 64)),
        ("layers__0__attention__wv__weight", (8, 64, 1)),
        ("layers__1__feed_forward__w2__weight", (88, 64)),
    ],
)
def test_a_misshapen_tensor_is_named(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    for shard in (0, 1):
        edit(folder, shard, **{name: torch.ones(shape)})
    rejected(folder, name.replace("__", r"\.") + " has shape .* configuration asks for")


def test_weights_of_another_size_than_params_json_are_told(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"n_kv_heads": 8}))
    rejected(folder, r"wk\.weight has shape .* do not belong together")


def test_shards_of_two_models_are_told(folder: Path) -> None:
    """With equal shapes but other names, then with equal names but other shapes."""
    edit(folder, 1, layers__1__ffn_norm__weight=None)
    rejected(folder, r"shards 00 and 01 do not belong together: the latter lacks layers\.1\.ffn_norm\.weight")
    edit(folder, 1, layers__1__ffn_norm__weight=torch.ones(32))
    rejected(folder, r"together: the latter has layers\.1\.ffn_norm\.weight of shape \(32,\), shard 00 of \(64,\)")


def test_a_gap_in_the_shards_is_told(folder: Path) -> None:
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    rejected(folder, "without a gap, found 00, 02")
    (folder / "consolidated.00.pth").unlink()
    rejected(folder, "without a gap, found 02")


def test_a_missing_last_shard_is_told(folder: Path) -> None:
    """Nothing in the files numbers the shards, so only the shapes can tell."""
    (folder / "consolidated.01.pth").unlink()
    rejected(folder, r"has 1 shard, but its params\.json describes 2: consolidated\.01\.pth")


def test_no_params_json_is_told(folder: Path) -> None:
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no params\.json"):
        build(folder)


def test_a_folder_without_a_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"looked for consolidated\.\*\.pth .* found model\.bin"):
        build(tmp_path)


def test_an_absent_folder_says_what_is_beside_it(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent does not exist; .* has consolidated\.00\.pth, "):
        build(folder / "absent")
    with pytest.raises(FileNotFoundError, match="absent/twice does not exist; neither does"):
        build(folder / "absent" / "twice")


def test_a_single_shard_as_ckpt_dir_says_to_give_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="give its folder"):
        build(folder / "consolidated.00.pth")


def test_a_tokenizer_of_another_size_is_told(folder: Path, sentencepiece_model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    rejected(folder, "the tokenizer has 400 tokens, but the weights .* have 512")


def test_integer_weights_are_refused(folder: Path) -> None:
    for shard in (0, 1):
        edit(folder, shard, norm__weight=torch.ones(64, dtype=torch.int8))
    rejected(folder, r"norm\.weight has dtype torch\.int8")


def test_vocab_size_minus_one_is_taken_from_the_tokenizer(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    assert build(folder).model.args.vocab_size == 512


def test_without_an_output_tensor_the_embeddings_are_the_output(tmp_path: Path) -> None:
    """Llama 3.2 1B and 3B; their params.json does not say so."""
    state = random_state(TINY)
    del state["output.weight"]
    write_meta(tmp_path, state=state)
    model = build(tmp_path).model
    assert model.args.tied_embeddings
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stored_dtype_is_known_without_reading_weights(tmp_path: Path, stored: torch.dtype) -> None:
    write_meta(tmp_path, dtype=stored)
    assert MetaCheckpoint(tmp_path).dtype == stored


def test_the_file_format_before_torch_1_6_loads_as_well(tmp_path: Path) -> None:
    """Llama 1's leaked weights are in it; it cannot be mapped."""
    state = write_meta(tmp_path, shards=2)
    for i, part in enumerate(split_state(state, TINY, 2)):
        torch.save(part, tmp_path / f"consolidated.{i:02d}.pth", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert isinstance(build(tmp_path), Llama)


@pytest.mark.parametrize("dim", [0, 1])
def test_reads_are_slices_of_the_whole(folder: Path, dim: int) -> None:
    checkpoint = MetaCheckpoint(folder)
    state = random_state(TINY)
    for name, tensor in state.items():
        if tensor.dim() < 2:
            assert torch.equal(checkpoint.read(name), tensor)
            continue
        size = tensor.shape[dim]
        for start, stop in ((0, size), (0, 1), (size - 1, size), (size // 2 - 1, size // 2 + 1), (3, 3), (size, size)):
            expected = tensor.narrow(dim, start, stop - start)
            assert torch.equal(checkpoint.read(name, dim, start, stop), expected), (name, start, stop)
