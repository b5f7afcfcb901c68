"""Checkpoints written in every format: bit for bit what was read, and what other libraries read in them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama import Llama
from llama.checkpoint import Checkpoint, open_checkpoint
from llama.checkpoint.context import recognised
from llama.checkpoint.export.hf_config import hf_config
from llama.checkpoint.export.huggingface import HuggingFaceWriter
from llama.checkpoint.export.meta import meta_params
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.export.streaming_writers import ALIGNMENT, PickleFile, TensorEntry, new_path
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.hf_config import read_config
from llama.checkpoint.params_json import read_params
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.errors import error_line
from llama.rope_scaling import DynamicScaling, FactorScaling, LinearScaling, Llama3Scaling, YarnScaling
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import RandomCheckpoint
from tests.checkpoints import TINY, random_state, split_state, write_meta

SCALINGS = [
    LinearScaling(4.0),
    DynamicScaling(2.0, 512),
    Llama3Scaling(32.0, old_context_len=64),
    YarnScaling(8.0, 64, beta_fast=16.0, truncate=False, attention_factor=1.5),
]


def convert(source: Path | Checkpoint, target: Path, format: str, **options: Any) -> Path:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), format, **options), target, lambda n_bytes: None)
    return target


def shards(folder: Path) -> list[dict[str, Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pth"))]


def assert_same_shards(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for shard, other in zip(found, expected, strict=True):
        assert shard.keys() == other.keys()
        for name in shard:
            assert shard[name].dtype == other[name].dtype and torch.equal(shard[name], other[name]), name


def random_checkpoint(seed: int = 1, preset: str = "tiny", **changes: Any) -> RandomCheckpoint:
    return RandomCheckpoint(
        preset, PRESETS[preset]._replace(args=dataclasses.replace(PRESETS[preset].args, **changes)), seed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_to_hugging_face_and_back_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    write_meta(tmp_path / "meta", shards=8, dtype=dtype)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "meta", shards=8)
    assert_same_shards(shards(tmp_path / "back"), shards(tmp_path / "meta"))
    assert read_params(tmp_path / "back" / "params.json") == read_params(tmp_path / "meta" / "params.json")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (tmp_path / "meta" / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"head_dim": 16}], ids=str)
def test_hugging_face_to_meta_and_back_is_bit_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Meta's releases of tied models hold the table twice: the tie must be found again."""
    convert(random_checkpoint(**changes), tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", shards=4)
    convert(tmp_path / "meta", tmp_path / "back", "hf", context_len=2048)  # which Meta's format does not tell
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_shards_are_cut_as_meta_cuts_them(tmp_path: Path, count: int) -> None:
    """With more shards than KV heads, neighbours repeat a head."""
    write_meta(tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "many", "meta", shards=count)
    expected = split_state(random_state(TINY), TINY, count)
    assert_same_shards(shards(tmp_path / "many"), expected)


def test_llama_2s_embeddings_are_split_by_feature(tmp_path: Path) -> None:
    """As Meta's code for SentencePiece models expects them; Llama 3's splits them by token."""
    whole, halves = random_checkpoint(), shards(convert(random_checkpoint(), tmp_path / "meta", "meta", shards=2))
    table = whole.read("tok_embeddings.weight")
    assert_same_shards(
        [{"t": half["tok_embeddings.weight"]} for half in halves], [{"t": part} for part in table.chunk(2, 1)]
    )


def test_shards_are_whole_zip_files_with_aligned_storages(tmp_path: Path) -> None:
    entries = {"a.weight": TensorEntry((3, 5), torch.bfloat16), "b.weight": TensorEntry((7,), torch.float32)}
    tensors = [torch.randn(3, 5).bfloat16(), torch.randn(7)]
    file = PickleFile(tmp_path / "a.pth", entries)
    for tensor in tensors:
        file.add(tensor)
    file.close()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None  # checksums are right
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        assert_same_shards([loaded], [dict(zip(entries, tensors, strict=True))])
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in loaded.values())


def logits(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Ours and transformers' for one row, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = Llama.build(folder, max_seq_len=512, max_batch_size=1, dtype="float32", device="cpu")
    ours = llm.generate([tokens.tolist()], 0, logprobs=True, echo=True)[1]
    assert ours is not None
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0].log_softmax(-1)
    return torch.tensor(ours[0][1:]), theirs[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"sliding_window": 16},
        {"activation": "relu2"},
        {"activation": "relu2", "layer_norms": True, "rotary_dim": 4},
        *({"rope_scaling": scaling} for scaling in SCALINGS),
    ],
    ids=str,
)
def test_transformers_gives_the_same_log_probabilities(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = convert(random_checkpoint(**changes), tmp_path / "hf", "hf", dtype="float32", context_len=512)
    tokens = torch.randint(3, 512, (200,), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits(folder, tokens)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("scaling", [None, *SCALINGS, Llama3Scaling()], ids=str)
def test_the_architecture_survives_config_json(tmp_path: Path, scaling: Any) -> None:
    checkpoint = random_checkpoint(rope_scaling=scaling, norm_eps=1e-6, attention_bias=True, tied_embeddings=True)
    source = tokenizer_source(checkpoint)
    plan = ExportPlan(checkpoint, lambda: checkpoint, checkpoint.args, source, torch.float16, 512)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(plan)[0]))
    config = read_config(tmp_path / "config.json")
    found, stops = config.args, config.stop_tokens
    for field in dataclasses.fields(ModelArgs):
        if field.name not in ("multiple_of", "ffn_dim_multiplier", "use_scaled_rope"):
            assert getattr(found, field.name) == getattr(checkpoint.args, field.name), field.name
    assert stops == source.tokenizer.stop_tokens


@pytest.mark.parametrize(
    ("preset", "model_type"),
    [("qwen3-8b", "qwen3"), ("olmo2-7b", "olmo2"), ("smollm3-3b", "smollm3"), ("arcee-4.5b", "arcee")],
)
def test_a_preset_is_written_as_what_it_was_released_as(preset: str, model_type: str) -> None:
    args = dataclasses.replace(PRESETS[preset].args, vocab_size=512)
    checkpoint = RandomCheckpoint(preset, PRESETS[preset]._replace(args=args, tokenizer="sentencepiece"), 1)
    plan = ExportPlan(checkpoint, lambda: checkpoint, args, tokenizer_source(checkpoint), torch.bfloat16, 4096)
    assert hf_config(plan)[0]["model_type"] == model_type


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.args.is_plain])
def test_the_architecture_of_every_preset_survives_params_json(tmp_path: Path, name: str) -> None:
    args = PRESETS[name].args
    (tmp_path / "params.json").write_text(json.dumps(meta_params(args)))
    found = read_params(tmp_path / "params.json")
    for field in (
        "dim",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "hidden_dim",
        "norm_eps",
        "rope_theta",
        "vocab_size",
        "sliding_window",
    ):
        assert getattr(found, field) == getattr(args, field), field
    assert found.rope_scaling == args.rope_scaling


def test_the_context_length_goes_through_every_format_that_tells_it(tmp_path: Path) -> None:
    """Models of this kind were trained for 4096 tokens: that stood in for what a file said."""
    convert(random_checkpoint(), tmp_path / "a.gguf", "gguf")
    convert(tmp_path / "a.gguf", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    convert(tmp_path / "again", tmp_path / "meta", "meta")
    lengths = [open_checkpoint(tmp_path / name).context_len for name in ("a.gguf", "hf", "again", "meta")]
    assert lengths == [2048, 2048, 2048, None]


def test_biases_survive_gguf(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(attention_bias=True, mlp_bias=True)
    found = open_checkpoint(convert(checkpoint, tmp_path / "a.gguf", "gguf", dtype="float32"))
    assert found.args.attention_bias and found.args.mlp_bias
    for name in global_shapes(checkpoint.args):
        torch.testing.assert_close(found.read(name), checkpoint.read(name).float(), rtol=0, atol=0)


def test_large_weights_are_split_over_files_with_an_index(tmp_path: Path) -> None:
    made = writer(random_checkpoint(), tokenizer_source(random_checkpoint()), "hf", dtype="float32")
    assert isinstance(made, HuggingFaceWriter)
    write_checkpoint(HuggingFaceWriter(made.plan, max_file_bytes=100_000), tmp_path / "many", lambda n_bytes: None)
    convert(random_checkpoint(), tmp_path / "one", "hf", dtype="float32")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert_same_shards([many], [one])
    assert open_checkpoint(tmp_path / "many").names() == open_checkpoint(tmp_path / "one").names()


@pytest.mark.parametrize(
    ("format", "options", "changes", "words"),
    [
        ("meta", {"shards": 3}, {}, "use one of 1, 2, 4, 8"),
        ("meta", {"shards": 0}, {}, "use one of"),
        ("meta", {}, {"attention_bias": True}, "attention_bias"),
        ("meta", {}, {"rope_scaling": LinearScaling(2.0)}, "RoPE scaling"),
        ("hf", {"shards": 2}, {}, "--shards 2"),
        ("hf", {"dtype": "q8_0"}, {}, "q8_0"),
        ("hf", {}, {"sliding_window": 8, "score_factor": 2.0}, "sliding_window 8 and score_factor 2.0"),
        ("gguf", {}, {"rope_scaling": DynamicScaling(2.0, 512)}, "DynamicScaling"),
        ("onnx", {}, {}, "meta, hf, gguf"),
    ],
)
def test_what_a_format_cannot_express_is_an_error_before_anything_is_written(
    tmp_path: Path, format: str, options: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(random_checkpoint(**changes), tmp_path / "out", format, **options)
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_cannot_hold_are_an_error(tmp_path: Path) -> None:
    """They would become infinite."""
    state = write_meta(tmp_path / "meta")
    state["layers.1.feed_forward.w2.weight"][3, 4] = -70000.0
    torch.save(state, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w2\.weight, whose largest value is 70000"):
        convert(tmp_path / "meta", tmp_path / "hf", "hf", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_converting_holds_a_few_tensors_in_memory(tmp_path: Path) -> None:
    """torch.save wants a whole shard there."""
    large = random_checkpoint(dim=512, head_dim=64, n_layers=20, hidden_dim=1536)

    def held(n_bytes: int = 0) -> None:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        readings.append(int(fields["RssAnon"].split()[0]) * 1024)

    for source, target, format in ((large, "m", "meta"), ("m", "hf", "hf"), ("hf", "back", "meta")):
        checkpoint = open_checkpoint(tmp_path / source) if isinstance(source, str) else source
        made = writer(checkpoint, tokenizer_source(checkpoint), format, shards=2 if format == "meta" else 1)
        readings: list[int] = []
        held()
        write_checkpoint(made, tmp_path / target, held)
        assert made.nbytes > 100e6 and max(readings) - readings[0] < 30e6


def test_a_path_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="full exists already"):
        convert(random_checkpoint(), tmp_path / "full", "hf")
    convert(random_checkpoint(), tmp_path / "empty", "hf")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    with pytest.raises(KeyboardInterrupt), new_path(tmp_path / "new") as partial:
        partial.mkdir()
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_what_cannot_be_written_is_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion of hours ended in a full disk, and one below a file in `File exists`."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"file/new cannot be made, as .*file is no folder: name another"):
        convert(random_checkpoint(), tmp_path / "file" / "new", "hf")
    with (
        pytest.raises(OSError, match=r"new takes 1000000000000\.0 MB, and its disk has .* MB free: make room, or name"),
        new_path(tmp_path / "new", 10**18),
    ):
        pytest.fail("the disk has no such room")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to a folder of any mode
    with pytest.raises(PermissionError, match=r"new cannot be made, as .* cannot be written to: name another folder"):
        convert(random_checkpoint(), tmp_path / "new", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    """Of GGUF files the message was `8192 requested and 7840 written`."""
    with pytest.raises(OSError) as raised, new_path(tmp_path / "new.gguf") as partial:
        partial.symlink_to("/dev/full")
        np.zeros(100_000).tofile(partial)
    assert "No space left on device" in error_line(raised.value) and "make room on the disk" in error_line(raised.value)
    assert "new.gguf" in error_line(raised.value) and not list(tmp_path.iterdir())


def test_a_seed_gives_the_same_weights_in_every_format(tmp_path: Path) -> None:
    convert(random_checkpoint(7), tmp_path / "meta", "meta", shards=8)
    convert(random_checkpoint(7), tmp_path / "hf", "hf")
    convert(random_checkpoint(7), tmp_path / "a.gguf", "gguf", dtype="bfloat16")
    opened = [open_checkpoint(tmp_path / name) for name in ("meta", "hf", "a.gguf")]
    for name in opened[0].names():
        first, *others = (checkpoint.read(name) for checkpoint in opened)
        assert first.std() > 0.01
        assert all(torch.equal(first, other.bfloat16()) for other in others), name
    other = random_checkpoint(8).read("output.weight").bfloat16()
    assert (other == opened[0].read("output.weight")).float().mean() < 0.01


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_gguf_files_are_what_the_gguf_library_reads(tmp_path: Path, dtype: str) -> None:
    path = convert(random_checkpoint(), tmp_path / "a.gguf", "gguf", dtype=dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = tensors["blk.1.ffn_down.weight"]
    expected = random_checkpoint().read("layers.1.feed_forward.w2.weight")
    values = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    step = {"float32": 0.0, "float16": 2**-11, "q8_0": 2**-7, "q5_1": 2**-4, "q5_0": 2**-4}.get(dtype, 2**-3)
    assert (values - expected).abs().max() <= step * expected.abs().max()
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert open_checkpoint(path).tokenizer().n_words == 512


def test_weights_are_written_in_types_that_the_gguf_library_only_decodes(tmp_path: Path) -> None:
    args: dict[str, Any] = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 512, "n_layers": 1}
    path = convert(random_checkpoint(**args), tmp_path / "a.gguf", "gguf", dtype="q4_k", is_pure=True)
    (found,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_down.weight")
    assert found.tensor_type == gguf.GGMLQuantizationType.Q4_K
    expected = random_checkpoint(**args).read("layers.0.feed_forward.w2.weight")
    values = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    assert (values - expected).square().mean().sqrt() <= 0.08 * expected.float().std()


@pytest.mark.parametrize("scaling", [None, LinearScaling(4.0), Llama3Scaling(8.0), YarnScaling(8.0, 64)], ids=str)
def test_rope_scaling_survives_gguf(tmp_path: Path, scaling: Any) -> None:
    path = convert(random_checkpoint(rope_scaling=scaling, rope_theta=500000.0), tmp_path / "a.gguf", "gguf")
    args = open_checkpoint(path).args
    assert isinstance(args.rope_scaling, FactorScaling) == isinstance(scaling, Llama3Scaling)
    assert recognised(args) == scaling


# From the published sizes of the releases.
PARAMETERS = {
    "llama-2-7b": 6738415616,
    "llama-2-13b": 13015864320,
    "llama-2-70b": 68976648192,
    "llama-3-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-3.2-3b": 3212749824,
    "codellama-7b": 6738546688,
    "mistral-7b": 7241732096,
    "tinyllama-1.1b": 1100048384,
    "smollm2-135m": 134515008,
    "qwen3-0.6b": 596049920,
    "qwen3-8b": 8190735360,
    "olmo2-7b": 7298617344,
    "smollm3-3b": 3075098624,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_released_models_sizes(name: str) -> None:
    shapes = global_shapes(PRESETS[name].args).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == PARAMETERS[name]


@pytest.mark.slow
def test_random_models_run_in_float16(tmp_path: Path) -> None:
    """Activations that overflow, or logits that are all alike, would try out nothing."""
    deep = random_checkpoint(n_layers=32)
    llm = Llama.build(convert(deep, tmp_path / "hf", "hf", dtype="float16"), dtype="float16", device="cpu")
    logprobs = llm.generate([list(range(3, 30))], 4, temperature=0, logprobs=True, echo=True)[1]
    assert logprobs is not None and all(-20 < value < 0 for value in logprobs[0][1:])
    assert len(set(logprobs[0])) > 20
    assert not any((deep.read(name) == 0).any() for name in deep.names())


def test_rows_that_pad_an_embedding_are_left_out_of_metas_format(tmp_path: Path) -> None:
    """Hugging Face folders may have more rows than tokens; Meta's have as many."""
    convert(random_checkpoint(), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    state = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(64, 64, dtype=torch.bfloat16)])
    (tmp_path / "padded").mkdir()
    for file in (tmp_path / "hf").iterdir():
        shutil.copy(file, tmp_path / "padded")
    save_file(state, tmp_path / "padded" / "model.safetensors")
    (tmp_path / "padded" / "config.json").write_text(json.dumps(config | {"vocab_size": 576}))
    convert(tmp_path / "hf", tmp_path / "meta", "meta", shards=2)
    convert(tmp_path / "padded", tmp_path / "cut", "meta", shards=2)
    assert_same_shards(shards(tmp_path / "cut"), shards(tmp_path / "meta"))
    convert(tmp_path / "padded", tmp_path / "again", "hf")
    assert open_checkpoint(tmp_path / "again").args.vocab_size == 576
