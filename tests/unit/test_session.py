"""A chat that is started again goes on as if it had never ended, and no other file is taken for its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.cache import PAGE_SIZE
from llama.cli.chat_session import Session
from llama.cli.conversation import Conversation
from llama.engine.options import BuildOptions
from llama.engine.session_file import StoredPages, write_pages
from llama.sampling import SamplingParams
from tests.checkpoints import TINY, random_state, write_meta
from tests.models import random_tokens

MESSAGES = ["What is this, and why is it so?", "And that?", "Go on."]
PARAMS = SamplingParams(temperature=0, max_gen_len=24)


def options(folder: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(folder, **{"device": "cpu", "dtype": "float32", "max_seq_len": 512, **changes})


def start(path: Path, folder: Path, **changes: Any) -> tuple[Session, Conversation]:
    """A chat with a session, by a model of its own, as `llama chat` begins."""
    session = Session.open(path, options(folder, **changes))
    chat = Conversation(Llama.from_options(options(folder, **changes)), PARAMS)
    session.restore(chat)
    return session, chat


def answer(chat: Conversation, text: str) -> tuple[str, list[int]]:
    chat.ask(text)
    return chat.answer(), chat.tokens


@pytest.fixture(scope="module")
def whole(tiny_folder: Path) -> list[tuple[str, list[int]]]:
    """The answers, and the tokens up to each, of a chat that was not ended."""
    chat = Conversation(Llama.from_options(options(tiny_folder)), PARAMS)
    return [answer(chat, text) for text in MESSAGES]


@pytest.fixture
def ended(tiny_folder: Path, tmp_path: Path) -> Path:
    """The session of a chat that ended after two messages."""
    session, chat = start(tmp_path / "talk", tiny_folder)
    for text in MESSAGES[:2]:
        answer(chat, text)
        session.save(chat)
    session.save(chat, is_last=True)
    return tmp_path / "talk"


def test_a_restart_reads_no_token_but_the_new_ones(
    ended: Path, tiny_folder: Path, whole: list[tuple[str, list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "llama"):
        _, chat = start(ended, tiny_folder)
    assert f"session {ended}: 4 messages, {len(chat.tokens)} tokens of its cache, " in caplog.text
    assert f" MB in {ended}.rank0" in caplog.text
    unbroken = Conversation(Llama.from_options(options(tiny_folder)), PARAMS)
    for text in MESSAGES[:2]:
        answer(unbroken, text)
    before = dataclasses.replace(unbroken.llm.metrics)
    assert answer(unbroken, MESSAGES[2]) == answer(chat, MESSAGES[2]) == whole[2]
    metrics, now = chat.llm.metrics, unbroken.llm.metrics
    assert metrics.prompt_tokens == now.prompt_tokens - before.prompt_tokens
    assert metrics.reused_tokens == now.reused_tokens - before.reused_tokens > len(whole[0][1])
    assert chat.messages == unbroken.messages


def test_pages_come_back_bit_for_bit(ended: Path, tiny_folder: Path) -> None:
    unbroken = Conversation(Llama.from_options(options(tiny_folder)), PARAMS)
    for text in MESSAGES[:2]:
        answer(unbroken, text)
    _, chat = start(ended, tiny_folder)
    keys = []
    for llm in (unbroken.llm, chat.llm):
        match = llm.engine.scheduler.pool.find(chat.tokens)
        assert match.n_tokens == len(chat.tokens) and match.partial is not None
        cache = llm.engine.scheduler.caches[0]
        for half in (cache.keys, cache.values):
            keys.append(half[:, [*match.pages, match.partial]].flatten(1, 2)[:, : match.n_tokens])
    assert torch.equal(keys[0], keys[2]) and torch.equal(keys[1], keys[3])
    assert keys[0].shape[1] % PAGE_SIZE and keys[0].abs().min(dim=-1).values.max() > 0
    pool = chat.llm.engine.scheduler.pool
    assert pool.n_held == 0 and not chat.llm.engine.unfinished


def test_after_a_kill_the_messages_are_there_and_the_pages_of_before(
    tiny_folder: Path, tmp_path: Path, whole: list[tuple[str, list[int]]]
) -> None:
    session, chat = start(tmp_path / "talk", tiny_folder)
    for text in MESSAGES[:2]:
        answer(chat, text)
        session.save(chat)
    shutil.copy(tmp_path / "talk.rank0", tmp_path / "old")
    session.save(chat, is_last=True)
    (tmp_path / "old").rename(tmp_path / "talk.rank0")
    _, again = start(tmp_path / "talk", tiny_folder)
    assert answer(again, MESSAGES[2]) == whole[2]
    assert again.llm.metrics.reused_tokens >= len(whole[0][1]) - 1


def test_a_smaller_context_takes_as_much_as_it_has(ended: Path, tiny_folder: Path) -> None:
    chat = start(ended, tiny_folder, max_seq_len=200)[1]
    answer(chat, "x")
    assert chat.n_forgotten == 0 and chat.llm.metrics.reused_tokens > 100
    chat = start(ended, tiny_folder, max_seq_len=100)[1]
    assert answer(chat, "x")[0] and chat.n_forgotten == 4


def test_a_session_without_its_pages_is_read_again(
    ended: Path, tiny_folder: Path, whole: list[tuple[str, list[int]]]
) -> None:
    (ended.parent / "talk.rank0").unlink()
    _, chat = start(ended, tiny_folder)
    assert answer(chat, MESSAGES[2]) == whole[2] and chat.llm.metrics.reused_tokens == 0


def test_pages_of_other_ranks_are_not_taken(ended: Path, tiny_folder: Path) -> None:
    """Heads are split otherwise there, though a rank may have as many."""
    pages = StoredPages.open(ended.parent / "talk.rank0")
    engine = Llama.from_options(options(tiny_folder)).engine
    assert pages.fits(engine) and not dataclasses.replace(pages, part=[0, 2]).fits(engine)


def damaged(data: bytes) -> list[bytes]:
    """A file cut off at its ends and parts, longer, and with one bit changed."""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return [b"", data[:1], data[: len(data) // 2], data[:-1], data + b"x", bytes(flipped), b"notes of mine\n"]


def test_torn_pages_are_refused_and_not_overwritten(ended: Path, tiny_folder: Path) -> None:
    file = ended.parent / "talk.rank0"
    for data in damaged(file.read_bytes()):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"talk\.rank0 (is torn .*: remove it|holds no pages of a cache: give)"):
            Session.open(ended, options(tiny_folder))
        assert file.read_bytes() == data


def test_a_torn_or_foreign_session_is_refused_and_not_overwritten(ended: Path, tiny_folder: Path) -> None:
    good = json.loads(ended.read_bytes())
    cut = ended.read_bytes()[:-20]
    for data in (b"", cut, b"notes", b"[]", b'{"messages": []}', json.dumps(good | {"messages": [1]}).encode()):
        ended.write_bytes(data)
        with pytest.raises(ValueError, match="is torn, or no session of llama chat: it was not changed; name another"):
            Session.open(ended, options(tiny_folder))
        assert ended.read_bytes() == data
    with pytest.raises(ValueError, match="is torn, or no session"):
        Session.open(ended.parent, options(tiny_folder))
    with pytest.raises(FileNotFoundError, match="lies in no folder: make "):
        Session.open(ended.parent / "nowhere" / "talk", options(tiny_folder))


def test_another_model_is_told_by_what_differs(ended: Path, tiny_folder: Path, tmp_path: Path) -> None:
    before = ended.read_bytes()

    def refused(folder: Path, what: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=rf"is of another model \({what}.*: name another file, or the model that"):
            Session.open(ended, options(folder, **changes))

    other, longer = tmp_path / "other", tmp_path / "longer"
    state = random_state(TINY)
    state["layers.1.attention.wq.weight"] += 1e-3
    write_meta(other, state=state)
    refused(other, "weights: ")
    write_meta(longer, dataclasses.replace(TINY, rope_theta=1e6))
    refused(longer, r"architecture: rope_theta=10000.0, and here rope_theta=1000000.0")
    refused(tiny_folder, "dtype: float32, and here bfloat16", dtype="bfloat16")
    refused(tiny_folder, "quantize: the default, and here int8", quantize="int8")
    assert ended.read_bytes() == before


def test_a_text_longer_than_what_is_usually_kept_comes_back_whole(tiny_folder: Path, tmp_path: Path) -> None:
    text = random_tokens(5000, vocab_size=256).tolist()
    one, other = (Llama.from_options(options(tiny_folder, max_seq_len=8192)) for _ in range(2))
    one.generate([text], 1, 0)
    assert write_pages(tmp_path / "pages", one.engine, text, "x")[0] == 5000
    assert StoredPages.open(tmp_path / "pages").restore(other.engine) == 5000
    assert other.engine.scheduler.pool.find(text).n_tokens == 5000


def test_an_engine_that_has_computed_nothing_writes_nothing(llama: Llama, tmp_path: Path) -> None:
    assert write_pages(tmp_path / "pages", llama.engine, [1, 2, 3], "x") == (0, 0)
    assert not list(tmp_path.iterdir())


def test_a_second_chat_on_a_session_is_refused_until_the_first_one_ends(tiny_folder: Path, tmp_path: Path) -> None:
    """Two chats of one session overwrote each other's messages, the later one those of the earlier."""
    path = tmp_path / "talk"
    first = Session.open(path, options(tiny_folder))
    with pytest.raises(ValueError, match="another chat has --session"):
        Session.open(path, options(tiny_folder))
    chat = Conversation(Llama.from_options(options(tiny_folder)), PARAMS)
    first.save(chat, is_last=True)
    assert [each.name for each in tmp_path.iterdir()] == ["talk"]
    Session.open(path, options(tiny_folder))
