"""Recorded steps give what plain steps give: the same tokens, scores and ends, whatever is replayed and moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import Llama
from llama.backends.eager import EagerBackend
from llama.engine.speculative import DraftLengthController
from llama.sampling import SamplingParams
from tests.checkpoints import write_model_and_draft
from tests.models import BYTE_BOS, build, random_tokens

pytestmark = pytest.mark.slow

PROMPTS = [
    [BYTE_BOS, *b"one two three, one two three, one"],
    [BYTE_BOS, *b"ab"],
    [7] * 20,
    random_tokens(17, vocab_size=256, seed=5).tolist(),
    [9, 9, 8],
]


class Tape(TorchDispatchMode):
    """What a CUDA graph does: the operations on the tensors of one moment, and nothing of Python, run again there."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model whose rows end at times, and a draft of fewer layers that is right at times."""
    return write_model_and_draft(tmp_path_factory.mktemp("graphs"))


class TapeBackend(EagerBackend):
    """Torch's operations, which a tape sees, captured on tapes."""

    captures_graphs = True

    def __init__(self, tapes: list[Tape]) -> None:
        super().__init__(torch.device("cpu"))
        self.tapes = tapes

    def graph_capture(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        def capture(run: Callable[[], None]) -> Callable[[], None]:
            self.tapes.append(Tape(run))  # runs it once, as capturing a CUDA graph does
            return self.tapes[-1]

        return capture


def build_llama(folder: Path, tapes: list[Tape] | None = None, **options: Any) -> Llama:
    """A model that computes by torch's operations, captured if there are tapes to capture them on."""
    llm = build(folder, **{"max_seq_len": 56, "max_batch_size": 5, **options})
    for model in filter(None, (llm.model, llm.draft)):
        (EagerBackend(model.device) if tapes is None else TapeBackend(tapes)).bind(model)
    return llm


# Operations that take a value from the device, or one to it.
WAITS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "lift_fresh", "masked_select", "unique")

GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "seed": 3}
FROM_ALL: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 4}


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for row, wanted in zip(found[1], expected[1], strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, FROM_ALL], ids=str)
@pytest.mark.parametrize("bsz", [1, 5])
def test_recorded_steps_give_the_tokens_and_scores_of_plain_ones(
    folders: dict[str, Path], bsz: int, options: dict[str, Any]
) -> None:
    """Rows end apart, also by stop tokens that the host sees when the next step is under way, and move."""
    cases = [(PROMPTS[:bsz], None), (PROMPTS[:bsz], 1), (PROMPTS[-bsz:], 7)]
    plain = build_llama(folders["model"])
    expected = [plain.generate(prompts, n, logprobs=True, echo=True, **options) for prompts, n in cases]
    assert bsz == 1 or len({len(row) for row in expected[0][0]}) > 1
    tapes: list[Tape] = []
    llm = build_llama(folders["model"], tapes)
    for (prompts, n), wanted in zip(cases, expected, strict=True):
        assert_same(llm.generate(prompts, n, logprobs=True, echo=True, **options), wanted)
    assert len(tapes) <= {1: 1, 5: 4}[bsz]  # for 5, 4, 2 and 1 rows
    assert llm.metrics.decoded_tokens == plain.metrics.decoded_tokens


@pytest.mark.parametrize(
    ("way", "options"),
    [("lookup", GREEDY), ("draft", GREEDY), ("draft", {**SAMPLED, "temperature": 0.1}), ("same", SAMPLED)],
    ids=str,
)
def test_guesses_are_checked_by_recorded_steps(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    options: dict[str, Any],
) -> None:
    """A draft model runs on without the host, and steps of several tokens are padded, but not over a cache's end."""
    monkeypatch.setattr(DraftLengthController, "next_draft_len", lambda self: 5)
    prompts = PROMPTS[:3]
    expected = build_llama(folders["model"]).generate(prompts, None, logprobs=True, **options)
    ways = {"lookup": {"speculate": "lookup"}, "draft": {"draft_ckpt_dir": folders["draft"]}}
    llm = build_llama(folders["model"], [], **ways.get(way, {"draft_ckpt_dir": folders["model"]}))
    assert_same(llm.generate(prompts, None, logprobs=True, **options), expected)
    assert 0 < llm.metrics.accepted <= llm.metrics.proposed


def test_tapes_of_one_call_serve_the_next(folders: dict[str, Path]) -> None:
    """Of other prompts, fewer rows, and another temperature; only another kind of sampling needs others."""
    tapes: list[Tape] = []
    llm = build_llama(folders["model"], tapes, max_seq_len=40)
    llm.generate(PROMPTS[1:3], 6, **SAMPLED)
    recorded = len(tapes)
    llm.generate(PROMPTS[4:], 9, **{**SAMPLED, "temperature": 0.2, "top_p": 0.5})
    assert len(tapes) == recorded + 1  # one row
    llm.generate([PROMPTS[3], PROMPTS[4]], 9, **SAMPLED)
    assert len(tapes) == recorded + 1
    llm.generate(PROMPTS[4:], 9, **GREEDY)
    assert len(tapes) == recorded + 2


def test_a_step_neither_waits_for_a_value_nor_brings_one(folders: dict[str, Path]) -> None:
    """Either would end a capture."""
    tapes: list[Tape] = []
    llm = build_llama(folders["model"], tapes)
    for options in (GREEDY, SAMPLED, FROM_ALL):
        llm.generate(PROMPTS[:2], 4, logprobs=True, **options)
    names = {str(func) for tape in tapes for func, *_ in tape.calls}
    assert "aten.index_copy_.default" in names
    assert not {name for name in names for waits in WAITS if name.startswith(f"aten.{waits}.")}


def test_a_cache_that_grows_keeps_what_it_has(folders: dict[str, Path]) -> None:
    """Graphs of the old cache would write to memory that is another's by then."""
    turns = [[BYTE_BOS, *b"one two"], [BYTE_BOS, *b"one two three one two three, one"], [BYTE_BOS, *b"one two t" * 4]]
    plain = build_llama(folders["model"])
    expected = [[step.token for step in plain.stream([turn], 9, temperature=0)] for turn in turns]
    llm = build_llama(folders["model"], [])
    llm.engine.room.grows = True
    sizes = set()
    for turn, wanted in zip(turns, expected, strict=True):
        assert [step.token for step in llm.stream([turn], 9, temperature=0)] == wanted
        sizes.add(llm.engine.room.runners[0].cache.n_pages)
    assert len(sizes) > 1
    assert llm.metrics.reused_tokens > 0
    assert_same(
        llm.generate(PROMPTS, None, logprobs=True, **GREEDY), plain.generate(PROMPTS, None, logprobs=True, **GREEDY)
    )


def test_requests_join_and_leave_between_captured_steps(folders: dict[str, Path]) -> None:
    """A step that is in flight when they come is not theirs, and one that went when they left was in vain."""
    plain = build_llama(folders["model"], max_batch_size=2)
    expected = plain.generate(PROMPTS, 12, logprobs=True, **SAMPLED)
    llm = build_llama(folders["model"], [], max_batch_size=4)
    engine, tokens, waiting = llm.engine, [list[int]() for _ in PROMPTS], list(enumerate(PROMPTS))
    indices: dict[int, int] = {}
    while waiting or engine.unfinished:
        left = None
        if waiting and engine.unfinished < 3:
            index, prompt = waiting.pop(0)
            indices[engine.add(prompt, SamplingParams(**SAMPLED, max_gen_len=12), index=index)] = index
            left = engine.add(PROMPTS[0][:9], SamplingParams(temperature=0))
        for _ in range(2):
            for event in engine.step():
                if event.index in indices and event.token is not None:
                    tokens[indices[event.index]].append(event.token)
        if left is not None:
            engine.cancel(left)
    assert tokens == expected[0]


def test_a_stream_that_is_left_leaves_nothing_behind(folders: dict[str, Path]) -> None:
    """The step in flight then was once taken for the first of the next stream."""
    llm = build_llama(folders["model"], [])
    llm.tokenizer.stop_tokens = frozenset()
    expected = llm.generate(PROMPTS[1:2], 6, **GREEDY)
    left = llm.stream(PROMPTS[2:3], 12, **GREEDY)
    for _ in range(4):
        next(left)
    left.close()  # type: ignore[attr-defined]  # a generator
    assert llm.generate(PROMPTS[1:2], 6, **GREEDY) == expected
    again = [step.token for step in llm.stream(PROMPTS[2:3], 12, **GREEDY)]
    assert again[:-1] == llm.generate(PROMPTS[2:3], 12, **GREEDY)[0][0]


class Interrupted(BaseException):
    """As a user's Ctrl-C."""


class InterruptedTapes(list[Tape]):
    """Takes no tape while it interrupts."""

    interrupts = True

    def append(self, tape: Tape) -> None:
        if self.interrupts:
            raise Interrupted
        super().append(tape)


def test_an_interrupt_while_a_step_is_captured_leaves_a_conversation_true(folders: dict[str, Path]) -> None:
    """A token was once held before its key was there: the next turn saw a key of zeros."""
    llm = build_llama(folders["model"])
    first = next(iter(llm.stream(PROMPTS[2:3], 8, **GREEDY))).token
    turn = [[*PROMPTS[2], *filter(None, [first])]]
    plain = [step.token for step in llm.stream(turn, 7, **GREEDY)]

    tapes = InterruptedTapes()
    TapeBackend(tapes).bind(llm.model)
    with pytest.raises(Interrupted):
        list(llm.stream(PROMPTS[2:3], 8, **GREEDY))
    tapes.interrupts = False
    reused = llm.metrics.reused_tokens
    assert [step.token for step in llm.stream(turn, 7, **GREEDY)] == plain
    assert llm.metrics.reused_tokens == reused + len(PROMPTS[2])


def test_rows_that_only_fill_up_a_graph_write_to_nobodys_page(folders: dict[str, Path]) -> None:
    """Their first positions would else be another text's."""
    llm = build_llama(folders["model"], [])
    llm.tokenizer.stop_tokens = frozenset()
    llm.generate(PROMPTS[:3], 9, **GREEDY)
    cache, pool = llm.engine.room.runners[0].cache, llm.engine.scheduler.pool
    written = [page for page in range(cache.n_pages) if cache.keys[:, page].any()]
    assert 0 in written and max(written) == pool.n_touched - 1
    llm.generate(PROMPTS[:3], 9, **GREEDY)  # its pages are found, and they hold what they held
    assert llm.metrics.reused_tokens > 0
    plain = build_llama(folders["model"])
    plain.tokenizer.stop_tokens = frozenset()
    assert llm.generate(PROMPTS[:3], 20, **GREEDY) == plain.generate(PROMPTS[:3], 20, **GREEDY)


def test_steps_of_a_model_that_was_changed_are_not_run_again(folders: dict[str, Path]) -> None:
    """Graphs know the weights where they were."""
    tapes: list[Tape] = []
    llm = build_llama(folders["model"], tapes)
    before = llm.generate(PROMPTS[1:2], 6, **GREEDY)
    recorded = len(tapes)
    TapeBackend(tapes).bind(llm.model)
    assert llm.generate(PROMPTS[1:2], 6, **GREEDY) == before
    assert len(tapes) == recorded + 1
