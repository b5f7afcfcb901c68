"""Tokenizers written into another format: the same ids from our own Tokenizer and from transformers."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llama.checkpoint.export.tokenizer import TokenizerSource, tokenizer_source, write_tokenizer
from llama.checkpoint.export.tokenizer_model import sentencepiece_model, tiktoken_model
from llama.testing.model_presets import PRESETS
from llama.testing.random_checkpoint import random_tokenizer
from llama.tokenizer import Tokenizer
from llama.tokenizer.tiktoken_vocab import PATTERN

PARAGRAPHS = [
    "Hello world, it's the 2nd of May 2024; we'll pay $1,234.56 -- don't DON'T you'Ve.",
    "Zürich, naïve café, smørrebrød, Ærø, İstanbul, ﬁle, e\u0301, ǅ, ªº ½²٣४.",
    "Привет, как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया। สวัสดีชาวโลก 你好，世界！ こんにちは世界。 안녕하세요 세계",
    "👋🏽 👩‍👩‍👧‍👦 🇫🇷 ✈️ \U0001f9d1\u200d\U0001f4bb \U00020bb7野家",
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2  # ok\r\n\r\nprint(f(3))\n\n\n   \n",
    " " * 70 + "x" + "\n" * 40 + "=" * 90 + "1" * 30 + "aaaaaaaaaaaaa",
]
SAMPLES = ["", " ", "a", " a", "a ", "  Hello", "é", "中", "😀", "\x00", "\n", *PARAGRAPHS, "\n".join(PARAGRAPHS)]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


class NoWeights:
    """A checkpoint of which only the folder counts."""

    tokenizer_metadata = None

    def __init__(self, path: Path) -> None:
        self.path: Any = path


def source_of(folder: Path) -> TokenizerSource:
    return tokenizer_source(NoWeights(folder))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PARAGRAPHS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The model of a byte-level BPE trained with Llama 3's pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PARAGRAPHS * 3, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.fixture(scope="module")
def ranks_folder(trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By rules of its own: GPT-2 spells a byte that is not printable as the n-th character from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    texts = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    tokens = [bytes(byte_of[char] for char in text) for text in texts]
    folder = tmp_path_factory.mktemp("ranks")
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def gguf_source(trained: dict[str, Any], pre: str) -> TokenizerSource:
    texts = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    controls = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*controls, *texts],
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * len(texts),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in trained["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe",
        "tokenizer.chat_template": TEMPLATE,
    }
    return TokenizerSource(Tokenizer.from_gguf(metadata), None, metadata)


def assert_transformers_agrees(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.n_words
    assert theirs.bos_token_id == tokenizer.bos_id and theirs.eos_token_id == tokenizer.eos_id
    for text in SAMPLES:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=tokenizer.add_bos, eos=False), text
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    for text, number in tokenizer.special_tokens.items():
        assert theirs.convert_tokens_to_ids(text) == number


def assert_same(tokenizer: Tokenizer, other: Tokenizer) -> None:
    assert other.special_tokens == tokenizer.special_tokens and other.stop_tokens == tokenizer.stop_tokens
    for text in [*SAMPLES, *tokenizer.special_tokens, "<think> <s> </s>"]:
        assert other.encode(text, bos=False, eos=False) == tokenizer.encode(text, bos=False, eos=False), text


@pytest.mark.parametrize("kind", ["spm", "ranks", "gguf-smollm", "gguf-llama-bpe", "gguf-spm"])
def test_a_hugging_face_folder_has_the_same_ids(
    kind: str, spm_folder: Path, ranks_folder: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "gguf-spm":
        metadata = dict(source_of(spm_folder).metadata or {}) | {"tokenizer.chat_template": TEMPLATE}
        source = TokenizerSource(Tokenizer.from_gguf(metadata), None, metadata)
    elif kind.startswith("gguf"):
        source = gguf_source(trained, kind.removeprefix("gguf-"))
    else:
        source = source_of(spm_folder if kind == "spm" else ranks_folder)
    write_tokenizer(source, tmp_path, "hf")
    assert_same(source.tokenizer, Tokenizer(tmp_path / "tokenizer.json"))
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert_transformers_agrees(tmp_path, source.tokenizer)
    if kind.startswith("gguf"):
        messages = [{"role": "user", "content": "hi"}]
        assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == "[user] hi"


def test_a_gguf_files_sentencepiece_becomes_a_tokenizer_model(spm_folder: Path, tmp_path: Path) -> None:
    """Its special pieces are not the library's usual ones: the model must say so itself."""
    metadata = dict(source_of(spm_folder).metadata or {}) | {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    source = TokenizerSource(Tokenizer.from_gguf(metadata), None, metadata)
    write_tokenizer(source, tmp_path, "meta")
    written = Tokenizer(tmp_path)
    assert (written.bos_id, written.eos_id, written.chat_template) == (2, 1, TEMPLATE)
    assert_same(source.tokenizer, written)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (sp.bos_id(), sp.eos_id()) == (2, 1)


def test_llama_3s_tokenizer_json_becomes_ranks_again(ranks_folder: Path, tmp_path: Path) -> None:
    """Meta's code reads ranks alone. Releases differ in the names of the special tokens that nothing uses."""
    for name in ("hf", "meta"):
        (tmp_path / name).mkdir()
    write_tokenizer(source_of(ranks_folder), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|step_id|>", "<|reserved_special_token_900|>"))
    write_tokenizer(source_of(tmp_path / "hf"), tmp_path / "meta", "meta")
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (ranks_folder / "tokenizer.model").read_bytes()
    assert not (tmp_path / "meta" / "tokenizer.json").exists()


def test_other_byte_level_vocabularies_become_a_tokenizer_json_for_meta(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    source = gguf_source(trained, "smollm")
    write_tokenizer(source, tmp_path, "meta")
    assert not (tmp_path / "tokenizer.model").exists()
    assert_same(source.tokenizer, Tokenizer(tmp_path))
    assert Tokenizer(tmp_path).chat_template == TEMPLATE


def test_files_are_copied_where_both_formats_have_them(spm_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    shutil.copy(spm_folder / "tokenizer.model", tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "one" / "model.bin").write_text("no tokenizer")
    write_tokenizer(source_of(tmp_path / "one"), tmp_path / "two", "hf")
    write_tokenizer(source_of(tmp_path / "two"), tmp_path / "three", "meta")
    assert (tmp_path / "three" / "tokenizer.model").read_bytes() == (spm_folder / "tokenizer.model").read_bytes()
    assert Tokenizer(tmp_path / "three").chat_template == TEMPLATE
    assert not (tmp_path / "two" / "model.bin").exists() and not (tmp_path / "three" / "tokenizer.json").exists()


def test_a_sentencepiece_that_has_no_exact_json_keeps_its_own_file(tmp_path: Path) -> None:
    """open_llama's normalizes text, which a tokenizer.json of a few rules does not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PARAGRAPHS * 3), model_writer=model, model_type="bpe", vocab_size=520,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "tokenizer.model").write_bytes(model.getvalue())
    write_tokenizer(source_of(tmp_path / "one"), tmp_path / "two", "hf")
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["tokenizer.model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tiny", "smollm2-135m", "llama-2-7b", "codellama-7b", "llama-3.1-8b", "qwen3-0.6b", "olmo2-7b"]
)
def test_random_tokenizers_have_exactly_the_vocabulary_and_reach_their_words(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    metadata = random_tokenizer(preset.tokenizer, preset.args.vocab_size)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.n_words == preset.args.vocab_size and tokenizer.bos_id >= 0 and tokenizer.eos_id >= 0
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    assert len(tokenizer.encode("some words of letters", bos=False, eos=False)) < 20
    if preset.tokenizer in ("sentencepiece", "code_llama", "llama3"):
        model = tiktoken_model(tokenizer) if preset.tokenizer == "llama3" else sentencepiece_model(metadata)
        assert model is not None
        (tmp_path / "tokenizer.model").write_bytes(model)
        assert_same(tokenizer, Tokenizer(tmp_path))
