"""A tokenizer has as many tokens as the weights have rows, or fewer where the format pads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

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
