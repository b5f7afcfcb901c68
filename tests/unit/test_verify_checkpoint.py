"""Everything that is wrong with a checkpoint is found and named, and nothing is found in one that is right."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama.checkpoint.export.huggingface import HuggingFaceWriter
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.verify.checksums import Finding, write_list
from llama.checkpoint.verify.verify import bytes_to_read, checked_files, verify
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.checkpoints import write_meta


def problems(path: Path, deep: bool = False) -> list[str]:
    return [f"{finding.file}: {finding.problem}" for finding in findings(path, deep) if finding.problem is not None]


def findings(path: Path, deep: bool = False) -> list[Finding]:
    return list(verify(path, deep, lambda n_bytes: None))


def make(target: Path, format: str, **options: str) -> Path:
    checkpoint = RandomCheckpoint("tiny", PRESETS["tiny"], 1)
    made = writer(checkpoint, tokenizer_source(checkpoint), format, **options)  # type: ignore[arg-type]
    if isinstance(made, HuggingFaceWriter):
        made.max_file_bytes = 200_000
    write_checkpoint(made, target, lambda n_bytes: None)
    return target


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    write_meta(tmp_path / "meta", shards=4)
    return tmp_path / "meta"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make(tmp_path / "hf", "hf")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return make(tmp_path / "a.gguf", "gguf", dtype="q8_0")


def test_nothing_is_wrong_with_good_checkpoints(meta: Path, hf: Path, gguf: Path) -> None:
    for path in (meta, hf, gguf):
        read: list[int] = []
        found = list(verify(path, True, read.append))
        assert [finding.problem for finding in found] == [None] * len(found) and len(found) > 4
        total = bytes_to_read(path, True)
        assert 0.99 * total <= sum(read) <= total


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_all_damaged_files_are_named_at_once(meta: Path) -> None:
    truncate(meta / "consolidated.00.pth", 0)
    (meta / "consolidated.01.pth").write_text("<!DOCTYPE html><title>Log in</title>")
    (meta / "consolidated.02.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    truncate(meta / "consolidated.03.pth", 1000)
    (meta / "params.json").write_text("{")
    found = problems(meta, deep=True)
    words = ["empty", "web page", "git-lfs pointer", "truncated", "not valid JSON"]
    assert len(found) == len(words)
    for word, problem in zip(words, found, strict=True):
        assert word in problem


def test_gaps_between_shards_are_named(meta: Path) -> None:
    (meta / "consolidated.01.pth").unlink()
    (meta / "consolidated.02.pth").unlink()
    (meta / "params.json").unlink()
    assert problems(meta) == [
        f"{name}: missing" for name in ("consolidated.01.pth", "consolidated.02.pth", "params.json")
    ]


def test_every_tensor_that_does_not_fit_is_named(meta: Path) -> None:
    for number in range(4):
        file = meta / f"consolidated.{number:02d}.pth"
        shard = torch.load(file)
        shard["layers.0.feed_forward.w1.weight"] = torch.ones(7, 64)
        shard["odd.weight"] = shard.pop("layers.1.attention.wo.weight")
        torch.save(shard, file)
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps(params | {"vocab_size": 511}))
    found = "\n".join(problems(meta))
    for words in (
        "layers.0.feed_forward.w1.weight has shape (28, 64), it asks for (176, 64)",
        "layers.1.attention.wo.weight is missing",
        "odd.weight is not described",
        "output.weight has shape (512, 64), it asks for (511, 64)",
        "the tokenizer has 512 tokens, but the weights in",
    ):
        assert words in found


def test_findings_are_under_the_files_own_names(hf: Path) -> None:
    """Files of a folder began with "/", binary tokenizers were "text", and tensors had Meta's names."""
    config = json.loads((hf / "config.json").read_text())
    names = {finding.file: finding.what for finding in findings(hf)}
    assert (names["tokenizer.model"], names["config.json"]) == ("tokenizer", "JSON")
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    assert "hf: model.layers.2.self_attn.q_proj.weight is missing" in problems(hf)
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    (found,) = problems(hf)
    assert found.startswith("hf: config.json: num_hidden_layers must be an integer from 1")


def test_shards_of_two_models_are_named(meta: Path, tmp_path: Path) -> None:
    shard = torch.load(meta / "consolidated.02.pth")
    shard["norm.weight"] = torch.ones(32)
    del shard["output.weight"]
    torch.save(shard, meta / "consolidated.02.pth")
    found = problems(meta)
    assert "consolidated.02.pth: lacks output.weight" in found
    assert "consolidated.02.pth: has norm.weight of shape (32,), shard 00 of (64,)" in found


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: struct.pack("<Q", 1 << 40) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
    ],
    ids=["cut", "longer", "header length", "header"],
)
def test_safetensors_of_wrong_lengths_are_named(hf: Path, damage: Callable[[bytes], bytes]) -> None:
    file = sorted(hf.glob("*.safetensors"))[0]
    file.write_bytes(damage(file.read_bytes()))
    (found,) = problems(hf)
    assert found.startswith(f"{file.name}: is not a usable safetensors file")


def test_an_index_that_names_other_files_than_hold_its_tensors_is_named(hf: Path) -> None:
    """The readers go by the files; transformers goes by the index."""
    first, second, *_ = sorted(hf.glob("*.safetensors"))
    tensors = load_file(second)
    moved = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != moved}, second)
    save_file(load_file(first) | {moved: tensors[moved]}, first)
    found = problems(hf)
    name = "model.safetensors.index.json"
    assert found == [f"{name}: {moved} in {first.name} is not in the index", f"{name}: {moved} is not in {second.name}"]
    second.unlink()
    assert f"{second.name}: missing" in problems(hf)


def test_damaged_gguf_files_are_named(gguf: Path) -> None:
    data = gguf.read_bytes()
    truncate(gguf, len(data) - 100)
    (found,) = problems(gguf, deep=True)
    assert "truncated" in found
    gguf.write_bytes(data[:500])
    (found,) = problems(gguf)
    assert "truncated" in found


def test_values_that_are_no_numbers_are_counted(meta: Path) -> None:
    shard = torch.load(meta / "consolidated.03.pth")
    shard["output.weight"][3, 4:7] = torch.nan
    shard["output.weight"][5, 5] = -torch.inf
    shard["layers.0.attention.wo.weight"].zero_()
    torch.save(shard, meta / "consolidated.03.pth")
    assert problems(meta) == []
    assert sorted(problems(meta, deep=True)) == [
        "consolidated.03.pth: layers.0.attention.wo.weight has only zeros",
        "consolidated.03.pth: output.weight has 3 NaN and 1 infinite of 8192 values",
    ]


def test_metas_checklist_is_checked_with_real_digests(meta: Path) -> None:
    """Meta's own script compares nothing where md5sum does not exist."""
    digests = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in meta.iterdir()}
    digests["consolidated.02.pth"] = "0" * 32
    lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
    (meta / "checklist.chk").write_text("".join(lines) + "f" * 32 + "  consolidated.04.pth\n" + "0  ../x\n")
    found = sorted(problems(meta))
    assert len(found) == 3
    assert found[0].startswith("checklist.chk: the line '0  ../x'")
    assert found[1].startswith("consolidated.02.pth: it is ")
    assert found[2] == "consolidated.04.pth: missing"


def test_a_written_list_finds_every_change(hf: Path, gguf: Path) -> None:
    for path in (hf, gguf):
        target = write_list(path, checked_files(path), lambda n_bytes: None)
        expected = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in checked_files(path)]
        assert target.read_text().splitlines() == expected
        assert problems(path) == []
    file = hf / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    assert [found.partition(":")[0] for found in problems(hf)] == [file.name]
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    gguf.write_bytes(data)
    assert [found.partition(":")[0] for found in problems(gguf)] == [gguf.name]


def test_a_list_that_cannot_be_written_leaves_nothing(meta: Path) -> None:
    """A full disk left checksums.sha256.partial-PID."""
    (meta / "checksums.sha256").mkdir()
    before = sorted(meta.iterdir())
    with pytest.raises(OSError):
        write_list(meta, [meta / "params.json"], lambda n_bytes: None)
    assert sorted(meta.iterdir()) == before


def test_a_path_that_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        findings(tmp_path / "none")
    (found,) = problems(tmp_path)
    assert "no checkpoint" in found
