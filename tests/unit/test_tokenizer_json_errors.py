"""Hugging Face's tokenizer files that are damaged, unsupported or hostile: one line that names what is wrong."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llama.tokenizer import Tokenizer
from llama.tokenizer.hf_limits import check_pattern
from llama.tokenizer.pre_rules import PRE_RULES
from tests.unit.hf_folders import folders
from tests.unit.hostile_tokenizers import KINDS, replace, sequence
from tests.unit.test_tokenizer import bpe, spm_path, train_spm

__all__ = ["bpe", "folders", "spm_path", "train_spm"]  # fixtures


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
A = {"Sequence": {"id": "A", "type_id": 0}}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}


def charsmap(length: int) -> str:
    """A `Precompiled` map that can make `length` letters of a character."""
    return base64.b64encode(b"\0\0\0\0" + b"a" * length + b"\0").decode()


def template(single: list[Any]) -> dict[str, Any]:
    pair = [A, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


TOKEN = {"id": 3, "content": "<x>", "special": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "its model is missing: expected an object"),
        ([], r"tokenizer\.json is a JSON list, and no object: expected a SentencePiece model .* tokenizer\.json"),
        ({"model": 5}, "model is 5"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "'WordPiece': supported are BPE and Unigram"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "'WordLevel'"),
        ({"model": {"type": ["BPE"], "vocab": {"a": 0}}}, "type"),
        ({"model": {"type": "BPE", "vocab": {}}}, "vocab"),
        ({"model": BPE | {"vocab": {"a": -5}}}, "the id of 'a' in its vocab is -5: ids are integers, 0 to 16777215"),
        ({"model": BPE | {"vocab": {"a": 2**31}}}, "id of 'a'"),
        ({"model": BPE | {"vocab": {"a": True}}}, "id of 'a'"),
        ({"model": BPE | {"vocab": {"a": 0, "b": 0}}}, "an id twice"),
        ({"model": BPE | {"vocab": {"\ud800": 0}, "merges": []}}, "surrogates"),
        ({"model": BPE | {"merges": [["a", "c"]]}}, "merges"),
        ({"model": BPE | {"merges": ["a"]}}, "merges"),
        ({"model": BPE | {"merges": [[]]}}, "merges"),
        ({"model": BPE | {"merges": None}}, "merges"),
        ({"model": BPE | {"unk_token": "zz"}}, "unknown piece 'zz' is not"),
        ({"model": BPE | {"byte_fallback": "yes"}}, "byte_fallback"),
        ({"model": BPE | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0], ["a", 0.0]], "unk_id": 0}}, "a text twice"),
        ({"model": {"type": "Unigram", "vocab": [["a" * 300_000, 0.0]], "unk_id": 0}}, "300000 characters in one"),
        ({"model": {"type": "Unigram", "vocab": [["a", "b"]], "unk_id": 0}}, "real number"),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}}, r"its vocab has \['a'\]: expected a list of a text and its"),
        (
            {"model": {"type": "Unigram", "vocab": ["ab"]}},
            "its vocab has 'ab': expected a list of a text and its score",
        ),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 1}}, "unknown piece 1 is not"),
        ({"model": BPE, "added_tokens": 5}, "added_tokens"),
        ({"model": BPE, "added_tokens": False}, "added_tokens"),
        ({"model": BPE | {"byte_fallback": ""}}, "byte_fallback"),
        ({"model": BPE, "added_tokens": [TOKEN | {"id": -5}]}, "is -5: ids are integers, 0 to 16777215"),
        ({"model": BPE, "added_tokens": [TOKEN | {"id": 7}]}, "'<x>' has the id 7: expected 3"),
        ({"model": BPE, "added_tokens": [TOKEN | {"id": None}]}, "the id of {'id': None.* is None"),
        ({"model": BPE, "added_tokens": [TOKEN | {"content": ""}]}, "added token"),
        ({"model": BPE, "added_tokens": [TOKEN | {"special": 1}]}, "'special': 1"),
        ({"model": BPE, "normalizer": {"type": "Nonesuch"}}, "the tokenizers library knows no such normalizer"),
        ({"model": BPE, "normalizer": 5}, "normalizer is 5: the tokenizers library knows no such normalizer"),
        ({"model": BPE, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}, "JSON"),
        ({"model": BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "pretokenizers"),
        (
            {"model": BPE, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
            "'WordPiece'.*supported are",
        ),
        ({"model": BPE, "decoder": {"type": "Strip", "content": " ", "start": 9, "stop": 9}}, "one character"),
        ({"model": BPE, "decoder": {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}}, "decoder"),
        (
            {"model": BPE, "post_processor": {"type": "BertProcessing", "sep": ["a", 0]}},
            "post_processor is .*'BertProcessing'",
        ),
        (
            {"model": BPE, "post_processor": {"type": "BertProcessing", "sep": ["q", 1], "cls": ["q", 9]}},
            "the id 9, which is no token",
        ),
    ],
)
def test_what_does_not_work_ends_in_one_line_that_names_it(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"model": ', "no valid JSON"),
        (b'{"model": \xff}', "no valid JSON"),
        (b'{"model": NaN}', "NaN"),
        (b'{"model": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"model": ' + b"[" * 100_000, "no valid JSON"),
        (b'{"model": [' + b"[]," * (1 << 22) + b"[]]}", "lists and objects"),
        (b'{"normalizer": ' + b'{"type":"Sequence","normalizers":[' * 300 + b"]}" * 300 + b', "model": 1}', "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_or_hostile_json_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b"[]", "expected an object"),
        ("tokenizer_config.json", b"{", "no valid JSON"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token"),
        ("tokenizer_config.json", b'{"bos_token": {"content": 5}}', "bos_token"),
        ("tokenizer_config.json", b'{"add_bos_token": "no"}', "add_bos_token"),
        ("tokenizer_config.json", b'{"legacy": 1}', "legacy"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"99999999999": {"content": "a"}}}',
            "added_tokens_decoder",
        ),
        ("tokenizer_config.json", b'{"additional_special_tokens": "a"}', "additional_special_tokens"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [5]}', "chat_template"),
        ("special_tokens_map.json", b'{"eos_token": []}', "eos_token"),
        ("added_tokens.json", b'{"<pad>": "x"}', "<pad>"),
        ("chat_template.jinja", b"\xff\xfe", "no text"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "spm"])
def test_a_damaged_file_beside_it_is_named(
    tmp_path: Path, folders: dict[str, Path], spm_path: Path, kind: str, name: str, content: bytes, said: str
) -> None:
    source = spm_path if kind == "spm" else folders["llama2"] / "tokenizer.json"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", "(?:x(?:a*)y?)+", "((ab?)*c)*", r"(\s+\S)+", "(a+){2,}b"])
def test_a_regex_that_could_explode_is_refused(tmp_path: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": BPE, "pre_tokenizer": split}))
    with pytest.raises(ValueError, match="exponential"):
        Tokenizer(path)


def test_the_patterns_of_known_models_are_not_refused() -> None:
    others = [r"(?=(\d{3})+(?!\d))", r"[(\s|.)+]+", r"\(a+\)+", r"(?i:'s|'t)?\p{L}+", r"(?:ab)+"]
    for pattern in [pattern for rule in PRE_RULES.values() for pattern in rule.splits] + others:
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["a*a*a*b", ".*.*b", r"\w+\d+(?=Z)", "(a*)(a*)(a*)", "a{0,900}a{0,900}a{0,900}b"])
def test_a_regex_of_a_high_power_is_refused(pattern: str) -> None:
    """These ran for minutes on a text of some thousand letters."""
    with pytest.raises(ValueError, match="exponential time, or one much like it"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"normalizer": replace("a", "a" * 20_000)}, "a text of 20000 characters"),
        ({"normalizer": sequence("normalizer", [replace("a", "aa")] * 8)}, "256 times as long: the limit is 128"),
        ({"normalizer": sequence("normalizer", [replace("", "aa")] * 5)}, "243 times as long"),
        ({"normalizer": sequence("normalizer", [replace("(?=a)", "a", "Regex")] * 8)}, "256 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 200}}, "201 times as long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/P///wAA"}}, "4294967292 bytes follow"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(300)}}, "300 times as long"),
        ({"normalizer": BERT}, "'BertNormalizer': supported are"),
        ({"pre_tokenizer": sequence("pre_tokenizer", [BYTE_LEVEL] * 4)}, "625 times as long"),
        ({"pre_tokenizer": sequence("pre_tokenizer", [BYTE_LEVEL] * 40)}, "40 steps: the limit is 32"),
        ({"decoder": sequence("decoder", [replace("a", "b")] * 100)}, "100 steps: the limit is 32"),
        ({"decoder": sequence("decoder", [replace("a", "b")] * 1000)}, "more than 2000 values"),
        ({"post_processor": template([A, A])}, "a text's tokens once"),
        ({"model": BPE | {"vocab": {"a": 0, "b" * 5000: 1}, "merges": []}}, "5000 characters in one"),
        ({"model": BPE | {"vocab": {f"{i:04000}": i for i in range(1100)}, "merges": []}}, "4400000 characters in all"),
        ({"added_tokens": [TOKEN | {"content": "x" * 5000}]}, "5000 characters in one"),
    ],
)
def test_what_would_take_all_memory_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    """Such files aborted the process inside the library, or ran for minutes."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": BPE} | content))
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_hostile_file_is_refused_or_harmless(tmp_path: Path, kind: Any) -> None:
    for seed in range(4):
        (tmp_path / "tokenizer.json").write_text(json.dumps(kind(random.Random(seed))))
        try:
            tokenizer = Tokenizer(tmp_path / "tokenizer.json")
            for text in ("a b ab", "a" * 300, "aaa bbb " * 100):
                assert len(tokenizer.decode(tokenizer.encode(text, bos=False, eos=False))) < 100_000
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
