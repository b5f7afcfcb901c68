"""Texts: whole characters, kept spaces, and the same from a stream as from a call."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from llama import Llama
from tests.checkpoints import TINY, chain_state, write_meta
from tests.conftest import SENTENCEPIECE_VOCAB_SIZE, TINY_LLAMA2
from tests.models import BYTE_EOS, build

PROMPTS = ["Hello", "", "Zürich 🦙", " leading", "trailing "]


def chain(*tokens: int) -> dict[int, int]:
    return dict(itertools.pairwise(tokens))


def says(folder: Path, text: str, end: int | None = BYTE_EOS) -> Llama:
    """A model that answers "?" with a text, one byte a token; no byte may come twice."""
    successors = chain(ord("?"), *text.encode(), *([] if end is None else [end]))
    write_meta(folder, state=chain_state(TINY, successors))
    return build(folder, max_seq_len=64)


def streamed(llm: Llama, prompts: list[str], **options: object) -> list[list[str]]:
    """The pieces of each row's text."""
    pieces: list[list[str]] = [[] for _ in prompts]
    for step in llm.stream(llm.encode_prompts(prompts), **options):  # type: ignore[arg-type]
        pieces[step.index].append(step.text)
    return pieces


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "top_p": 1.0, "seed": 4}], ids=str)
@pytest.mark.parametrize("family", ["tiny_folder", "llama2_folder"])
def test_stream_pieces_join_to_the_text_of_a_call(
    request: pytest.FixtureRequest, family: str, options: dict[str, float]
) -> None:
    """Random weights say random bytes: most of them no characters at all."""
    llm = build(request.getfixturevalue(family), max_seq_len=64, max_batch_size=2)
    texts = [result["generation"] for result in llm.text_completion(PROMPTS, max_gen_len=30, **options)]
    pieces = streamed(llm, PROMPTS, max_gen_len=30, add_prefix_space=True, **options)
    assert list(map("".join, pieces)) == texts
    assert len(set(texts)) > 1


def test_characters_of_several_tokens_come_whole(tmp_path: Path) -> None:
    """Streams once showed two replacement characters for every é."""
    llm = says(tmp_path, "né 中🦙.")
    pieces = streamed(llm, ["?"], temperature=0)[0]
    assert [piece for piece in pieces if piece] == ["n", "é", " ", "中", "🦙", "."]
    assert pieces == ["n", "", "é", " ", "", "", "中", "", "", "", "🦙", ".", ""]
    assert llm.text_completion(["?"], temperature=0)[0]["generation"] == "né 中🦙."


@pytest.mark.parametrize("max_gen_len", [1, 2, 3])
def test_a_character_cut_by_the_limit_is_one_replacement_character(tmp_path: Path, max_gen_len: int) -> None:
    llm = says(tmp_path, "🦙")
    pieces = streamed(llm, ["?"], temperature=0, max_gen_len=max_gen_len)[0]
    assert pieces == [""] * max_gen_len + ["\ufffd"]
    assert llm.text_completion(["?"], 0, max_gen_len=max_gen_len)[0]["generation"] == "\ufffd"


def test_rows_do_not_share_an_unfinished_character(tmp_path: Path) -> None:
    """One decoder for the batch once joined the halves of two rows."""
    successors = chain(ord("1"), *"é".encode(), BYTE_EOS) | chain(ord("2"), *"ж".encode(), ord("!"), BYTE_EOS)
    write_meta(tmp_path, state=chain_state(TINY, successors))
    llm = build(tmp_path, max_seq_len=16)
    assert [result["generation"] for result in llm.text_completion(["1", "2", "1"], 0)] == ["é", "ж!", "é"]


def test_control_tokens_in_a_generation_add_no_text(tmp_path: Path) -> None:
    """<|python_tag|> ends nothing, and is no text either."""
    python_tag = 266
    successors = chain(ord("?"), ord("a"), python_tag, ord("b"), BYTE_EOS)
    write_meta(tmp_path, state=chain_state(TINY, successors))
    result = build(tmp_path, max_seq_len=16).text_completion(["?"], 0, logprobs=True)[0]
    assert result["generation"] == "ab"
    assert result["tokens"] == ["a", "<|python_tag|>", "b"]
    assert len(result["logprobs"]) == 3


def test_leading_spaces_are_kept(tmp_path: Path) -> None:
    llm = says(tmp_path, " \tx")
    assert llm.text_completion(["?"], 0)[0]["generation"] == " \tx"


def sentencepiece_says(folder: Path, model: bytes, prompt: str, words: list[str]) -> Llama:
    """A model with a SentencePiece tokenizer that continues a prompt with the pieces given."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.piece_to_id(word) for word in words]
    assert 0 not in pieces, "the trained vocabulary lacks a piece"
    successors = chain(processor.encode(prompt)[-1], *pieces, processor.eos_id())
    write_meta(folder, TINY_LLAMA2, state=chain_state(TINY_LLAMA2, successors))
    (folder / "tokenizer.model").write_bytes(model)
    return build(folder, max_seq_len=32)


def test_a_generation_begins_without_sentencepieces_space_as_metas_and_a_stream_with_it(
    tmp_path: Path, sentencepiece_model: bytes
) -> None:
    """A stream goes on where the prompt ends: "user" and "the" must not be joined to "userthe"."""
    llm = sentencepiece_says(tmp_path, sentencepiece_model, "user", ["▁the", "▁and"])
    assert llm.model.args.vocab_size == SENTENCEPIECE_VOCAB_SIZE
    [result] = llm.text_completion(["user"], 0)
    assert (result["generation"], result["tokens"]) == ("the and", ["the", "and"])
    assert "".join(streamed(llm, ["user"], temperature=0)[0]) == " the and"


def test_an_echoed_text_begins_as_the_prompt_did(tmp_path: Path, sentencepiece_model: bytes) -> None:
    """Its first space is SentencePiece's own, and was never typed."""
    llm = sentencepiece_says(tmp_path, sentencepiece_model, "user", ["▁the", "▁and"])
    assert llm.text_completion(["user"], 0, echo=True)[0]["generation"] == "user the and"


def test_a_chat_answer_begins_without_sentencepieces_space(tmp_path: Path, sentencepiece_model: bytes) -> None:
    llm = sentencepiece_says(tmp_path, sentencepiece_model, "[/INST]", ["▁the", "▁and"])
    answer = llm.chat_completion([[{"role": "user", "content": "hi"}]], 0)[0]
    assert answer["generation"] == {"role": "assistant", "content": "the and"}


@pytest.mark.parametrize("family", ["tiny_folder", "llama2_folder"])
def test_echo_is_the_prompt_and_then_the_generation(request: pytest.FixtureRequest, family: str) -> None:
    llm = build(request.getfixturevalue(family), max_seq_len=64)
    plain = llm.text_completion(PROMPTS, 0, max_gen_len=8)
    echoed = llm.text_completion(PROMPTS, 0, max_gen_len=8, echo=True)
    for prompt, without, with_echo in zip(PROMPTS, plain, echoed, strict=True):
        assert with_echo["generation"].startswith(prompt)
        prompt_len = len(llm.encode_prompts([prompt])[0])
        assert with_echo["tokens"][prompt_len:] == without["tokens"]
