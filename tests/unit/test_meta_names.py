"""Names that scripts for Meta's code import and call are there, and give what Meta's code gives."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llama import Llama, Transformer
from llama import generation as meta_generation
from llama import tokenizer as meta_tokenizer
from llama.distributed.job import mute_later_ranks
from llama.model import precompute_freqs_cis
from llama.tokenizer import Tokenizer
from tests.conftest import TEXTS

# Ids of the byte tokenizer: 256 bytes, and then Llama 3's special tokens in their order.
BOS, EOS, START, END, EOT = 256, 257, 262, 263, 265
INFILLING = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]


@pytest.fixture(scope="module")
def llama3(tiny_folder: Path) -> Tokenizer:
    return Tokenizer(tiny_folder / "tokenizer.model")


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """A tokenizer of Code Llama's kind, and the library's own of the same file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "☺"], normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("code") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_llama_3s_chat_format_encodes_headers_messages_and_dialogs(llama3: Tokenizer) -> None:
    """Written down from Meta's test_tokenizer.py, with bytes in place of its words."""
    chat = meta_tokenizer.ChatFormat(llama3)
    user = meta_tokenizer.Message(role="user", content=" Hi ")
    system = meta_tokenizer.Message(role="system", content="Be brief.")
    header = [START, *b"user", END, *b"\n\n"]
    assert chat.encode_header(user) == header
    assert chat.encode_message(user) == [*header, *b"Hi", EOT]
    dialog: meta_tokenizer.Dialog = [system, user]
    before = [BOS, START, *b"system", END, *b"\n\n", *b"Be brief.", EOT]
    after = [START, *b"assistant", END, *b"\n\n"]
    assert chat.encode_dialog_prompt(dialog) == [*before, *header, *b"Hi", EOT, *after]
    with pytest.raises(AttributeError, match="has no attribute 'Dialogs'"):
        _ = meta_tokenizer.Dialogs


def test_special_tokens_in_a_text_are_allowed_or_forbidden_as_by_tiktoken(llama3: Tokenizer) -> None:
    text = "a<|eot_id|>b<|end_of_text|>"
    assert llama3.encode(text, bos=True, eos=False) == [BOS, *text.encode()]
    assert llama3.encode(text, bos=False, eos=True, allowed_special="all") == [*b"a", EOT, *b"b", EOS, EOS]
    assert llama3.encode(text, bos=False, eos=False, allowed_special={"<|eot_id|>"}) == [
        *[*b"a", EOT],
        *b"b<|end_of_text|>",
    ]
    library = llama3.model
    for allowed, disallowed in (("all", ()), ({"<|eot_id|>"}, ()), (set(), ()), ("all", "all"), (set(), {"<|x|>"})):
        options: dict[str, Any] = {"allowed_special": allowed, "disallowed_special": disallowed}
        assert llama3.encode(text, False, False, **options) == library.encode(text, **options)
    for forbidden in ("all", ["<|end_of_text|>"]):
        with pytest.raises(ValueError, match=r"control token <\|end_of_text\|>, which disallowed_special forbids"):
            llama3.encode(text, False, False, allowed_special={"<|eot_id|>"}, disallowed_special=forbidden)


def test_tokens_decode_one_by_one_and_pieces_are_sentencepieces(
    code_llama: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], llama3: Tokenizer
) -> None:
    ours, library = code_llama
    ids = library.encode("Hello world, user")
    assert [ours.decode(token) for token in ids] == [library.decode(token) for token in ids]
    assert [ours.token_piece(token) for token in ids] == library.encode("Hello world, user", out_type=str)
    assert ours.sp_model.vocab_size() == ours.n_words and ours.sp_model.encode("Hello world, user") == ids
    assert llama3.decode(EOT) == "<|eot_id|>" and llama3.model.n_vocab == llama3.n_words
    with pytest.raises(AttributeError, match="sp_model is for SentencePiece tokenizers alone"):
        llama3.token_piece(5)
    assert not hasattr(ours, "model")


def test_code_llamas_infilling_has_its_ids_and_keeps_spaces(
    code_llama: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], llama3: Tokenizer
) -> None:
    ours, library = code_llama
    ids = [library.piece_to_id(piece) for piece in INFILLING]
    assert [ours.prefix_id, ours.suffix_id, ours.middle_id, ours.eot_id] == ids
    assert (llama3.prefix_id, llama3.suffix_id, llama3.middle_id, llama3.step_id) == (None,) * 4
    assert llama3.eot_id == EOT
    for text in ("Hello world", " user", "", "\n  the"):
        tokens = ours.encode_infilling(text)
        assert tokens == library.encode("☺" + text)[2:]
        assert ours.decode_infilling(tokens) == text
        whole = library.encode(text)
        assert ours.decode_infilling(whole) == library.decode([library.piece_to_id("☺"), *whole])[1:]
    prompt = meta_generation.infilling_prompt_tokens(ours, "Hello", " world", suffix_first=True)
    assert prompt == [1, ids[0], ids[1], *library.encode("☺ world")[2:], ids[2], *library.encode("Hello")]


def test_constants_of_llama_2_are_metas() -> None:
    tags = meta_generation
    assert (
        *("[INST]", "[/INST]"),
        *("<<SYS>>\n", "\n<</SYS>>\n\n"),
    ) == (tags.B_INST, tags.E_INST, tags.B_SYS, tags.E_SYS)
    assert tags.SPECIAL_TAGS == ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert tags.UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."


def test_rotations_are_metas() -> None:
    table = precompute_freqs_cis(6, 40, 500.0)
    assert (table.shape, table.dtype) == ((40, 3), torch.complex64)
    for position in (0, 1, 39):
        for pair in range(3):
            angle = position * 500.0 ** (-2 * pair / 6)
            wanted = complex(math.cos(angle), math.sin(angle))
            assert table[position, pair].item() == pytest.approx(wanted, abs=1e-5)
    assert precompute_freqs_cis(4, 3)[2, 1].item() == pytest.approx(complex(math.cos(0.02), math.sin(0.02)), abs=1e-6)


def test_a_model_and_its_parts_have_metas_names(llama: Llama) -> None:
    assert isinstance(llama.model, Transformer)
    assert (llama.model.params.max_seq_len, llama.model.params.dim) == (64, llama.model.args.dim)
    dialog: meta_tokenizer.Dialog = [meta_tokenizer.Message(role="user", content="Hi")]
    assert llama.formatter.encode_dialog_prompt(dialog) == llama.encode_dialogs([dialog])[0]


def test_a_build_mutes_a_hosts_later_ranks_alone_and_only_where_it_may(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts in which every rank prints showed each result once a rank; Meta's build closes stdout of the others."""
    for rank, size, heard in (("0", "1", True), ("0", "2", True), ("1", "2", False), ("3", "4", False)):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size)):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
            mute_later_ranks()
            print("result", flush=True)
            print("a word", file=sys.stderr)
        assert capsys.readouterr() == ("result\n" if heard else "", "a word\n")


def test_a_build_says_nothing_to_who_set_up_no_logging(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Meta's build prints "Loaded in ... seconds" to stdout, which is for results here; the log has it."""
    log = logging.getLogger("llama")
    assert log.level == logging.NOTSET and not log.handlers and not log.isEnabledFor(logging.INFO)
    before = sys.stdout
    Llama.build(str(tiny_folder), str(tiny_folder / "tokenizer.model"), 64, 4)
    assert capfd.readouterr() == ("", "") and sys.stdout is before
    assert "LOCAL_RANK" not in os.environ
