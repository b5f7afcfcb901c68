"""Hugging Face's tokenizers as keys of a GGUF file: the same ids and control tokens, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoint.export.tokenizer import PROBES, TokenizerSource
from llama.tokenizer import Tokenizer
from tests.unit.hf_folders import folders
from tests.unit.test_tokenizer import bpe, spm_path, train_spm

__all__ = ["bpe", "folders", "spm_path", "train_spm"]  # fixtures

TEXTS = (
    "Hello world, how are you? It's 12345 o'clock in Zürich: naïve café, Привет, 你好！",
    " def f(x):\n\n\n    return  x ** 2\t# ok\r\n",
    "<s> </s> <|endoftext|> <|im_end|> <tool_call> <think>",
)


def source_of(folder: Path) -> TokenizerSource:
    return TokenizerSource(Tokenizer(folder), folder / "tokenizer.json", None)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "llama2_new", "smollm", "yi", "code_llama", "saved"])
def test_a_tokenizer_json_has_the_same_ids_in_gguf(folders: dict[str, Path], kind: str) -> None:
    source = source_of(folders[kind])
    keys = source.gguf_metadata()
    found, expected = Tokenizer.from_gguf(keys), source.tokenizer
    assert {**found.special_tokens, "<unk>": 0} == {**expected.special_tokens, "<unk>": 0}
    assert found.stop_tokens >= expected.stop_tokens
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "add_bos", "chat_template"):
        assert getattr(found, name) == getattr(expected, name), name
    for text in (*TEXTS, *PROBES):
        if kind == "llama2_new":  # where transformers 5 puts no space before one
            text = text.lstrip(" ")
        ids = expected.encode(text, bos=False, eos=False)
        assert found.encode(text, bos=False, eos=False) == ids
        assert found.decode(ids) == expected.decode(ids)
    pre = {"llama3": "llama-bpe", "saved": "llama-bpe", "smollm": "smollm"}.get(kind)
    assert keys.get("tokenizer.ggml.pre") == pre


def changed(folder: Path, target: Path, **changes: Any) -> TokenizerSource:
    shutil.copytree(folder, target)
    path = target / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return source_of(target)


def test_a_unicode_form_is_left_to_programs(folders: dict[str, Path], tmp_path: Path) -> None:
    """Qwen's tokenizers have NFC, which GGUF has no key for, and llama.cpp leaves out."""
    source = changed(folders["llama3"], tmp_path / "nfc", normalizer={"type": "NFC"})
    assert source.gguf_metadata()["tokenizer.ggml.pre"] == "llama-bpe"


def test_what_gguf_cannot_say_of_a_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model of type Unigram"):
        source_of(folders["unigram"]).gguf_metadata()
    source = changed(folders["llama3"], tmp_path / "lower", normalizer={"type": "Lowercase"})
    with pytest.raises(ValueError, match=r"GGUF cannot express the tokenizer of .*other ids"):
        source.gguf_metadata()
