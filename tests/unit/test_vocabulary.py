"""A tokenizer has as many tokens as the weights have rows, or fewer where the format pads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tests.checkpoints import BYTE_VOCAB_SIZE, TINY, random_state, write_byte_tokenizer, write_meta
from tests.hugging_face import hugging_face_model
from tests.models import build


def write_hugging_face(folder: Path, vocab_size: int) -> Path:
    args = dataclasses.replace(TINY, vocab_size=vocab_size)
    hugging_face_model(args, random_state(args)).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def test_hugging_face_embeddings_may_be_padded(tmp_path: Path) -> None:
    """Embeddings are often rounded up to a multiple of 64; the rows beyond the tokenizer are no tokens."""
    llm = build(write_hugging_face(tmp_path, BYTE_VOCAB_SIZE + 64))
    assert llm.model.args.vocab_size == BYTE_VOCAB_SIZE + 64
    (tokens,), _ = llm.generate([[1, 2, 3]], 200, temperature=5.0, top_p=1.0, seed=0)
    assert any(token >= BYTE_VOCAB_SIZE for token in tokens)
    prediction = llm.text_completion(["a"], 5.0, 1.0, 200, seed=0)[0]
    assert "" in prediction["tokens"]


def test_hugging_face_embeddings_may_not_lack_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 512 tokens, but the weights in .* have 500"):
        build(write_hugging_face(tmp_path, 500))


def write_byte_level(folder: Path, placed: dict[str, Any]) -> Path:
    """A model of 256 rows, whose tokenizer.json has a piece for each byte; placed: more of that file, or files."""
    args = dataclasses.replace(TINY, vocab_size=256)
    hugging_face_model(args, random_state(args)).save_pretrained(folder)
    model = {"type": "BPE", "vocab": {text: i for i, text in enumerate(ByteLevel.alphabet())}, "merges": []}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {"model": model, "pre_tokenizer": byte_level, "decoder": byte_level}
    placed = {"tokenizer.json": {}, **placed}
    for name, value in placed.items():
        (folder / name).write_text(json.dumps(content | value if name == "tokenizer.json" else value))
    return folder


PAD = {"content": "<pad>", "special": False}


@pytest.mark.parametrize(
    "placed",
    [
        {"tokenizer.json": {"added_tokens": [PAD | {"id": 256}]}},
        {"added_tokens.json": {"<pad>": 256}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"256": PAD}, "pad_token": "<pad>"}},
    ],
    ids=lambda placed: next(iter(placed)),
)
def test_added_tokens_without_a_row_are_refused_in_prompts_alone(tmp_path: Path, placed: dict[str, Any]) -> None:
    """Many fine-tunes of Llama 2 add a <pad> of the id 32000 to 32000 rows: they were refused."""
    expected = build(write_byte_level(tmp_path, {})).generate([[1, 2, 3]], 20, temperature=5.0, seed=0)
    llm = build(write_byte_level(tmp_path, placed))
    assert llm.tokenizer.n_words == 257 and llm.model.args.vocab_size == 256
    assert llm.generate([[1, 2, 3]], 20, temperature=5.0, seed=0) == expected
    with pytest.raises(ValueError, match="prompt 0 has token 256: ids are integers, 0 to 255"):
        llm.generate([[1, 256]], 2)


def test_end_tokens_that_the_model_cannot_make_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An eos_token_id of 32005 was refused; transformers waits for it in vain."""
    folder = write_byte_level(tmp_path, {"generation_config.json": {"eos_token_id": [7, 32005, -1]}})
    assert build(folder).tokenizer.stop_tokens == {2, 7}
    assert "end token -1 is out of range" in caplog.text


def test_a_row_beyond_the_tokenizer_may_end_a_generation(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, {"generation_config.json": {"eos_token_id": 255}})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {text: i for text, i in content["model"]["vocab"].items() if i < 255}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    llm = build(folder)
    assert llm.tokenizer.n_words == 255 and llm.tokenizer.stop_tokens == {2, 255}


def test_meta_embeddings_have_a_row_for_each_token(tmp_path: Path) -> None:
    write_meta(tmp_path, dataclasses.replace(TINY, vocab_size=BYTE_VOCAB_SIZE + 64))
    with pytest.raises(ValueError, match=r"the tokenizer has 512 tokens, but the weights in .* have 576"):
        build(tmp_path)


def test_end_tokens_of_the_configuration_end_a_generation(tmp_path: Path) -> None:
    """Llama 3 Instruct names <|eot_id|> and <|eom_id|> in generation_config.json alone."""
    folder = write_hugging_face(tmp_path, BYTE_VOCAB_SIZE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 300], "temperature": 0.01}')
    llm = build(folder)
    assert {7, 300} <= llm.tokenizer.stop_tokens
    (tokens,), _ = llm.generate([[1, 2, 3]], 400, temperature=5.0, top_p=1.0, seed=0)
    assert tokens and not {7, 300} & set(tokens)
