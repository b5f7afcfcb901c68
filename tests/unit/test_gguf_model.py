"""A GGUF file is the model that its tensors and metadata say, on any number of ranks, or it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.load import WeightFormat, read_part
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.model import Transformer
from llama.rope import scaled_frequencies
from llama.rope_scaling import FactorScaling, LinearScaling, Llama3Scaling, YarnScaling
from tests.architectures import ARCHITECTURES
from tests.checkpoints import random_state
from tests.gguf_files import metadata_of, write_gguf, write_gguf_model
from tests.models import one_pass, random_tokens, transformer

# Rows of whole blocks of 32.
ARGS = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=101, multiple_of=32, rope_theta=5e5)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q8_0"])
@torch.inference_mode()
def test_logits_are_those_of_the_decoded_tensors(tmp_path: Path, kind: str) -> None:
    stored = write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), GGMLQuantizationType[kind])
    checkpoint = open_checkpoint(tmp_path)  # the only GGUF file of a folder
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    tokens = random_tokens(3, 7, vocab_size=101)
    torch.testing.assert_close(one_pass(model, tokens), one_pass(transformer(ARGS, stored), tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, args in ARCHITECTURES.items() if args.rope_scaling is None])
def test_the_architecture_is_read_from_the_metadata(tmp_path: Path, name: str) -> None:
    args = ARCHITECTURES[name]
    write_gguf_model(tmp_path / "m.gguf", args, random_state(args))
    found = open_checkpoint(tmp_path / "m.gguf").args
    for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "rope_theta"):
        assert getattr(found, field) == getattr(args, field), field
    assert found.norm_eps == pytest.approx(args.norm_eps)
    assert found.tied_embeddings == args.tied_embeddings


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_every_rank_gets_its_slice(tmp_path: Path, size: int) -> None:
    """Column slices of blocks need not begin where a block does."""
    stored = write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), GGMLQuantizationType.Q4_1)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name in ("layers.1.feed_forward.w2.weight", "layers.0.attention.wo.weight", "output.weight"):
        dim = 0 if name == "output.weight" else 1
        parts = [read_part(checkpoint, name, ARGS, ModelParallel(rank, size)) for rank in range(size)]
        joined = torch.cat(parts, dim).narrow(dim, 0, stored[name].shape[dim])
        assert torch.equal(joined, stored[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general__architecture": "olmo"}, "architecture 'olmo' is not supported, as it has layer norms"),
        ({"general__architecture": "qwen2"}, r"qwen2\.embedding_length must be of type int, found nothing"),
        ({"general__architecture": "gemma"}, "architecture 'gemma'"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "longrope"}, "scaling.type 'longrope' is not supported, only linear and yarn"),
        ({"llama__rope__dimension_count": 8}, "dimension_count 8 differs from the 16 dimensions of a head"),
        ({"llama__embedding_length": None}, r"llama\.embedding_length must be of type int, found nothing"),
        ({"llama__block_count": 2.0}, r"llama\.block_count must be of type int, found 2\.0"),
        ({"llama__block_count": 1 << 20}, r"llama\.block_count must be an integer from 1"),
        ({"llama__attention__head_count_kv": 4}, r"not a multiple of llama\.attention\.head_count_kv 4"),
        ({"llama__attention__head_count_kv": [2, 2]}, r"head_count_kv must be an integer .* got \[2, 2\]"),
        ({"llama__rope__freq_base": "big"}, r"llama\.rope\.freq_base must be a positive number"),
        ({"llama__attention__key_length": -2.0}, r"llama\.attention\.key_length must be an integer"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), **changes)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


@pytest.mark.parametrize("tokens", [7, "words", [1.5]], ids=str)
def test_a_vocabulary_of_another_type_is_no_crash(tmp_path: Path, tokens: object) -> None:
    write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), tokenizer__ggml__tokens=tokens)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError):
        checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, LinearScaling(4.0)),
        ({"llama__rope__scale_linear": 2.0}, LinearScaling(2.0)),
        ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, None),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 8.0,
                "llama__rope__scaling__original_context_length": 4096,
            },
            YarnScaling(8.0, 4096),
        ),
    ],
    ids=str,
)
def test_rope_scaling_is_read_from_the_metadata(tmp_path: Path, metadata: dict[str, object], scaling: object) -> None:
    write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), **metadata)
    assert open_checkpoint(tmp_path / "m.gguf").args.rope_scaling == scaling


@torch.inference_mode()
def test_rope_factors_stretch_as_llama3_scaling_does(tmp_path: Path) -> None:
    """Llama 3.1 in GGUF stores them as a tensor; without them long texts go wrong and short ones do not."""
    scaled = dataclasses.replace(ARGS, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))
    factors = (
        scaled_frequencies(ARGS.head_dim, ARGS.rope_theta, None).double()
        / scaled_frequencies(ARGS.head_dim, ARGS.rope_theta, scaled.rope_scaling).double()
    )
    stored = write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS), rope_factors=factors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.args.rope_scaling == FactorScaling(tuple(factors.float().tolist()))
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    tokens = random_tokens(2, 200, vocab_size=101)
    expected = one_pass(transformer(scaled, stored), tokens)
    torch.testing.assert_close(one_pass(model, tokens), expected, rtol=0, atol=1e-4)
    assert (one_pass(transformer(ARGS, stored), tokens) - expected).abs().max() > 0.1


def test_several_gguf_files_in_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"several GGUF files: give one of a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_unneeded_tensors_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old converters stored frequencies for each layer, which llama.cpp skips."""
    write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS))
    whole = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    tensors = {each.name: (np.array(each.data), each.tensor_type) for each in whole}
    tensors["blk.0.attn_rot_embd.weight"] = np.ones(8, np.float32), GGMLQuantizationType.F32
    write_gguf(tmp_path / "m.gguf", metadata_of(ARGS), tensors)
    with caplog.at_level("INFO", "llama"):
        assert set(open_checkpoint(tmp_path).names()) == set(random_state(ARGS))
    assert "not used: blk.0.attn_rot_embd.weight" in caplog.text


def test_a_gguf_file_beside_a_config_json_is_the_model(tmp_path: Path) -> None:
    """Folders of GGUF files on the hub have one, and were taken for a Hugging Face folder without weights."""
    write_gguf_model(tmp_path / "m.gguf", ARGS, random_state(ARGS))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_checkpoint(tmp_path).path == tmp_path / "m.gguf"


def write_split(folder: Path, count: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model over several files, as llama.cpp's gguf-split leaves it; the first file's path and the tensors."""
    stored = write_gguf_model(folder / "whole.gguf", ARGS, random_state(ARGS))
    whole = gguf.GGUFReader(folder / "whole.gguf").tensors
    (folder / "whole.gguf").unlink()
    for i in range(count):
        said = {"general.architecture": "llama", "split.no": i, "split.count": count, "split.tensors.count": len(whole)}
        tensors = {each.name: (np.array(each.data), each.tensor_type) for each in whole[i::count]}
        path = folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"
        write_gguf(path, {**(metadata_of(ARGS) if i == 0 else {}), **said}, tensors)
    return folder / f"m-00001-of-{count:05d}.gguf", stored


@pytest.mark.parametrize("given", ["folder", "first", "last"])
@torch.inference_mode()
def test_a_split_file_is_one_model(tmp_path: Path, given: str) -> None:
    first, stored = write_split(tmp_path, 3)
    path = {"folder": tmp_path, "first": first, "last": tmp_path / "m-00003-of-00003.gguf"}[given]
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    tokens = random_tokens(3, 7, vocab_size=101)
    torch.testing.assert_close(one_pass(model, tokens), one_pass(transformer(ARGS, stored), tokens), rtol=0, atol=1e-5)


def test_a_missing_file_of_a_split_is_named(tmp_path: Path) -> None:
    first, _ = write_split(tmp_path, 3)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 3 files, but not beside it are m-00002-of-00003\.gguf"):
        open_checkpoint(first)


def test_renamed_files_of_a_split_are_told(tmp_path: Path) -> None:
    first, _ = write_split(tmp_path, 2)
    other = tmp_path / "m-00002-of-00002.gguf"
    other.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="says that it is file 0 of 2, counted from 0, but stands as 1 of 2"):
        open_checkpoint(first)
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match="but stands as 0 of 1: files of a split keep their names"):
        open_checkpoint(tmp_path / "alone.gguf")
