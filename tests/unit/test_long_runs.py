"""A process that generates all day has as much memory, files and threads in the evening as in the morning."""

from __future__ import annotations

import gc
import os
import random
import weakref
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.engine.page_pool import PagePool
from llama.sampling import SamplingParams
from tests.models import build

WAYS: list[dict[str, Any]] = [{}, {"speculate": "lookup"}, {"draft_ckpt_dir": "self"}]
PROCESS = Path("/proc/self")


def build_way(folder: Path, way: dict[str, Any]) -> Llama:
    options = {key: folder if value == "self" else value for key, value in way.items()}
    return build(folder, max_seq_len=120, max_batch_size=4, **options)


def generate_somehow(llm: Llama, choose: random.Random) -> None:
    """Complete, leave, cancel or break off a few prompts of any length."""
    prompts = [[choose.randrange(256) for _ in range(choose.choice([1, 5, 20, 60, 110]))] for _ in range(3)]
    way = choose.randrange(4)
    if way == 0:
        llm.generate(prompts, 8, logprobs=choose.random() < 0.5, echo=choose.random() < 0.5)
    elif way == 1:
        stream = llm.stream(prompts, 8)
        for _ in range(choose.randrange(5)):
            next(stream)
    elif way == 2:
        ids = [llm.engine.add(prompt, SamplingParams(max_gen_len=choose.choice([0, 1, 9]))) for prompt in prompts]
        while llm.engine.unfinished:
            llm.engine.step()
            if choose.random() < 0.1:
                llm.engine.cancel(choose.choice(ids))
    else:
        with pytest.raises(ValueError, match="999"):
            llm.generate([*prompts, [999]], 8)


@pytest.mark.slow
@pytest.mark.skipif(not PROCESS.exists(), reason="no Linux, which tells what a process has")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_many_generations_grow_no_memory_no_files_and_no_threads(tiny_folder: Path, way: dict[str, Any]) -> None:
    llm, choose = build_way(tiny_folder, way), random.Random(0)

    def sizes() -> dict[str, int]:
        for _ in range(100):
            generate_somehow(llm, choose)
        gc.collect()
        resident_pages = int((PROCESS / "statm").read_text().split()[1])
        return {
            "files": len(os.listdir(PROCESS / "fd")),
            "threads": len(os.listdir(PROCESS / "task")),
            "MB": resident_pages * os.sysconf("SC_PAGESIZE") // 2**20,
            "hundreds of objects": len(gc.get_objects()) // 100,
        }

    before, after = sizes(), sizes()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["files"] <= 0 and grown["threads"] <= 0, grown
    assert grown["MB"] <= 3 and grown["hundreds of objects"] <= 2, grown
    assert llm.engine.unfinished == llm.engine.scheduler.pool.n_held == 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_model_that_is_dropped_is_gone_at_once(tiny_folder: Path, way: dict[str, Any]) -> None:
    """A cycle would keep gigabytes until Python happens to look for cycles."""
    gc.collect()
    gc.disable()
    try:
        llm = build_way(tiny_folder, way)
        llm.generate([[1, 2, 3], [4, 5]], 5)
        stream = llm.stream([[1, 2, 3]], 5)
        next(stream)
        kept = [weakref.ref(each) for each in (llm, llm.model, llm.engine, llm.engine.room.runners[0].cache.keys)]
        del stream, llm
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_a_stream_that_ends_within_a_step_of_others_takes_nobody_with_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may end it there, in the middle of a decision: another's pages were lost."""
    llm = build_way(tiny_folder, {})
    llm.tokenizer.stop_tokens = frozenset()
    expected = llm.generate([[5, 6, 7]], 40, temperature=0)[0][0]
    left, stays = llm.stream([[1, 2, 3, 4] * 5], 40), llm.stream([[5, 6, 7]], 40, temperature=0)
    tokens = [next(left).token is not None and next(stays).token for _ in range(3)]
    allocate = PagePool.allocate

    def ends_another(*args: Any) -> int:
        left.close()  # type: ignore[attr-defined]
        return allocate(*args)

    monkeypatch.setattr(PagePool, "allocate", ends_another)
    assert [*tokens, *(event.token for event in stays)][:-1] == expected
    assert llm.engine.unfinished == llm.engine.scheduler.pool.n_held == 0
