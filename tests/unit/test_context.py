"""What a batch shares, what a chat said before and what is read in chunks: fewer positions, the same answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.config import DynamicScaling
from llama.engine import context
from tests.checkpoints import TINY, random_state
from tests.models import build, random_tokens, transformer

SHARED = random_tokens(40, vocab_size=256, seed=1).tolist()
ENDS = [row.tolist() for row in random_tokens(4, 9, vocab_size=256, seed=2)]
RAGGED = [SHARED + ENDS[0], SHARED + ENDS[1][:1], SHARED, SHARED + ENDS[2]]


class Counted(torch.nn.Module):
    """Counts the positions that go through a model, padding included."""

    def __init__(self, llm: Llama) -> None:
        super().__init__()
        self.inner, self.positions, self.largest = llm.model.hidden, 0, 0
        llm.model.hidden = self.count  # type: ignore[method-assign]

    def count(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        self.positions += tokens.numel()
        self.largest = max(self.largest, tokens.numel())
        return self.inner(tokens, *others)


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for scores, wanted in zip(found[1], expected[1], strict=True):
        assert scores == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompts", [RAGGED, [SHARED] * 3, RAGGED[:1]], ids=["ragged", "identical", "one"])
def test_a_shared_beginning_is_computed_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], echo: bool
) -> None:
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=4)
    options = {"temperature": 0.5, "seed": 3, "logprobs": True, "echo": echo}
    with monkeypatch.context() as patched:
        patched.setattr(context, "MIN_SHARED_PREFIX", 1000)
        expected = llm.generate(prompts, 8, **options)
    assert llm.metrics.reused_tokens == 0
    counted = Counted(llm)
    assert_same(llm.generate(prompts, 1, **options), ([row[: len(row) - 7] for row in expected[0]],
                                                      [row[: len(row) - 7] for row in expected[1]]))  # fmt: skip
    assert counted.positions == {4: 39 + 4 * 10, 3: 39 + 3, 1: 49}[len(prompts)]
    assert_same(llm.generate(prompts, 8, **options), expected)


def test_a_short_shared_beginning_is_read_by_every_row(tiny_folder: Path) -> None:
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=4)
    llm.generate([SHARED[:16] + end for end in ENDS], 1)
    assert llm.metrics.reused_tokens == 0
    llm.generate([SHARED[:17] + end for end in ENDS], 1)
    assert llm.metrics.reused_tokens == 3 * 16


@pytest.mark.parametrize("echo", [False, True])
def test_chunks_give_what_one_pass_gives(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, echo: bool) -> None:
    """A row's last state is in the chunk where it ends, and its scores go over the edges of chunks."""
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=4)
    prompts = [ENDS[0], SHARED, ENDS[1] + SHARED, [5]]
    options = {"temperature": 0.5, "seed": 3, "logprobs": True, "echo": echo}
    expected = llm.generate(prompts, 8, **options)
    for positions in (1, 12, 28, 40):
        monkeypatch.setattr("llama.backends.eager.MAX_PREFILL_TOKENS", positions)
        counted = Counted(llm)
        assert_same(llm.generate(prompts, 8, **options), expected)
        assert counted.largest == max(positions // 4 * 4, 4)


def test_dynamic_scaling_knows_the_whole_length_in_every_chunk(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shares nothing: keys of the same beginning differ between rows of different lengths."""
    args = dataclasses.replace(TINY, rope_scaling=DynamicScaling(4.0, 16), max_seq_len=64, max_batch_size=4)
    llm = Llama(transformer(args, random_state(TINY)), build(tiny_folder).tokenizer)
    alone = [llm.generate([row], 4, temperature=0, logprobs=True, echo=True) for row in RAGGED]
    monkeypatch.setattr("llama.backends.eager.MAX_PREFILL_TOKENS", 20)
    together = llm.generate(RAGGED, 4, temperature=0, logprobs=True, echo=True)
    assert together[1] is not None
    for i, each in enumerate(alone):
        assert_same((together[0][i : i + 1], together[1][i : i + 1]), each)
    for row in (RAGGED[2], RAGGED[0]):
        kept = [step.token for step in llm.stream([row], 4, temperature=0, keep_cache=True)]
        assert kept == [step.token for step in llm.stream([row], 4, temperature=0)]
    assert llm.metrics.reused_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"speculate": "lookup"}, {"draft_ckpt_dir": "self"}], ids=str)
def test_a_kept_conversation_reads_only_what_is_new(tiny_folder: Path, way: dict[str, Any]) -> None:
    """Also where history was rewritten, where an answer was left in its middle, and after a reset."""
    options = {key: tiny_folder if value == "self" else value for key, value in way.items()}
    keeping, fresh = (build(tiny_folder, max_seq_len=160, **options) for _ in range(2))
    counted = Counted(keeping)

    def answer(prompt: list[int], at_most: int | None, leave_after: int = 1000) -> list[int | None]:
        both = []
        for llm, keep in ((keeping, True), (fresh, False)):
            counted.positions = 0
            steps = llm.stream([prompt], at_most, temperature=0.5, seed=len(prompt), keep_cache=keep)
            both.append([step.token for _, step in zip(range(leave_after), steps, strict=False)])
            steps.close()  # type: ignore[attr-defined]
            if keep:
                computed.append(counted.positions)
        assert both[0] == both[1]
        return both[0][:-1] if leave_after == 1000 else both[0]

    computed: list[int] = []
    dialog = list(SHARED)
    dialog += answer(dialog, 12)  # type: ignore[arg-type]
    dialog += ENDS[0]
    dialog += answer(dialog, 12, leave_after=5)  # type: ignore[arg-type]
    dialog += ENDS[1]
    dialog += answer(dialog, None)[:20]  # type: ignore[arg-type]
    rewritten = dialog[:30] + ENDS[2]
    answer(rewritten, 3)
    answer(rewritten, 3)  # the same again: its last token must be read
    answer(ENDS[3], 3)  # nothing in common
    # The newest token of an answer is not in the cache, unless it had been guessed.
    assert 0 <= 40 + (1 + 9) + (1 + 9) + 9 + 1 + 9 - keeping.metrics.prompt_tokens <= 2 * len(way)
    assert keeping.metrics.reused_tokens > 0 == fresh.metrics.reused_tokens
    if not way:
        assert computed[:2] == [40 + 11, 10 + 4]


def test_streams_that_overlap_do_not_share_a_cache(tiny_folder: Path) -> None:
    llm = build(tiny_folder, max_seq_len=64)
    expected = [llm.generate([prompt], 6, temperature=0)[0][0] for prompt in (SHARED, ENDS[0])]
    first = llm.stream([SHARED], 6, temperature=0, keep_cache=True)
    begun = [next(first).token]
    second = [step.token for step in llm.stream([ENDS[0]], 6, temperature=0, keep_cache=True)]
    assert [begun + [step.token for step in first][:-1], second[:-1]] == expected
    with pytest.raises(ValueError, match="keep_cache is for one prompt at a time, got 2"):
        llm.stream([[5], [6]], keep_cache=True)


def test_an_interrupt_within_a_pass_leaves_nothing_wrong(tiny_folder: Path) -> None:
    """Keys may be half written then; only those before are taken to hold."""
    llm = build(tiny_folder, max_seq_len=64)
    expected = llm.generate([SHARED + ENDS[0]], 6, temperature=0)[0][0]
    list(llm.stream([SHARED], 6, temperature=0, keep_cache=True))
    hidden = llm.model.hidden

    def interrupted(tokens: torch.Tensor, start_pos: torch.Tensor, cache: Any, *others: Any) -> torch.Tensor:
        cache.keys[:, 0, int(start_pos[0]) :] = 1e3
        raise KeyboardInterrupt

    llm.model.hidden = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream([SHARED[:20] + ENDS[1]], 6, temperature=0, keep_cache=True))
    llm.model.hidden = hidden  # type: ignore[method-assign]
    assert [step.token for step in llm.stream([SHARED + ENDS[0]], 6, temperature=0, keep_cache=True)][:-1] == expected
    assert llm.metrics.reused_tokens == 20
