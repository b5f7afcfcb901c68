"""Every kind of tokenizer against its reference library, on small vocabularies trained here and on the demo model."""

import base64
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llama.tokenizer import StreamDecoder, Tokenizer, find_tokenizer
from llama.tokenizer.pre_rules import PRE_RULES, PreRule

PARAGRAPHS = [
    "Hello world, it's the 2nd of May 2024; we'll pay $1,234.56 -- don't DON'T you'Ve.",
    "Zürich, naïve café, smørrebrød, Ærø, İstanbul, ﬁle, e\u0301, ǅ, ªº ½²٣४.",
    "Привет, как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया। สวัสดีชาวโลก 你好，世界！ こんにちは世界。 안녕하세요 세계",
    "👋🏽 👩‍👩‍👧‍👦 🇫🇷 ✈️ \U0001f9d1\u200d\U0001f4bb \U00020bb7野家",
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2  # ok\r\n\r\nprint(f(3))\n\n\n   \n",
    "tabs\t\tand   spaces    everywhere  \u00a0\u2003\u2028\ufeff\u200b end   ",
    "control \x00\x01\x07\x1b\x7f\x85 characters \ufffd \uffff",
    " " * 70 + "x" + "\n" * 40 + "=" * 90 + "1" * 30,
    "</s> <s> <unk> <0x41> ▁ [INST] <<SYS>> <|eot_id|> <|im_end|> <|begin_of_text|> <|reserved_special_token_3|>",
]
TEXT = "\n".join(PARAGRAPHS)
SAMPLES = ["", " ", "  ", "\n", "a", " a", "a ", "  Hello", "é", "中", "😀", "\x00", *PARAGRAPHS, TEXT]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def train_spm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def train(**options: Any) -> Path:
        """A model with Llama's settings, which options override."""
        model = io.BytesIO()
        settings = {
            "model_type": "bpe",
            "vocab_size": 520,
            "byte_fallback": True,
            "character_coverage": 0.98,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": True,
            "minloglevel": 2,
        }
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PARAGRAPHS * 3), model_writer=model, **{**settings, **options}
        )
        path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="session")
def spm_path(train_spm: Callable[..., Path]) -> Path:
    return train_spm()


@pytest.fixture(scope="session")
def bpe() -> tokenizers.Tokenizer:
    """Byte-level BPE trained as Llama 3's was, by its own pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(PARAGRAPHS * 3, trainer)
    return tokenizer


def raw_bytes(spelling: str) -> bytes:
    """GPT-2's spelling of bytes undone, by a table built another way than the package's."""
    table = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0]: b for b in range(128)}
    for b in range(128, 256):
        lead, tail = list(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0])
        table[tail] = chr(b).encode()[1]
        table[lead] = chr(b).encode()[0]
    # Bytes no UTF-8 text of two has: GPT-2 leaves printable Latin-1 as it is.
    return bytes(table.get(char, ord(char)) for char in spelling)


@pytest.fixture(scope="session")
def token_ids(bpe: tokenizers.Tokenizer) -> dict[bytes, int]:
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {raw_bytes(text): i for i, (text, _) in enumerate(vocab)}


def write_tiktoken(path: Path, token_ids: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in token_ids.items()))
    return path


@pytest.fixture(scope="session")
def tiktoken_path(token_ids: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "any.name", token_ids)


@pytest.fixture(scope="session")
def gguf_bpe(bpe: tokenizers.Tokenizer) -> dict[str, Any]:
    """GGUF metadata of the trained BPE, with Llama 3's first special tokens after it."""
    model = json.loads(bpe.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    controls = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|odd|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*texts, *controls, "<think>", "xyzzy"],
        "tokenizer.ggml.token_type": [1] * len(texts) + [3, 3, 3, 4, 3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(texts),
        "tokenizer.ggml.eos_token_id": len(texts) + 1,
        "tokenizer.chat_template": "{{ messages }}",
    }


def gguf_from_spm(path: Path) -> dict[str, Any]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(sp.vocab_size())
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 5 if sp.is_unused(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
    }


@pytest.fixture(scope="session")
def demo(demo_model: Path) -> dict[str, Any]:
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(demo_model).fields.items()}


@pytest.fixture(params=["spm", "tiktoken", "gguf_bpe", "gguf_spm"])
def each_kind(
    request: pytest.FixtureRequest, spm_path: Path, tiktoken_path: Path, gguf_bpe: dict[str, Any]
) -> Iterator[Tokenizer]:
    yield {
        "spm": lambda: Tokenizer(spm_path),
        "tiktoken": lambda: Tokenizer(tiktoken_path),
        "gguf_bpe": lambda: Tokenizer.from_gguf(gguf_bpe),
        "gguf_spm": lambda: Tokenizer.from_gguf(gguf_from_spm(spm_path)),
    }[request.param]()


# SentencePiece


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},  # open_llama
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"byte_fallback": False, "vocab_size": 240},
        {"pad_id": 3, "bos_id": 5, "eos_id": 4},
    ],
    ids=str,
)
def test_sentencepiece_file_encodes_and_decodes_as_the_library(
    train_spm: Callable[..., Path], options: dict[str, Any]
) -> None:
    path = train_spm(**options)
    tokenizer, sp = Tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (sp.vocab_size(), sp.bos_id(), sp.eos_id())
    assert tokenizer.pad_id == sp.pad_id() and tokenizer.stop_tokens == {sp.eos_id()} and tokenizer.add_bos
    for s in SAMPLES:
        ids = sp.encode(s)
        assert tokenizer.encode(s, bos=True, eos=True) == [sp.bos_id(), *ids, sp.eos_id()]
        assert tokenizer.decode(ids) == sp.decode(ids)
        assert tokenizer.decode([sp.bos_id(), *ids, sp.eos_id()]) == sp.decode([sp.bos_id(), *ids, sp.eos_id()])


def test_sentencepiece_decodes_any_ids_as_the_library(spm_path: Path) -> None:
    """Only the first word's space is dropped: not one of a control token before it, nor a second one."""
    tokenizer, sp = Tokenizer(spm_path), sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    rng = random.Random(0)
    whole = [i for i in range(sp.vocab_size()) if not sp.is_byte(i)]  # broken UTF-8 is another test's
    space = sp.piece_to_id("▁")
    cases = [[space], [space, space], [1, space, space], [0, space], [2, 1, 0], [3 + 0x20, space], [space, 3 + 0x41]]
    for ids in cases + [rng.choices(whole, k=12) for _ in range(300)]:
        assert tokenizer.decode(ids) == sp.decode(ids), ids


def test_gguf_llama_kind_is_the_sentencepiece_model_it_came_from(train_spm: Callable[..., Path]) -> None:
    for prefix in (True, False):
        path = train_spm(add_dummy_prefix=prefix)
        reference = Tokenizer(path)
        metadata = gguf_from_spm(path)
        if not prefix:
            metadata["tokenizer.ggml.add_space_prefix"] = False
        tokenizer = Tokenizer.from_gguf(metadata)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, -1, True)
        for s in SAMPLES:
            ids = reference.encode(s, bos=True, eos=False)
            assert tokenizer.encode(s, bos=True, eos=False) == ids
            assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("stored_as", ["normal", "user_defined", "control"])
def test_code_llamas_control_tokens_are_found_by_text_and_never_typed(
    train_spm: Callable[..., Path], stored_as: str
) -> None:
    """In Code Llama's file "▁<PRE>" is an ordinary piece with merges that lead to it."""
    texts = ["▁<PRE>", "▁<EOT>"]
    path = train_spm(**({} if stored_as == "normal" else {f"{stored_as}_symbols": texts[:]}))
    metadata = gguf_from_spm(path)
    if stored_as == "normal":
        grown = ["▁<", "▁<P", "▁<PR", "▁<PRE", "▁<PRE>", "▁<E", "▁<EO", "▁<EOT", "▁<EOT>", "RE", "OT"]
        for text in grown:
            if text not in metadata["tokenizer.ggml.tokens"]:
                metadata["tokenizer.ggml.tokens"].append(text)
                metadata["tokenizer.ggml.scores"].append(-float(len(metadata["tokenizer.ggml.tokens"])))
                metadata["tokenizer.ggml.token_type"].append(1)
        tokenizer = Tokenizer.from_gguf(metadata)
    else:
        tokenizer = Tokenizer(path)
    pre, eot = (tokenizer.special_tokens[text] for text in texts)
    assert tokenizer.stop_tokens == {tokenizer.eos_id, eot}
    ids = tokenizer.encode("a <PRE> b <EOT>", bos=False, eos=False)
    assert not {pre, eot} & set(ids) and tokenizer.decode(ids) == "a <PRE> b <EOT>"
    assert tokenizer.token_bytes(eot) == b""


# tiktoken


def test_tiktoken_file_encodes_and_decodes_as_tiktoken(tiktoken_path: Path, token_ids: dict[bytes, int]) -> None:
    tokenizer = Tokenizer(tiktoken_path)
    reference = tiktoken.Encoding(
        "reference", pat_str=LLAMA3_SPLIT, mergeable_ranks=token_ids, special_tokens=tokenizer.special_tokens
    )
    for s in SAMPLES:
        ids = reference.encode(s, disallowed_special=())
        assert tokenizer.encode(s, bos=True, eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert tokenizer.decode(ids) == reference.decode(ids) == s
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.n_words), k=12)
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_llama3_special_tokens_follow_those_of_the_file(tiktoken_path: Path, token_ids: dict[bytes, int]) -> None:
    tokenizer, base = Tokenizer(tiktoken_path), len(token_ids)
    assert tokenizer.n_words == base + 256 and sorted(tokenizer.special_tokens.values()) == list(
        range(base, base + 256)
    )
    expected = {  # Meta's Llama 3.1, where base is 128000
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_1|>": 3,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_2|>": 12,
        "<|reserved_special_token_245|>": 255,
    }
    assert {name: tokenizer.special_tokens[name] - base for name in expected} == expected
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (base, base + 1, -1)
    assert tokenizer.stop_tokens == {base + 1, base + 8, base + 9} and tokenizer.add_bos
    assert tokenizer.decode([base + 9]) == "<|eot_id|>"


@pytest.mark.slow
@pytest.mark.parametrize("run", ["a", " ", "\n", "中"])
def test_very_long_texts_are_encoded(tiktoken_path: Path, run: str) -> None:
    """tiktoken panics on millions of characters, and on long runs without a break."""
    tokenizer = Tokenizer(tiktoken_path)
    s = "start " + run * (600_003 // len(run)) + " end"
    assert tokenizer.decode(tokenizer.encode(s, bos=False, eos=False)) == s


def test_long_texts_are_cut_where_meta_cuts(tiktoken_path: Path, token_ids: dict[bytes, int]) -> None:
    reference = tiktoken.Encoding("reference", pat_str=LLAMA3_SPLIT, mergeable_ranks=token_ids, special_tokens={})
    runs = ["ab", "x" * 25_000, "y" * 25_001, " " * 25_003, "z" * 60_001, "\n", "c" * 400_000]
    s, expected = " ".join(runs), []
    for begin in range(0, len(s), 400_000):  # character by character, as Meta's code goes
        piece, in_a_row = "", 0
        for char in s[begin : begin + 400_000]:
            same = bool(piece) and char.isspace() == piece[-1].isspace()
            in_a_row = in_a_row + 1 if same else 1
            if in_a_row > 25_000:
                expected += reference.encode_ordinary(piece)
                piece, in_a_row = "", 1
            piece += char
        expected += reference.encode_ordinary(piece)
    assert Tokenizer(tiktoken_path).encode(s, bos=False, eos=False) == expected


# GGUF, byte-level BPE


def test_gguf_bpe_equals_tiktoken_on_the_same_vocabulary(gguf_bpe: dict[str, Any], token_ids: dict[bytes, int]) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_bpe)
    reference = tiktoken.Encoding("reference", pat_str=LLAMA3_SPLIT, mergeable_ranks=token_ids, special_tokens={})
    for s in SAMPLES:
        ids = reference.encode_ordinary(s)
        assert tokenizer.encode(s, bos=False, eos=False) == ids
        assert tokenizer.decode(ids) == s
    assert all(tokenizer.token_bytes(i) == token for token, i in token_ids.items())


def test_gguf_bpe_tells_control_tokens_from_added_words(gguf_bpe: dict[str, Any]) -> None:
    """llama.cpp: a user-defined token is matched in text, unless its name ends a generation."""
    tokenizer, base = Tokenizer.from_gguf(gguf_bpe), gguf_bpe["tokenizer.ggml.bos_token_id"]
    assert set(tokenizer.special_tokens.values()) == set(range(base, base + 5))
    assert tokenizer.stop_tokens == {base + 1, base + 2, base + 3}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (base, base + 1, -1)
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer.encode("<|im_end|><think>\n<|odd|>xyzzy", bos=False, eos=False)
    assert base + 5 in ids and not set(ids) & {*range(base, base + 5), base + 6}
    assert tokenizer.decode([base + 3, *ids]) == "<|im_end|><|im_end|><think>\n<|odd|>xyzzy"
    named = {**gguf_bpe, "tokenizer.ggml.eot_token_id": base + 4, "tokenizer.ggml.padding_token_id": base + 2}
    assert Tokenizer.from_gguf(named).stop_tokens == {base + 1, base + 2, base + 3, base + 4}
    assert Tokenizer.from_gguf(named).pad_id == base + 2


def test_a_whole_token_beats_the_merges_only_where_the_rule_says_so(gguf_bpe: dict[str, Any]) -> None:
    """Llama 3 has tokens that no merge reaches; the Smaug variant of the same pattern must not use them."""
    texts = [*gguf_bpe["tokenizer.ggml.tokens"], "qqqq"]
    metadata = gguf_bpe | {
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [*gguf_bpe["tokenizer.ggml.token_type"], 1],
    }
    q, whole = texts.index("q"), len(texts) - 1
    assert Tokenizer.from_gguf(metadata).encode("qqqq", bos=False, eos=False) == [whole]
    smaug = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "smaug-bpe"})
    assert smaug.encode("qqqq", bos=False, eos=False) == [q] * 4


@pytest.mark.parametrize(
    ("pre", "key", "add_bos"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("smollm", None, False),
        ("llama-bpe", False, False),
        ("smollm", True, True),
    ],
)
def test_add_bos_defaults_as_in_llama_cpp(gguf_bpe: dict[str, Any], pre: str, key: bool | None, add_bos: bool) -> None:
    metadata = gguf_bpe | {"tokenizer.ggml.pre": pre}
    if key is not None:
        metadata["tokenizer.ggml.add_bos_token"] = key
    assert Tokenizer.from_gguf(metadata).add_bos is add_bos


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("add_bos_token", 0, "add_bos_token is 0: expected true or false"),
        ("bos_token_id", True, "bos_token_id is True"),
        ("token_type", [True] * 600, "token_type holds True: expected int"),
    ],
)
def test_a_value_of_another_type_in_gguf_is_told(gguf_bpe: dict[str, Any], key: str, value: object, said: str) -> None:
    """Whatever was not zero once counted as true, and true as 1; llama.cpp refuses both."""
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_gguf(gguf_bpe | {f"tokenizer.ggml.{key}": value})


def pieces(rule: PreRule, s: str) -> list[str]:
    split: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(p), "isolated") for p in rule.splits]
    return [piece for piece, _ in pre_tokenizers.Sequence(split).pre_tokenize_str(s)]


def test_pre_rules_split_as_transformers_does() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = set(PRE_RULES) & set(GGUF_PRE_TOKENIZER_SPLITS)
    assert {"llama-bpe", "smaug-bpe", "tekken", "qwen2", "gpt-4o"} <= shared
    for name in shared:
        assert pieces(PRE_RULES[name], TEXT) == pieces(PreRule((GGUF_PRE_TOKENIZER_SPLITS[name],)), TEXT), name


def test_pre_rules_split_as_the_models_own_pre_tokenizers_do() -> None:
    """Pre-tokenizers as in the tokenizer.json of GPT-2, SmolLM2 / StarCoder, and Viking, in byte spelling."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "viking": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), "isolated"), digits, unsplit]
        ),
    }
    for name, pre in own.items():
        expected = [raw_bytes(piece) for piece, _ in pre.pre_tokenize_str(TEXT)]
        assert [piece.encode() for piece in pieces(PRE_RULES[name], TEXT)] == expected, name


@pytest.mark.parametrize("pre", sorted(PRE_RULES))
def test_every_pre_rule_runs_and_loses_nothing(gguf_bpe: dict[str, Any], pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_bpe | {"tokenizer.ggml.pre": pre})
    assert tokenizer.decode(tokenizer.encode(TEXT, bos=False, eos=False)) == TEXT


# The demo model


@pytest.mark.slow
def test_demo_tokenizer_equals_smollm2s_own_pipeline(demo: dict[str, Any]) -> None:
    texts = demo["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split()) for merge in demo["tokenizer.ggml.merges"]]
    reference = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    reference.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer.from_gguf(demo)
    for s in SAMPLES:
        ids = tokenizer.encode(s, bos=False, eos=False)
        assert ids == reference.encode(s, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49152, 1, 2, 2)
    assert tokenizer.stop_tokens == {0, 2} and not tokenizer.add_bos
    assert tokenizer.special_tokens["<|im_start|>"] == 1 and len(tokenizer.special_tokens) == 17
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template
    # Ids from SmolLM2's published tokenizer.
    assert tokenizer.encode("The capital of France is", bos=False, eos=False) == [504, 3575, 282, 4649, 314]


# All kinds


def test_special_tokens_typed_in_text_stay_text(each_kind: Tokenizer) -> None:
    s = " ".join(each_kind.special_tokens)
    ids = each_kind.encode(s, bos=False, eos=False)
    assert not set(ids) & set(each_kind.special_tokens.values()) and each_kind.decode(ids) == s


def test_empty_text_has_no_tokens(each_kind: Tokenizer) -> None:
    assert each_kind.encode("", bos=False, eos=False) == [] and each_kind.decode([]) == ""
    assert each_kind.encode("", bos=True, eos=True) == [each_kind.bos_id, each_kind.eos_id]


def test_lone_surrogates_become_replacement_characters(each_kind: Tokenizer) -> None:
    ids = each_kind.encode("a\ud800b \udcff \ud83d\ude00", bos=False, eos=False)
    assert ids == each_kind.encode("a\ufffdb \ufffd 😀", bos=False, eos=False)


def test_an_id_out_of_range_is_named(each_kind: Tokenizer) -> None:
    for token in (-1, each_kind.n_words, 2**40):
        message = f"{token} .*{each_kind.n_words}"
        with pytest.raises(ValueError, match=message):
            each_kind.decode([each_kind.eos_id, token])
        with pytest.raises(ValueError, match=message):
            each_kind.token_bytes(token)


def test_stream_pieces_join_to_the_decoded_text(each_kind: Tokenizer) -> None:
    for s in SAMPLES:
        ids = each_kind.encode(s, bos=True, eos=False)
        stream = StreamDecoder(each_kind)
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == each_kind.decode(ids)


def test_stream_never_splits_a_character_and_replaces_broken_ones(each_kind: Tokenizer) -> None:
    rng = random.Random(0)
    byte_tokens = [t for t in range(each_kind.n_words) if len(each_kind.token_bytes(t)) == 1]
    for _ in range(200):
        ids = rng.choices(byte_tokens, k=8) + rng.choices(range(each_kind.n_words), k=4)
        rng.shuffle(ids)
        stream = StreamDecoder(each_kind, add_prefix_space=False)
        joined = "".join([stream.push(token) for token in ids]) + stream.flush()
        assert joined == b"".join(map(each_kind.token_bytes, ids)).decode(errors="replace")
    smile = [next(t for t in byte_tokens if each_kind.token_bytes(t) == bytes([b])) for b in "😀".encode()]
    stream = StreamDecoder(each_kind)
    assert [stream.push(token) for token in smile] == ["", "", "", "😀"]
    assert [stream.push(token) for token in smile[:3]] + [stream.flush()] == ["", "", "", "\ufffd"]


def test_stream_keeps_the_first_space_of_a_continuation(spm_path: Path) -> None:
    """Prompt "Hello" + completion " world" was once shown as "Helloworld"."""
    tokenizer = Tokenizer(spm_path)
    ids = tokenizer.encode("world", bos=False, eos=False)
    texts = {}
    for add_prefix_space in (True, False):
        stream = StreamDecoder(tokenizer, add_prefix_space=add_prefix_space)
        texts[add_prefix_space] = "".join(stream.push(token) for token in ids) + stream.flush()
    assert texts == {True: "world", False: " world"}


# Bad input


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n\n \n", "empty"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b'{"model": {"type": "BPE"}}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 499723\n", "git-lfs"),
        (b"\x80\x04\x95\x0b", "pickle"),
        (b"PK\x03\x04rest", "zip"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x00" * 100, "no tokenizer"),
        (b"hello world\n", "no tokenizer"),
        (b"\n\x05abc", "SentencePiece"),
        (b"\nplain text that starts with a blank line", "SentencePiece"),
        (b"AAAA 0\n!!!! 1\n", "base64 id"),
        (b"AAAA 0\nAAEC\n", "base64 id"),
        (b"AAAA 0\nAAEC 2\n", "without a gap"),
        (b"AAAA 0\nAAAA 1\n", "without a gap"),
        (b"AAAA 0\nAAEC 1\n", "256 single bytes"),
    ],
)
def test_what_is_no_tokenizer_ends_in_one_line_that_names_it(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_or_mutated_file_never_ends_in_a_library_error(
    tmp_path: Path, spm_path: Path, tiktoken_path: Path
) -> None:
    """Cut after its last piece, a SentencePiece model loaded with another algorithm, the library's default."""
    path, rng = tmp_path / "tokenizer.model", random.Random(0)
    for source in (spm_path, tiktoken_path):
        data = source.read_bytes()
        for cut in [1, *rng.sample(range(2, len(data) - 1), 60)]:
            path.write_bytes(data[:cut])
            if source is spm_path or b"\n" not in data[cut - 1 : cut + 1]:  # a whole last line is a whole file
                with pytest.raises(ValueError, match=r"tokenizer\.model"):
                    Tokenizer(path)
        for _ in range(100):
            mutated = bytearray(data)
            for _ in range(3):
                mutated[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(mutated)
            try:
                Tokenizer(path).encode("Hello é 😀", bos=False, eos=False)
            except ValueError as error:
                assert str(path) in str(error)


def test_an_absent_file_is_told_with_what_lies_beside_it(tmp_path: Path, spm_path: Path) -> None:
    (tmp_path / "params.json").touch()
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Tokenizer(tmp_path / "absent" / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        Tokenizer(tmp_path)


def test_tokenizer_is_found_beside_the_weights_or_one_folder_up(tmp_path: Path) -> None:
    folder = tmp_path / "7B"
    folder.mkdir()
    (folder / "params.json").touch()
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        find_tokenizer(folder)
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer(folder) == tmp_path / "tokenizer.model"
    (folder / "tokenizer.model").touch()
    assert find_tokenizer(folder) == folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "bert"}, "'bert'.*gpt2, llama"),
        ({"model": None}, "None.*gpt2, llama"),
        ({"pre": "nonesuch"}, "'nonesuch'.*llama-bpe"),
        ({"pre": ["smollm"]}, "supported are"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' twice"),
        ({"tokens": ["a", 3], "token_type": [1, 1]}, "tokens holds 3"),
        ({"tokens": ["a", "\udcff"], "token_type": [1, 1]}, "no valid Unicode"),
        ({"tokens": ["a", "b"], "token_type": [1, 1], "bos_token_id": 0, "eos_token_id": 0}, "merges has"),
        ({"token_type": None}, "token_type is missing"),
        ({"token_type": [1, 1]}, "token_type has 2 entries"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a b c"]}, "'a b c'"),
        ({"merges": ["ab"]}, "'ab'"),
        ({"merges": ["a "]}, "'a '"),
        ({"merges": ["a \u0120\u0120\u0120nope"]}, "nope"),
        ({"bos_token_id": 10**6}, "bos_token_id is missing"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"bos_token_id": None, "add_bos_token": True}, "bos_token_id"),
    ],
)
def test_inconsistent_gguf_metadata_is_named(gguf_bpe: dict[str, Any], change: dict[str, Any], said: str) -> None:
    metadata = gguf_bpe | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_gguf(metadata)


def test_inconsistent_gguf_sentencepiece_is_named(spm_path: Path) -> None:
    metadata = gguf_from_spm(spm_path)
    for key, value, said in (
        ("scores", None, "scores is missing"),
        ("scores", [0.5], "scores has 1 entries"),
        ("scores", [1e39] * len(metadata["tokenizer.ggml.tokens"]), "scores"),
    ):
        with pytest.raises(ValueError, match=said):
            Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{key}": value})


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to hung for ever."""
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is a pipe or a device"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer\.model"):
        Tokenizer(tmp_path)


def test_a_missing_bos_is_an_error_when_asked_for(gguf_bpe: dict[str, Any]) -> None:
    metadata = {key: value for key, value in gguf_bpe.items() if not key.endswith("bos_token_id")}
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "smollm"})
    assert tokenizer.bos_id == -1 and not tokenizer.add_bos
    with pytest.raises(ValueError, match="BOS"):
        tokenizer.encode("a", bos=True, eos=False)


def test_importing_the_tokenizer_imports_no_tokenizer_library() -> None:
    """And opening one kind imports only that kind's library."""
    code = (
        "import sys, types; package = types.ModuleType('llama'); package.__path__ = ['llama']\n"
        "sys.modules['llama'] = package; import llama.tokenizer\n"
        "print(sorted({'sentencepiece', 'tiktoken', 'tokenizers', 'torch', 'numpy', 'google'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, check=True)
    assert out.stdout.strip() == "[]"
