"""Hugging Face's tokenizer files against transformers and the libraries, on small vocabularies made here.

transformers is asked with split_special_tokens=True: a special token typed in a text is text.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llama.tokenizer import StreamDecoder, Tokenizer, find_tokenizer
from tests.unit.hf_folders import KINDS, SPACE, converted, folders, reference, special, write
from tests.unit.test_tokenizer import PARAGRAPHS, SAMPLES, bpe, spm_path, train_spm

__all__ = ["bpe", "folders", "spm_path", "train_spm"]  # fixtures


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def spm_folder(tmp_path: Path, spm_path: Path) -> Callable[..., Path]:
    """A folder with a SentencePiece model and the files given beside it."""

    def make(**files: Any) -> Path:
        (tmp_path / "tokenizer.model").write_bytes(spm_path.read_bytes())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


# Ids and texts


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    """Except where transformers makes a typed special token a control id: Unigram finds it among its pieces."""
    tokenizer, auto = Tokenizer(folder), reference(folder)
    typed = [" ".join(auto.all_special_tokens), "".join(auto.all_special_tokens), "<think>a <tool_call>b special"]
    differ = []
    for s in [*SAMPLES, *typed, "\n".join([*PARAGRAPHS, *typed])]:
        ids = tokenizer.encode(s, bos=False, eos=False)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        if ids != auto(s, add_special_tokens=False).input_ids:
            differ.append(s)
        assert tokenizer.decode(ids) == auto.decode(ids), s
    assert not differ or (folder.name == "unigram" and all("<s>" in s for s in differ))


def test_any_ids_decode_as_in_transformers(folder: Path) -> None:
    """Broken UTF-8 aside: there the library has U+FFFD for each byte."""
    tokenizer, auto = Tokenizer(folder), reference(folder)
    rng, whole = random.Random(0), []
    for token in range(tokenizer.n_words):
        try:
            whole += [token] if tokenizer.token_bytes(token).decode() else []
        except UnicodeDecodeError:
            continue
    for _ in range(300):
        ids = rng.choices(whole, k=8)
        assert tokenizer.decode(ids) == auto.decode(ids), ids
    for token in range(tokenizer.n_words):
        expected = auto.decode([token])
        if "\ufffd" not in expected:
            assert tokenizer.decode([token]) == expected, token


def test_streamed_pieces_join_to_the_decoded_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for s in SAMPLES:
        ids = tokenizer.encode(s, bos=False, eos=False)
        stream = StreamDecoder(tokenizer)
        text = "".join([stream.push(token) for token in ids]) + stream.flush()
        assert text == tokenizer.decode(ids)
        if folder.name not in ("unigram", "smollm"):  # those lack characters or bytes
            expected = s if folder.name in ("llama3", "saved") else s.replace(SPACE, " ")
            # Metaspace puts no space before one, and its decoder drops it all the same.
            assert text == expected.removeprefix(" " if folder.name == "llama2_new" else "")


def test_a_stream_is_never_behind_the_librarys_decode_stream(folder: Path) -> None:
    """The library's holds back a whole token that ends inside a character, and loses a character that never ends."""
    tokenizer, library = Tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for s in SAMPLES:
        ids = tokenizer.encode(s, bos=False, eos=False)
        stream, reference = StreamDecoder(tokenizer), decoders.DecodeStream(skip_special_tokens=False)
        text = expected = ""
        for token in ids:
            text += stream.push(token)
            expected += reference.step(library, token) or ""
            assert text.startswith(expected), s
        assert text + stream.flush() == expected or tokenizer.decode(ids).endswith("\ufffd")


def test_ids_of_named_tokens_and_sizes_are_those_of_transformers(folder: Path) -> None:
    tokenizer, auto = Tokenizer(folder), reference(folder)
    assert tokenizer.n_words == len(auto)
    for name in ("bos", "eos", "pad"):
        expected = getattr(auto, f"{name}_token_id")
        assert getattr(tokenizer, f"{name}_id") == (-1 if expected is None else expected)
    assert tokenizer.add_bos == (auto("x").input_ids[:1] == [auto.bos_token_id])
    assert tokenizer.add_bos == (folder.name in ("llama3", "llama2", "llama2_new", "code_llama", "saved"))
    assert tokenizer.eos_id in tokenizer.stop_tokens
    assert {"<unk>", "<|endoftext|>", *tokenizer.special_tokens} >= set(auto.all_special_tokens)


def test_a_special_token_that_merges_lead_to_stays_text(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    """Also by ignore_merges, where the whole piece is one: transformers gives the control ids."""
    model = json.loads(bpe.to_str())["model"]
    vocab, merges = dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]
    for text in ("</", "</s", "</s>", "stop"):
        vocab.setdefault(text, len(vocab))
    merges += [("<", "/"), ("</", "s"), ("</s", ">")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special("</s>", "stop"))
    folder = write(tmp_path, tokenizer, {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    mine, auto = Tokenizer(folder), reference(folder)
    for s in ("</s>", "stop", "a</s>b</s>", "</s> stop"):
        ids = mine.encode(s, bos=False, eos=False)
        assert not {vocab["</s>"], vocab["stop"]} & set(ids) and mine.decode(ids) == s
    assert auto("</s>", add_special_tokens=False).input_ids == [vocab["</s>"]] == [mine.eos_id]


@pytest.mark.parametrize("kind", ["llama3", "smollm", "llama2"])
def test_bytes_of_tokens_are_exact(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer(folders[kind])
    for s in ("😀", "中", "é", "\x00"):
        ids = tokenizer.encode(s, bos=False, eos=False)
        joined = b"".join(tokenizer.token_bytes(token, strip_prefix_space=i == 0) for i, token in enumerate(ids))
        assert joined == s.encode() or (kind == "smollm" and s.encode().startswith(joined))
    if kind == "llama2":
        vocab = json.loads((folders[kind] / "tokenizer.json").read_text())["model"]["vocab"]
        assert all(tokenizer.token_bytes(vocab[f"<0x{byte:02X}>"]) == bytes([byte]) for byte in range(256))


def test_a_token_known_as_unknown_is_no_control_token(tmp_path: Path) -> None:
    """Text that no piece fits becomes it, unless it is an end token too: then it is dropped."""
    for unknown, expected in (("<unk>", [1, 0, 2]), ("<eos>", [1, 2])):
        vocab = {unknown: 0, "a": 1, "b": 2}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unknown))
        tokenizer.add_special_tokens(special(unknown))
        config = {"unk_token": unknown, "eos_token": "<eos>"}
        mine = Tokenizer(write(tmp_path, tokenizer, config))
        assert mine.encode("a?b", bos=False, eos=False) == expected
        assert mine.encode(unknown, bos=False, eos=False) == [0] * len(unknown) * (unknown == "<unk>")
        assert mine.special_tokens == ({} if unknown == "<unk>" else {"<eos>": 0})


def test_an_added_token_is_the_text_it_spells(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    """The library reads "naïve" in the byte alphabet too, and decodes it to a broken character."""
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("naïve", normalized=False)])
    mine = Tokenizer(write(tmp_path, tokenizer) / "tokenizer.json")
    ids = mine.encode("so naïve!", bos=False, eos=False)
    assert ids == tokenizer.encode("so naïve!").ids and mine.decode(ids) == "so naïve!"


# The implicit space


def expected_continuation(sp: sentencepiece.SentencePieceProcessor, s: str) -> list[int]:
    """Meta's Code Llama: encode "☺" before the text and take away its ids, here several for want of the piece."""
    return sp.encode("☺" + s)[len(sp.encode("☺")) :]


@pytest.mark.parametrize("kind", ["spm", "llama2", "llama2_new", "code_llama", "yi", "llama3", "smollm"])
def test_a_continuation_has_no_implicit_space(folders: dict[str, Path], spm_path: Path, kind: str) -> None:
    tokenizer = Tokenizer(spm_path if kind == "spm" else folders[kind])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    for s in [*SAMPLES, "def f():\n    return", "    return 1\n"]:
        ids = tokenizer.encode(s, bos=False, eos=False, add_prefix_space=False)
        if kind in ("llama3", "smollm"):
            assert ids == tokenizer.encode(s, bos=False, eos=False)
        else:
            assert ids == expected_continuation(sp, s), s
    assert tokenizer.encode("a", bos=True, eos=True, add_prefix_space=False)[1:-1] == tokenizer.encode(
        "a", bos=False, eos=False, add_prefix_space=False
    )


def test_the_legacy_pipeline_encodes_as_sentencepiece(folders: dict[str, Path], spm_path: Path) -> None:
    """Also a text that begins with a space: Metaspace, which transformers 5 makes of it, puts none before that."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    old, new = Tokenizer(folders["llama2"]), Tokenizer(folders["llama2_new"])
    for s in SAMPLES:
        assert old.encode(s, bos=False, eos=False) == sp.encode(s)
        if not s.startswith((" ", SPACE)):
            assert new.encode(s, bos=False, eos=False) == sp.encode(s)
    assert new.encode(" a", bos=False, eos=False) == sp.encode("a")
    assert (old.prefix_space_after_special, new.prefix_space_after_special) == (True, False)


@pytest.mark.parametrize("prefix", [True, False])
def test_add_prefix_space_is_kept_as_by_transformers_own_class(tmp_path: Path, spm_path: Path, prefix: bool) -> None:
    """In a file saved by it, and in one that was changed in tokenizer_config.json alone."""
    from transformers import LlamaTokenizer

    vocab, merges = converted(spm_path)
    for in_file in (prefix, True):
        LlamaTokenizer(vocab=vocab, merges=merges, add_prefix_space=in_file).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": prefix}))
        tokenizer, auto = Tokenizer(tmp_path), reference(tmp_path)
        for s in SAMPLES:
            ids = tokenizer.encode(s, bos=False, eos=False)
            assert ids == auto(s, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == auto.decode(ids)


@pytest.mark.parametrize(
    ("scheme", "prefix_space_after_special", "text"),
    [("first", False, b" a"), ("always", True, b" a"), ("never", False, b"a"), (None, True, b" a")],
)
def test_metaspace_puts_a_space_as_its_scheme_says(
    tmp_path: Path, spm_path: Path, scheme: str | None, prefix_space_after_special: bool, text: bytes
) -> None:
    """Files from before prepend_scheme have add_prefix_space."""
    vocab, merges = converted(spm_path)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    content = json.loads(tokenizer.to_str())
    old = {"type": "Metaspace", "replacement": SPACE}
    old |= {"add_prefix_space": True} if scheme is None else {"prepend_scheme": scheme, "split": False}
    content |= {"pre_tokenizer": old, "decoder": old}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    mine, library = Tokenizer(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(content))
    for s in ("a", "a b", "a<think>a", " a", "    a", "<think>a"):
        ids = mine.encode(s, bos=False, eos=False)
        assert ids == library.encode(s).ids and mine.decode(ids) == library.decode(ids)
    ids = mine.encode("a", bos=False, eos=False)
    assert (
        mine.prefix_space_after_special == prefix_space_after_special
        and b"".join(mine.token_bytes(token) for token in ids) == text
    )


def test_byte_level_can_put_a_space_as_well(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    mine = Tokenizer(write(tmp_path, tokenizer))
    for s in ("a b", " a", "1"):
        ids = mine.encode(s, bos=False, eos=False)
        assert ids == tokenizer.encode(s).ids and mine.decode(ids) == tokenizer.decode(ids)
        assert mine.decode(mine.encode(s, bos=False, eos=False, add_prefix_space=False)) == s
    assert mine.prefix_space_after_special


# tokenizer.model in a Hugging Face folder


def test_a_sentencepiece_folder_keeps_sentencepieces_ids(spm_folder: Callable[..., Path], spm_path: Path) -> None:
    folder = spm_folder(
        tokenizer_config={"add_bos_token": True, "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        special_tokens_map={"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<|im_start|>"]},
        added_tokens={"<pad>": 520, "<|im_start|>": 521, "<|im_end|>": 522, "<think>": 523, "<s>": 1},
    )
    tokenizer, sp = Tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (524, 1, 522, 520)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "<pad>": 520, "<|im_start|>": 521, "<|im_end|>": 522}
    assert tokenizer.stop_tokens == {2, 522} and tokenizer.add_bos and tokenizer.prefix_space_after_special
    for s in [*SAMPLES, "<pad> <|im_start|> <|im_end|> <unk>"]:
        ids = sp.encode(s)
        assert tokenizer.encode(s, bos=False, eos=False) == ids
        assert tokenizer.decode(ids) == sp.decode(ids) == tokenizer.decode([520, *ids, 522])
    thought = tokenizer.encode("a <think>b", bos=False, eos=False)
    assert thought == [*sp.encode("a "), 523, *sp.encode("b")]
    assert tokenizer.decode(thought) == "a <think> b"  # with the space that legacy puts there


@pytest.mark.parametrize(
    ("config", "first", "second"),
    [({}, True, True), ({"legacy": True}, True, True), ({"legacy": False}, True, False)]
    + [({"legacy": False, "add_prefix_space": False}, False, False)],
)
def test_a_sentencepiece_folder_puts_the_implicit_space_as_it_says(
    spm_folder: Callable[..., Path], spm_path: Path, config: dict[str, Any], first: bool, second: bool
) -> None:
    folder = spm_folder(tokenizer_config=config | {"add_bos_token": False}, added_tokens={"<think>": 520})
    tokenizer, sp = Tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    encode = {True: sp.encode, False: lambda s: expected_continuation(sp, s)}
    assert tokenizer.encode("x y<think>z", bos=False, eos=False) == [*encode[first]("x y"), 520, *encode[second]("z")]
    assert tokenizer.prefix_space_after_special == second and not tokenizer.add_bos
    for s in ("x y", " x", "  x"):
        assert tokenizer.decode(tokenizer.encode(s, bos=False, eos=False)) == s


def test_a_piece_flagged_special_is_never_typed(spm_folder: Callable[..., Path], spm_path: Path) -> None:
    """Also one under another name than the piece of the same id."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    flagged, renamed = sp.encode("don't")[1], sp.encode("Hello")[1]
    decoder = {
        "0": {"content": "<unk>", "special": True},
        str(flagged): {"content": sp.id_to_piece(flagged), "special": True},
        str(renamed): {"content": "<|x|>", "special": True},
    }
    tokenizer = Tokenizer(spm_folder(tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, sp.id_to_piece(flagged): flagged, "<|x|>": renamed}
    for s in [*SAMPLES, "<|x|>", "don't", "Hello"]:
        ids = tokenizer.encode(s, bos=False, eos=False)
        assert not {flagged, renamed} & set(ids) and tokenizer.decode(ids) == s.replace(SPACE, " ")


def test_a_control_piece_that_the_config_does_not_flag_special_is_never_typed(spm_folder: Callable[..., Path]) -> None:
    """A config that listed <s> without its flag once let typed text become BOS."""
    decoder = {"1": {"content": "<s>", "special": False}, "520": {"content": "<think>", "special": False}}
    tokenizer = Tokenizer(spm_folder(tokenizer_config={"added_tokens_decoder": decoder}))
    ids = tokenizer.encode("a <s><think>", bos=False, eos=False)
    assert tokenizer.special_tokens["<s>"] == 1 and 1 not in ids and ids[-1] == 520


def test_a_sentencepiece_folder_has_transformers_ids(spm_folder: Callable[..., Path]) -> None:
    """Where the text begins with no space, which transformers 5 treats in another way than SentencePiece."""
    folder = spm_folder(
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<pad>"},
        added_tokens={"<pad>": 520, "<think>": 521},
        config={"model_type": "llama"},
    )
    tokenizer, auto = Tokenizer(folder), reference(folder)
    assert tokenizer.n_words == len(auto) and tokenizer.pad_id == auto.pad_token_id
    for s in [*SAMPLES, "<pad>a<think>b <think> c"]:
        if not s.startswith((" ", SPACE)):
            assert tokenizer.encode(s, bos=False, eos=False) == auto(s, add_special_tokens=False).input_ids, s


def test_added_tokens_take_the_spaces_that_they_say(spm_folder: Callable[..., Path], spm_path: Path) -> None:
    token = {"special": False, "normalized": False}
    decoder = {
        "520": token | {"content": "<l>", "lstrip": True},
        "521": token | {"content": "<r>", "rstrip": True},
        "522": token | {"content": "<rr>"},
        "523": token | {"content": "word", "single_word": True},
        "524": token | {"content": "<rr>!"},
    }
    tokenizer = Tokenizer(spm_folder(tokenizer_config={"added_tokens_decoder": decoder}))
    sp = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    ids = tokenizer.encode("a  <l> b <r>  c<rr> words word<rr>!", bos=False, eos=False)
    parts = [sp.encode("a"), [520], sp.encode(" b "), [521], sp.encode("c"), [522], sp.encode(" words "), [523, 524]]
    assert ids == [token for part in parts for token in part]


# Names, stops, templates, places


def test_code_llamas_infilling_tokens_are_control_tokens(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["code_llama"])
    names = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
    ids = [tokenizer.special_tokens[name] for name in names]
    assert ids[3] in tokenizer.stop_tokens and len(set(ids)) == 4
    assert not set(ids) & set(tokenizer.encode(" <PRE> a <SUF>b <MID>▁<EOT>", bos=False, eos=False))


def test_a_known_control_token_not_flagged_special_is_a_control_token(
    tmp_path: Path, bpe: tokenizers.Tokenizer
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer.add_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>"), AddedToken("<think>")])
    mine = Tokenizer(write(tmp_path, tokenizer))
    end, think = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<think>")
    assert set(mine.special_tokens) == {"<|im_start|>", "<|im_end|>"} and mine.stop_tokens == {end}
    assert end not in mine.encode("a<|im_end|>", bos=False, eos=False)
    assert mine.encode("a<think>", bos=False, eos=False)[-1] == think


@pytest.mark.parametrize("where", ["added_tokens_decoder", "additional_special_tokens"])
def test_a_token_that_only_the_config_calls_special_is_a_control_token(
    tmp_path: Path, bpe: tokenizers.Tokenizer, where: str
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer.add_tokens([AddedToken("<x>", normalized=False)])
    number = tokenizer.token_to_id("<x>")
    value = {str(number): {"content": "<x>", "special": True}} if where == "added_tokens_decoder" else ["<x>"]
    mine = Tokenizer(write(tmp_path, tokenizer, {where: value}))
    assert mine.special_tokens == {"<x>": number}
    assert number not in mine.encode("a<x>", bos=False, eos=False)


def test_stop_tokens_can_be_added(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["llama3"])
    more = tokenizer.with_stop_tokens([5, 7], tokenizer.n_words)
    assert more.stop_tokens == tokenizer.stop_tokens | {5, 7} and 5 not in tokenizer.stop_tokens
    assert more.encode("a b", bos=True, eos=False) == tokenizer.encode("a b", bos=True, eos=False)


def test_the_file_alone_has_its_conventional_names(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, names in (("llama3", ("<|begin_of_text|>", "<|end_of_text|>")), ("llama2", ("<s>", "</s>"))):
        path = tmp_path / "anything.json"
        path.write_bytes((folders[kind] / "tokenizer.json").read_bytes())
        tokenizer = Tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(tokenizer.special_tokens[name] for name in names)
        assert tokenizer.add_bos and tokenizer.pad_id == -1 and tokenizer.chat_template is None


def test_tokens_that_only_the_files_beside_it_have_are_added(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["llama2"] / "tokenizer.json").read_bytes())
    n_words = Tokenizer(tmp_path).n_words
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|x|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<y>": n_words + 1, "<|x|>": n_words}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer, auto = Tokenizer(tmp_path), reference(tmp_path)
    assert tokenizer.n_words == n_words + 2 == len(auto) and tokenizer.special_tokens["<|x|>"] == n_words
    ids = tokenizer.encode("a <|x|> <y>", bos=False, eos=False)
    assert ids == auto("a <|x|> <y>", add_special_tokens=False).input_ids and ids[-1] == n_words + 1


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}])
def test_the_older_map_of_special_tokens_has_the_last_word(
    folders: dict[str, Path], tmp_path: Path, decoder: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | decoder))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert Tokenizer(tmp_path).eos_id == reference(tmp_path).eos_token_id


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": "{{ a }}"}}, "{{ a }}"),
        (
            {"tokenizer_config.json": {"chat_template": {"default": "{{ a }}", "tool_use": "b"}}},
            '{% if tools %}{{ "" }}b{{ "" }}{% else %}{{ "" }}{{ a }}{{ "" }}{% endif %}',
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": n, "template": n} for n in ("rag", "default")]}},
            "default",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "rag"}]}}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "é\n"}, "é\n"),
        ({"chat_template.json": {"chat_template": "a"}}, "a"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "spm"])
def test_the_chat_template_is_found(
    tmp_path: Path, folders: dict[str, Path], spm_path: Path, kind: str, files: dict[str, Any], template: str | None
) -> None:
    source = spm_path if kind == "spm" else folders["llama3"] / "tokenizer.json"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert Tokenizer(tmp_path).chat_template == template


def test_a_saved_template_is_the_default_one(folders: dict[str, Path]) -> None:
    assert Tokenizer(folders["saved"]).chat_template == "{{ 1 }}"
    assert Tokenizer(folders["smollm"]).chat_template == "{{ messages }}"


def test_a_hugging_face_folder_prefers_tokenizer_json(tmp_path: Path) -> None:
    folder = tmp_path / "7B"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).touch()
    assert find_tokenizer(folder) == folder / "tokenizer.model"
    (folder / "config.json").touch()
    assert find_tokenizer(folder) == folder / "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    assert find_tokenizer(folder) == folder / "tokenizer.model"
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        find_tokenizer(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").touch()
    assert find_tokenizer(folder) == folder / "tokenizer.json"
