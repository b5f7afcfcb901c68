"""Without max_seq_len a text may be as long as the model's context, as far as memory goes, and that costs nothing."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.backends.base import backend_of
from llama.checkpoint import open_checkpoint
from llama.checkpoint.context import trained_context_len
from llama.config import ModelArgs
from llama.engine.build import plan_run
from llama.engine.options import BuildOptions
from llama.memory.estimate import BatchShape, activation_bytes
from llama.sampling import SamplingParams
from tests.checkpoints import BYTE_VOCAB_SIZE, write_meta
from tests.models import build, random_tokens

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, multiple_of=16)
PROMPTS = random_tokens(3, 40, vocab_size=256).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_meta(folder, dataclasses.replace(ARGS, use_scaled_rope=True))
    return folder


def with_room(llm: Llama, monkeypatch: pytest.MonkeyPatch, n_pages: int, prompt_len: int = 40) -> None:
    """Let there be memory for so many pages beside a step of one request."""
    pool, model = llm.engine.scheduler.pool, llm.model
    page = model.new_cache(1, 1).nbytes
    shape = BatchShape(1, prompt_len, 131072)
    beside = activation_bytes(model.args, model.parallel, torch.float32, backend_of(model), shape)
    monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args: beside + (n_pages - pool.n_used) * page)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 4096),
        ({"norm_eps": 1e-6}, 2048),
        ({"rope_theta": 500000.0}, 8192),
        ({"rope_theta": 1000000.0}, 16384),
        ({"use_scaled_rope": True}, 131072),
    ],
)
def test_a_format_that_tells_no_context_has_that_of_its_kind(
    tmp_path: Path, change: dict[str, Any], expected: int
) -> None:
    write_meta(tmp_path, dataclasses.replace(ARGS, **change))
    assert build(tmp_path).model.args.max_seq_len == expected


@pytest.mark.parametrize(("said", "expected"), [(512, 512), (2**40, 4096), (None, 4096)])
def test_a_context_that_no_model_has_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: int | None, expected: int
) -> None:
    """A config.json of 10^30 would ask for page tables beyond all memory."""
    write_meta(tmp_path, ARGS)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.context_len = said  # type: ignore[misc]
    assert trained_context_len(checkpoint) == expected


def test_a_long_context_takes_no_memory_of_its_own(folder: Path) -> None:
    """Kept pages once were those of two texts of max_seq_len: 12 GB of the demo model with 131,072 tokens."""
    llm = build(folder)
    llm.tokenizer.stop_tokens = frozenset()
    assert llm.model.args.max_seq_len == 131072
    for i in range(12):
        llm.generate(random_tokens(8, 200, vocab_size=256, seed=i).tolist(), 100)
    pool = llm.engine.scheduler.pool
    assert pool.n_held == 0
    assert pool.n_used <= 1 + 2 * 2048 // 16
    [longest] = random_tokens(1, 5000, vocab_size=256).tolist()
    llm.generate([longest], 1)
    reused = llm.metrics.reused_tokens
    llm.generate([[*longest, 7]], 1)
    assert llm.metrics.reused_tokens - reused >= 4999, "the longest text is kept as a whole"


def test_a_text_that_asks_for_no_length_takes_what_room_there_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused: with what might follow, a prompt of 40 tokens needed the pages of the whole context."""
    llm = build(folder)
    llm.tokenizer.stop_tokens = frozenset()
    [expected] = llm.generate(PROMPTS[:1], 100, temperature=0)[0]
    with_room(llm, monkeypatch, 8)
    [event, *_] = [event for event in llm.stream(PROMPTS[:1], temperature=0) if event.finish_reason]
    assert event.finish_reason == "length"
    [short] = llm.generate(PROMPTS[:1], temperature=0)[0]
    assert short == expected[: len(short)] and 8 * 16 - 40 - 16 <= len(short) <= 8 * 16 - 40
    assert all(len(each) >= 40 for each in llm.generate(PROMPTS, temperature=0)[0]), "those beside others wait"
    with pytest.raises(ValueError, match=r"140 with what follows, needs .* of cache per rank, there is room for"):
        llm.generate(PROMPTS[:1], 100)
    with_room(llm, monkeypatch, 1)
    with pytest.raises(ValueError, match=r"a prompt of 40 tokens, 41 with what follows.*: shorten the prompt"):
        llm.generate(PROMPTS[:1])


def test_requests_that_came_before_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes what there is would wait for ever for pages that another request's step now needs."""
    llm = build(folder)
    llm.tokenizer.stop_tokens = frozenset()
    with_room(llm, monkeypatch, 20)
    ends = {llm.engine.add(PROMPTS[0], SamplingParams(0)): 0}
    llm.engine.step()
    with_room(llm, monkeypatch, 10, prompt_len=80)
    ends[llm.engine.add([*PROMPTS[1], *PROMPTS[2]], SamplingParams(0, max_gen_len=10))] = 0
    for _ in range(1000):
        for event in llm.engine.step():
            ends[event.index] += event.token is not None
        if not llm.engine.unfinished:
            break
    first, second = ends.values()
    assert second == 10 and 60 <= first <= 10 * 16 - 40


def test_a_context_that_memory_has_no_room_for_is_cut_and_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A chat has to know when its oldest turns go, before its next message is refused."""
    options = BuildOptions(folder, device="cpu", dtype="float32")
    whole, fits = plan_run(options)
    assert fits and whole.endswith("max_seq_len is 131072, the model's context.")
    monkeypatch.setattr("llama.engine.build.free_bytes", lambda *args: 20_000_000)
    cut, fits = plan_run(options)
    length = int(cut.rpartition("max_seq_len is ")[2].partition(":")[0])
    assert fits and 1000 < length < 40_000
    assert cut.endswith(f"{length}: there is no memory for all of the model's context, 131072 tokens.")
    with caplog.at_level(logging.WARNING, "llama"):
        assert Llama.from_options(options).model.args.max_seq_len == length
    assert caplog.messages == [f"max_seq_len is {length}: {cut.rpartition(': ')[2]}"]
    given, fits = plan_run(dataclasses.replace(options, max_seq_len=131072))
    assert not fits and "max_seq_len is" not in given


def test_where_memory_is_taken_at_once_a_cache_grows_with_its_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a chat without max_gen_len would take pages for the whole context at once, 17 GB for 8B."""
    monkeypatch.setattr("llama.engine.room.USUAL_COMPLETION", 32)
    texts, sizes = [], []
    for grows in (False, True):
        llm = build(folder, max_batch_size=2)
        llm.tokenizer.stop_tokens = frozenset()
        llm.engine.room.grows = grows
        events = llm.stream(PROMPTS[:2], temperature=0)
        texts.append([next(events).token for _ in range(1000)])
        sizes.append(llm.engine.room.runners[0].cache.n_pages)
        events.close()  # type: ignore[attr-defined]
    assert texts[0] == texts[1]
    assert sizes[1] <= 2 * 2 * (40 + 500) / 16 < sizes[0]
