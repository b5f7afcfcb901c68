"""A folder that says two things is run as transformers runs it, and the log says what was decided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import COMPARED_AT_ONCE
from llama.checkpoint.load import check_weights
from tests.hugging_face import opened
from tests.models import one_pass, random_tokens
from tests.parity.test_families import VOCAB_SIZE, made, write_bins


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@torch.inference_mode()
def assert_as_transformers(folder: Path, seqlen: int = 48) -> torch.Tensor:
    tokens = random_tokens(2, seqlen, vocab_size=VOCAB_SIZE)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    torch.testing.assert_close(one_pass(opened(folder), tokens), expected, rtol=0, atol=1e-4)
    return expected


def test_a_whole_file_comes_before_the_index_of_earlier_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that was saved again as one file ran with the weights of its earlier shards."""
    theirs = made("llama 2")
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("model-*")}
    index = (tmp_path / "model.safetensors.index.json").read_bytes()
    theirs.model.norm.weight.data *= torch.linspace(0.5, 2.0, 96)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    with caplog.at_level("INFO", "llama"):
        whole = assert_as_transformers(tmp_path)
    assert "model.safetensors is read, and not model.safetensors.index.json" in caplog.text
    for name in shards:
        (tmp_path / name).unlink()
    torch.testing.assert_close(assert_as_transformers(tmp_path), whole)  # and asks for no shard


def test_safetensors_come_before_pickles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_bins(made("llama 1"), tmp_path, 3)
    made("llama 2").save_pretrained(tmp_path)
    with caplog.at_level("INFO", "llama"):
        assert_as_transformers(tmp_path)
    assert "model.safetensors is read, and not pytorch_model.bin.index.json" in caplog.text


def write_untied(folder: Path, file: str, head: torch.Tensor | None) -> None:
    """A folder that ties its embeddings, whose file has an output projection: `head`, or the table again."""
    theirs = made("smollm2")
    theirs.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if head is None else head
    if file == "model.safetensors":
        state["lm_head.weight"] = state["lm_head.weight"].clone()
        save_file(state, folder / file, {"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / file)


def test_an_output_projection_of_its_own_is_used_although_the_configuration_ties_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was dropped without a word, which gives another model's text."""
    head = torch.randn(VOCAB_SIZE, 96, generator=torch.Generator().manual_seed(3))
    write_untied(tmp_path, "model.safetensors", head)
    assert_as_transformers(tmp_path)
    assert "lm_head is used, despite tie_word_embeddings" in caplog.text
    assert not opened(tmp_path).args.tied_embeddings


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_repeated_table_stays_tied(tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    write_untied(tmp_path, file, None)
    assert_as_transformers(tmp_path)
    assert opened(tmp_path).args.tied_embeddings and not caplog.text


@pytest.mark.parametrize(
    ("head", "config", "most"),
    [
        ("other", {}, COMPARED_AT_ONCE),
        ("shared", {}, 0),
        ("same", {"num_hidden_layers": 3}, 0),
        ("longer", {}, 0),
        ("same", {}, None),
    ],
    ids=str,
)
def test_the_table_and_the_output_are_compared_no_further_than_needed(
    tmp_path: Path, head: str, config: dict[str, Any], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a folder read both whole, gigabytes of a large vocabulary, even if it was then refused for its shapes."""
    vocab_size = 3 * COMPARED_AT_ONCE // 96
    theirs = made("smollm2", vocab_size=vocab_size)
    theirs.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    table = state["model.embed_tokens.weight"]
    other = table.clone()
    other[5] += 1
    longer = torch.cat([table, table[:1]])
    state["lm_head.weight"] = {"other": other, "same": table.clone(), "longer": longer}.get(head, table)
    if head == "shared":
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    change(tmp_path, **config)
    compared: list[int] = []
    true = torch.equal

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        compared.append(a.numel())
        return true(a, b)

    monkeypatch.setattr(torch, "equal", equal)
    checkpoint = open_checkpoint(tmp_path)
    assert sum(compared) <= (table.numel() if most is None else most) and bool(compared) == (most != 0)
    assert checkpoint.args.tied_embeddings == (head in ("same", "shared"))
    if head == "longer":
        with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
            check_weights(checkpoint, checkpoint.args)


def test_an_output_projection_alone_is_the_table_too(tmp_path: Path) -> None:
    made("smollm2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_as_transformers(tmp_path)


LINEAR = {"type": "linear", "factor": 4.0}
TWICE: dict[str, tuple[dict[str, Any], bool]] = {
    "older and newer": ({"rope_scaling": LINEAR}, True),
    "older with a theta": ({"rope_scaling": LINEAR | {"rope_theta": 777.0}}, True),
    "older, theta beside it": ({"rope_scaling": LINEAR, "rope_theta": 777.0}, True),
    "theta beside the newer": ({"rope_theta": 777.0}, True),
    "type and rope_type": ({"rope_scaling": LINEAR | {"rope_type": "default"}}, True),
    "an empty older": ({"rope_scaling": {}}, False),
    "the same in both": ({"rope_scaling": {"type": "default", "rope_theta": 5000000.0}, "rope_theta": 5e6}, False),
    "another original context": ({"original_max_position_embeddings": 8}, False),
}


@pytest.mark.parametrize("name", TWICE)
def test_rope_settings_in_two_spellings_are_decided_as_by_transformers(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """rope_scaling, added by hand beside rope_parameters, was ignored in silence."""
    settings, logged = TWICE[name]
    made("yi").save_pretrained(tmp_path)
    change(tmp_path, **settings)
    assert_as_transformers(tmp_path)
    assert ("says two things about RoPE" in caplog.text) == logged


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_an_original_context_beside_the_rope_settings_counts(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    made("yarn" if kind == "yarn" else "llama 3.1").save_pretrained(tmp_path)
    change(tmp_path, original_max_position_embeddings=512)
    assert_as_transformers(tmp_path, 100)
    assert "says two things about RoPE" in caplog.text


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral, beyond its window", {"model_type": "llama"}),
        ("llama 2", {"model_type": "mistral", "sliding_window": 10}),
    ],
)
def test_the_model_type_comes_before_the_architecture(
    tmp_path: Path, family: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made(family).save_pretrained(tmp_path)
    change(tmp_path, **settings)
    assert_as_transformers(tmp_path)
    assert f"model_type '{settings['model_type']}' is used" in caplog.text


def test_unneeded_tensors_are_logged_and_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Caches of angles, and the value head of reinforcement learning, made folders unusable."""
    theirs = made("llama 2")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 32, 16),
        "v_head.summary.weight": torch.ones(1, 96),
        "model.embed_tokens.position_ids": torch.arange(32),
    }
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO", "llama"):
        assert_as_transformers(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert "rotary_emb.cos_cached" in line and "v_head.summary.weight" in line and "inv_freq" not in line


def test_a_folder_of_both_kinds_is_read_as_one_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mistral's folders on the hub have both Hugging Face's files and its own."""
    made("mistral, beyond its window").save_pretrained(tmp_path)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    with caplog.at_level("INFO", "llama"):
        assert_as_transformers(tmp_path)
    assert "config.json with its weights is read" in caplog.text
