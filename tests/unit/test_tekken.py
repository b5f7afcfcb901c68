"""Mistral's tokenizer files: tekken.json against tiktoken by Mistral's published pattern, and which file is taken."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from transformers import AutoTokenizer

from llama.chat.formats import find_chat_format
from llama.checkpoint.export.tokenizer import tokenizer_source, write_tokenizer
from llama.tokenizer import Tokenizer, find_tokenizer
from tests.unit.test_tokenizer import SAMPLES, bpe, spm_path, token_ids, train_spm

__all__ = ["bpe", "spm_path", "token_ids", "train_spm"]  # fixtures

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
N_SPECIAL, N_UNUSED = 24, 40  # byte strings at the end, which the model has no ids for


@pytest.fixture(scope="module")
def tekken(token_ids: dict[bytes, int]) -> dict[str, Any]:
    """A file without a list of its special tokens, as those of 2024 are."""
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, i in sorted(token_ids.items(), key=lambda item: item[1])
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": N_SPECIAL + len(vocab) - N_UNUSED,
        "default_num_special_tokens": N_SPECIAL,
        "version": "v3",
    }
    return {"config": config, "vocab": vocab}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "tekken.json"
    path.write_text(json.dumps(content))
    return path


def test_ids_are_ranks_after_the_special_tokens(
    tmp_path: Path, tekken: dict[str, Any], token_ids: dict[bytes, int]
) -> None:
    tokenizer = Tokenizer(write(tmp_path, tekken))
    known = {token: i for token, i in token_ids.items() if i < len(token_ids) - N_UNUSED}
    reference = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=known, special_tokens={})
    for text in SAMPLES:
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert ids == [1] + [N_SPECIAL + i for i in reference.encode_ordinary(text)]
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.n_words == N_SPECIAL + len(known) and tokenizer.add_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 11)
    assert tokenizer.stop_tokens == {2}
    assert tokenizer.special_tokens["[/INST]"] == 4 and tokenizer.special_tokens["<SPECIAL_20>"] == 20
    typed = tokenizer.encode("</s>[INST]", bos=False, eos=False)
    assert min(typed) >= N_SPECIAL and tokenizer.decode(typed) == "</s>[INST]"


def test_special_tokens_of_the_file_come_before_the_usual_ones(tmp_path: Path, tekken: dict[str, Any]) -> None:
    names = ["<unk>", "<s>", "</s>", "[THINK]"]
    listed = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(names)]
    tokenizer = Tokenizer(write(tmp_path, tekken | {"special_tokens": listed}))
    assert list(tokenizer.special_tokens)[:5] == [*names, "<SPECIAL_4>"]
    assert len(tokenizer.special_tokens) == N_SPECIAL and tokenizer.pad_id == -1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": 5}, "config is 5"),
        ({"config": {}}, "default_vocab_size is None"),
        ({"pattern": "(a+)+"}, "pattern is '.a.*which no released file has"),
        ({"default_vocab_size": 2**20}, "vocab has not"),
        ({"default_num_special_tokens": 3}, "special tokens"),
        ({"special_tokens": [{"rank": 0, "token_str": "<s>"}]}, "special tokens"),
        ({"special_tokens": [{"rank": 0}]}, "KeyError"),
        ({"special_tokens": 5}, "TypeError"),
        ({"vocab": []}, "vocab has not"),
        ({"vocab": [{"rank": 0, "token_bytes": "?"}]}, "no tekken.json"),
        ({"vocab": [5]}, "TypeError"),
    ],
)
def test_a_file_that_does_not_work_is_named(
    tmp_path: Path, tekken: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    config = tekken["config"] | {key: value for key, value in change.items() if key in tekken["config"]}
    path = write(tmp_path, tekken | {"config": config} | {k: v for k, v in change.items() if k not in config})
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_mistrals_files_are_found(tmp_path: Path, tekken: dict[str, Any], spm_path: Path) -> None:
    """As mistral-common takes them: the newest tokenizer.model.v*, else tekken.json; other formats come first."""
    write(tmp_path, tekken)
    assert find_tokenizer(tmp_path).name == "tekken.json"
    for name in ("tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model"):
        (tmp_path / name).write_bytes(spm_path.read_bytes())
        assert find_tokenizer(tmp_path).name == name
        assert Tokenizer(tmp_path).encode("a b", True, False) == Tokenizer(spm_path).encode("a b", True, False)


def test_the_version_of_mistrals_files_tells_where_a_system_prompt_goes(
    tmp_path: Path, tekken: dict[str, Any], spm_path: Path
) -> None:
    """Files of version 3 have [SYSTEM_PROMPT] as well, which their models were never shown."""
    for version, name in (("v1", "mistral-v3"), ("v3", "mistral-v3"), ("v7", "mistral-v7"), ("v13", "mistral-v7")):
        path = write(tmp_path, tekken | {"config": tekken["config"] | {"version": version}})
        assert find_chat_format(Tokenizer(path)) == name
    (tmp_path / "tokenizer.model.v3").write_bytes(spm_path.read_bytes())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.mistral_version == 3 and Tokenizer(spm_path).mistral_version == 0
    assert find_chat_format(tokenizer) is None  # it has no [INST] of its own
    assert find_chat_format(tokenizer, ["Mistral-7B-Instruct-v0.1"]) == "mistral-v1"


def test_a_tekken_vocabulary_is_written_as_tokenizer_json_and_gguf(tmp_path: Path, tekken: dict[str, Any]) -> None:
    """No other format has files of its kind; as a tokenizer.json it would be copied, and run nowhere else."""
    source = tokenizer_source(None, write(tmp_path, tekken))  # type: ignore[arg-type]
    assert source.metadata is not None
    folder = tmp_path / "hf"
    folder.mkdir()
    write_tokenizer(source, folder, "hf")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    reference, written = AutoTokenizer.from_pretrained(folder), Tokenizer.from_gguf(source.metadata)
    for text in SAMPLES:
        ids = source.tokenizer.encode(text, bos=True, eos=False)
        assert reference.encode(text, split_special_tokens=True) == ids
        assert written.encode(text, bos=True, eos=False) == ids
    assert written.special_tokens == source.tokenizer.special_tokens
