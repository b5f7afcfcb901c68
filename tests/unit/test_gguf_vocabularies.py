"""Vocabularies of GGUF files as converters of all years wrote them, against llama.cpp and sentencepiece."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, pre_tokenizers

from llama.tokenizer import Tokenizer
from llama.tokenizer.pre_rules import PRE_RULES
from tests.unit.test_tokenizer import PARAGRAPHS, SAMPLES, bpe, gguf_bpe, gguf_from_spm, spm_path, train_spm

__all__ = ["bpe", "gguf_bpe", "spm_path", "train_spm"]  # fixtures

# Lengths in bytes of what llama.cpp (of llama-cpp-python 0.3.36) splits texts into, by the rule's name.
SPLITS = json.loads((Path(__file__).parent / "llama_cpp_splits.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pre", SPLITS["bytes"])
def test_rules_split_texts_as_llama_cpp_does(pre: str) -> None:
    """Files with these rules were refused, deepseek-llm, deepseek-v3 and default among them."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_RULES[pre].splits]
    rule = pre_tokenizers.Sequence(steps)
    found = [[len(piece.encode()) for piece, _ in rule.pre_tokenize_str(text)] for text in SPLITS["texts"]]
    assert found == SPLITS["bytes"][pre]


@pytest.mark.parametrize("missing", [None, ""])
def test_a_file_that_names_no_rule_runs_by_llama_cpps_default(
    gguf_bpe: dict[str, Any], missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = ["<s>" if text == "<|begin_of_text|>" else text for text in gguf_bpe["tokenizer.ggml.tokens"]]
    metadata = gguf_bpe | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.pre": "default"}
    expected = Tokenizer.from_gguf(metadata)
    assert not caplog.records
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": missing})
    assert "pre is missing" in caplog.text and "'default'" in caplog.text and "--tokenizer_path" in caplog.text
    assert not tokenizer.add_bos
    for text in SAMPLES:
        assert tokenizer.encode(text, bos=False, eos=False) == expected.encode(text, bos=False, eos=False)


def test_llama_3s_files_that_name_no_rule_run_by_llama_3s(
    gguf_bpe: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Converters wrote none before May 2024; the files were refused. By the default, digits and BOS would be wrong."""
    expected = Tokenizer.from_gguf(gguf_bpe)
    tokenizer = Tokenizer.from_gguf({key: value for key, value in gguf_bpe.items() if key != "tokenizer.ggml.pre"})
    assert "'llama-bpe'" in caplog.text and tokenizer.add_bos
    for text in SAMPLES:
        assert tokenizer.encode(text, bos=False, eos=False) == expected.encode(text, bos=False, eos=False)


def test_padding_tokens_of_the_type_unknown_are_out_of_reach(spm_path: Path) -> None:
    """llama.cpp's vocabulary of Phi-3 has 53 such tokens, while <unk> is a control token: it was refused."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    metadata = gguf_from_spm(spm_path)
    pads = [f"[PAD{sp.vocab_size() + i}]" for i in range(3)]
    types = [3 if i == sp.unk_id() else kind for i, kind in enumerate(metadata["tokenizer.ggml.token_type"])]
    metadata |= {
        "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + pads,
        "tokenizer.ggml.scores": metadata["tokenizer.ggml.scores"] + [-1000.0] * 3,
        "tokenizer.ggml.token_type": types + [2] * 3,
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.n_words == sp.vocab_size() + 3
    for text in [*SAMPLES, "".join(pads), "x " + pads[1]]:
        assert tokenizer.encode(text, bos=False, eos=False) == sp.encode(text)
    ids = sp.encode(PARAGRAPHS[0])
    assert tokenizer.decode([*ids, sp.vocab_size()]) == sp.decode(ids)


def test_special_ids_beyond_the_vocabulary_are_left_out(
    gguf_bpe: dict[str, Any], spm_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in llama.cpp, which takes its default in their place. A padding id of 32000 of 32000 was refused."""
    beyond = {f"tokenizer.ggml.{name}_token_id": 10**6 for name in ("padding", "eos", "eot", "eom")}
    tokenizer, expected = Tokenizer.from_gguf(gguf_bpe | beyond), Tokenizer.from_gguf(gguf_bpe)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (-1, -1)
    assert tokenizer.stop_tokens == expected.stop_tokens  # by their names
    assert sum("is 1000000, but there are" in record.message for record in caplog.records) == 4
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    sentencepiece_tokenizer = Tokenizer.from_gguf(gguf_from_spm(spm_path) | beyond)
    assert (sentencepiece_tokenizer.eos_id, sentencepiece_tokenizer.pad_id) == (2, -1)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"": "a", ".tool_use": "b"}, "a"),
        ({".default": "a", ".rag": "b"}, "a"),
        ({".tool_use": "b", ".rag": "c"}, "b"),
        ({".rag": "c"}, None),
        ({"": ["a", "b"]}, "a"),
        ({"": []}, None),
        ({"": 5}, None),
        ({}, None),
    ],
)
def test_the_default_of_named_chat_templates_is_taken(
    gguf_bpe: dict[str, Any], templates: dict[str, Any], expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Converters write templates of other names under keys of their own; llama.cpp takes that for tools as default."""
    metadata = {key: value for key, value in gguf_bpe.items() if key != "tokenizer.chat_template"}
    metadata |= {"tokenizer.chat_template" + name: value for name, value in templates.items()}
    metadata["tokenizer.chat_templates"] = [name[1:] for name in templates if name]
    assert Tokenizer.from_gguf(metadata).chat_template == expected
    assert ("none for plain dialogs: rag" in caplog.text) == (templates == {".rag": "c"})
