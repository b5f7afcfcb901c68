"""A request's text is its own: whoever joins, leaves, is set back or shares pages with it, and whenever."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import llama
from llama import Llama
from llama.backends.base import backend_of
from llama.cache import PAGE_SIZE, ForwardBatch
from llama.config import ModelArgs
from llama.engine import room
from llama.engine.engine import Engine
from llama.engine.step_budget import StepBudget
from llama.memory.estimate import BatchShape, activation_bytes
from llama.sampling import SamplingParams
from tests.checkpoints import random_state
from tests.models import BYTE_BOS, build, random_tokens, transformer

PACKAGE = str(Path(llama.__file__).parent)
SHARED = random_tokens(40, vocab_size=256, seed=1).tolist()
ENDS = [row.tolist() for row in random_tokens(4, 9, vocab_size=256, seed=2)]


class Counted:
    """Counts the tokens that go through a model: of all passes together, and of each."""

    def __init__(self, llm: Llama) -> None:
        self.inner, self.passes = llm.model.hidden, list[int]()
        llm.model.hidden = self  # type: ignore[method-assign]

    def __call__(self, tokens: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        self.passes.append(tokens.numel())
        return self.inner(tokens, batch)


@dataclass
class Story:
    """What came of one request."""

    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    text: str = ""
    end: str | None = None


def run(engine: Engine, stories: dict[int, Story]) -> None:
    """Take one step, and add its events to the stories."""
    for event in engine.step():
        story = stories[event.index]
        assert story.end is None, "an event after the last"
        story.text += event.text
        if event.token is None:
            story.end = event.finish_reason
        else:
            story.tokens.append(event.token)
            story.scores.append(event.logprob or 0.0)


def assert_same(found: Story, expected: Story) -> None:
    assert (found.tokens, found.text, found.end) == (expected.tokens, expected.text, expected.end)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)


def random_request(choose: random.Random) -> tuple[list[int], SamplingParams]:
    """Prompts begin alike at times, and each has its own parameters."""
    prompt = SHARED[: choose.choice([0, 5, 16, 33, 40])] + [choose.randrange(256) for _ in range(choose.randint(1, 30))]
    params = SamplingParams(
        temperature=choose.choice([0, 0, 0.5, 1.0]),
        top_p=choose.choice([0, 0.9, 1.0]),
        max_gen_len=choose.choice([0, 1, 5, 20, 40, None]),
        seed=choose.randrange(5),
        logprobs=choose.random() < 0.3,
        echo=choose.random() < 0.3,
        stop_token=choose.choice([None, 7]),
        top_k=choose.choice([0, 0, 0, 5]),
        xtc_probability=choose.choice([0, 0, 0, 0.5]),
        repetition_penalty=choose.choice([1, 1, 1.3]),
        frequency_penalty=choose.choice([0, 0, 0.5]),
        dry_multiplier=choose.choice([0, 0, 0, 0.8]),
        min_tokens=choose.choice([0, 0, 4]),
        stop=choose.choice([(), (), ("e",)]),
        regex=choose.choice([None, None, None, "[a-f]*[0-9]{3,9}"]),
    )
    return prompt, params


def alone(llm: Llama, prompt: list[int], params: SamplingParams, index: int) -> Story:
    """The story of a request that nothing runs beside, with an empty cache."""
    engine, stories = Engine(llm.model, llm.tokenizer), defaultdict[int, Story](Story)
    request = engine.add(prompt, params, index=index)
    while engine.unfinished:
        run(engine, stories)
    return stories[request]


@pytest.mark.slow
@pytest.mark.parametrize("n_pages", [1000, 9])
@pytest.mark.parametrize("seed", range(6))
def test_requests_that_join_at_any_moment_are_as_they_are_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, n_pages: int
) -> None:
    """Also where pages run out, where others are cancelled, and with prompts read in parts of any size."""
    choose = random.Random(seed)
    monkeypatch.setattr(room, "page_limit", lambda *args: n_pages)
    monkeypatch.setattr("llama.backends.eager.EagerBackend.max_prefill_tokens", choose.choice([1, 7, 64, 2048]))
    llm = build(tiny_folder, max_seq_len=120, max_batch_size=choose.choice([3, 8] if n_pages == 9 else [1, 3, 8]))
    engine, stories = llm.engine, defaultdict[int, Story](Story)
    requests: dict[int, tuple[list[int], SamplingParams, int]] = {}
    cancelled = set()
    while len(requests) < 25 or engine.unfinished:
        if len(requests) < 25 and choose.random() < 0.4:
            prompt, params = random_request(choose)
            index = choose.randrange(100)
            request = engine.add(prompt, params, index=index, interactive=choose.random() < 0.5)
            requests[request] = prompt, params, index
        if requests and choose.random() < 0.03:
            cancelled.add(left := choose.choice(list(requests)))
            engine.cancel(left)
        run(engine, stories)
    assert engine.scheduler.pool.n_held == 0
    for request, (prompt, params, index) in requests.items():
        expected = alone(llm, prompt, params, index)
        if request in cancelled and stories[request].end is None:
            assert expected.tokens[: len(stories[request].tokens)] == stories[request].tokens
        else:
            assert_same(stories[request], expected)
    if n_pages == 1000 or llm.model.args.max_batch_size == 8:
        assert bool(engine.metrics.set_back) == (n_pages == 9)


def test_a_free_place_is_taken_at_once(tiny_folder: Path) -> None:
    """The last of a batch was once waited for: 1 and 30 tokens in turn took 60 steps, not half of them."""
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=2)
    llm.tokenizer.stop_tokens = frozenset()
    engine = llm.engine
    counted = Counted(llm)
    for n in (30, 1, 1, 1, 1, 20):
        engine.add(ENDS[0], SamplingParams(max_gen_len=n))
    while engine.unfinished:
        engine.step()
    assert len(counted.passes) == 30


def test_prompts_are_read_beside_rows_that_generate_within_a_budget(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's long prompt once stopped everybody."""
    monkeypatch.setattr(StepBudget, "record", lambda self, *args: setattr(self, "tokens", 3))  # whatever the clock says
    llm = build(tiny_folder, max_seq_len=200, max_batch_size=4)
    llm.tokenizer.stop_tokens = frozenset()
    engine, events = llm.engine, []
    engine.add(ENDS[0], SamplingParams(max_gen_len=40))
    engine.step()
    counted = Counted(llm)
    engine.add(random_tokens(30, vocab_size=256).tolist(), SamplingParams(max_gen_len=1))
    while engine.unfinished > 1:
        events.append([event.index for event in engine.step()])
    assert counted.passes[-10:] == [1 + 3] * 10
    assert set(counted.passes[:-10]) == {1} and len(counted.passes) < 14  # how long these take is not known at first
    assert all(0 in step for step in events)


def test_a_text_that_is_computed_again_token_by_token_goes_on(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that only reads, one token of each, was taken for one that generates, and had none to go on with."""
    monkeypatch.setattr(room, "page_limit", lambda *args: 6)
    monkeypatch.setattr("llama.backends.eager.EagerBackend.max_prefill_tokens", 1)
    llm = build(tiny_folder, max_seq_len=96, max_batch_size=2)
    llm.tokenizer.stop_tokens = frozenset()
    prompts, params = [SHARED[:37], ENDS[0]], SamplingParams(0, max_gen_len=50)
    stories = defaultdict[int, Story](Story)
    for prompt in prompts:
        llm.engine.add(prompt, params)
    while llm.engine.unfinished:
        run(llm.engine, stories)
    assert llm.engine.metrics.set_back
    for request, prompt in enumerate(prompts):
        assert_same(stories[request], alone(llm, prompt, params, 0))


def test_a_budget_is_what_steps_have_time_for() -> None:
    """Whatever a token costs: it grows by and by, and neither a long step nor a queue without end makes an end of it.

    Rows that come make steps slower, too: it once took that for the cost of one token, and never read more than one.
    """
    budget = StepBudget()
    assert budget.tokens == 0, "how long a plain step takes is not known"
    for token_seconds, expected in ((0.01, 40), (0.05, 8), (0.9, 1), (0.001, 400)):
        sizes, plain = [], 1.0
        for _ in range(130):
            plain += 0.01  # another row
            budget.record(plain + token_seconds * plain * budget.tokens, budget.tokens)
            sizes.append(budget.tokens)
        assert max(sizes[-32:]) >= expected * 0.6
        assert 0 in sizes[-34:]
        assert all(after <= 2 * before for before, after in itertools.pairwise(sizes) if before)


@pytest.mark.parametrize("prompts", [[SHARED + end for end in ENDS], [SHARED] * 3], ids=["ragged", "identical"])
@pytest.mark.parametrize("echo", [False, True])
def test_a_shared_beginning_is_computed_once(tiny_folder: Path, prompts: list[list[int]], echo: bool) -> None:
    """Its full pages, in the very step that computes them; of prompts that are scored, everything."""
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=4)
    options: dict[str, Any] = {"temperature": 0.5, "seed": 3, "logprobs": True, "echo": echo}
    counted = Counted(llm)
    found = llm.generate(prompts, 1, **options)
    shared = 0 if echo else 2 * PAGE_SIZE
    assert counted.passes == [sum(map(len, prompts)) - (len(prompts) - 1) * shared]
    for i, prompt in enumerate(prompts):
        assert found[0][i] == alone(llm, prompt, SamplingParams(max_gen_len=1, **options), i).tokens


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"speculate": "lookup"}, {"draft_ckpt_dir": "self"}], ids=str)
def test_a_conversation_reads_only_what_is_new(tiny_folder: Path, way: dict[str, Any]) -> None:
    """Also where history was rewritten, where an answer was left in its middle, and where nothing is left of it."""
    options = {key: tiny_folder if value == "self" else value for key, value in way.items()}
    llm, plain = (build(tiny_folder, max_seq_len=160, **given) for given in (options, {}))
    counted, computed = Counted(llm), list[int]()

    def answer(prompt: list[int], at_most: int | None, leave_after: int = 1000) -> list[int]:
        counted.passes.clear()
        stream = llm.stream([prompt], at_most, temperature=0.5, seed=len(prompt))
        found = [event.token for _, event in zip(range(leave_after), stream, strict=False)]
        stream.close()  # type: ignore[attr-defined]
        computed.append(sum(counted.passes))
        expected = alone(plain, prompt, SamplingParams(0.5, max_gen_len=at_most, seed=len(prompt)), 0).tokens
        tokens = [token for token in found if token is not None]
        assert tokens == expected[: len(tokens)] and (leave_after < 1000 or tokens == expected)
        return tokens

    dialog = list(SHARED)
    dialog += answer(dialog, 12)
    dialog += ENDS[0]
    dialog += answer(dialog, 12, leave_after=5)
    dialog += ENDS[1]
    dialog += answer(dialog, None)[:20]
    rewritten = dialog[:30] + ENDS[2]
    answer(rewritten, 3)
    answer(rewritten, 3)  # the same again: its last token must be read
    answer(ENDS[3], 3)  # nothing in common
    if not way:
        # A prompt's new tokens, the newest of the answer before it, and one less than its own answer has.
        assert computed[:2] == [40 + 11, 1 + 9 + 4]
        assert computed[3:] == [9 + 2, 1 + 2, 9 + 2]


def test_streams_that_overlap_run_in_the_same_steps(tiny_folder: Path) -> None:
    llm = build(tiny_folder, max_seq_len=64)
    llm.tokenizer.stop_tokens = frozenset()
    expected = [llm.generate([prompt], 6, temperature=0)[0][0] for prompt in (SHARED, ENDS[0])]
    counted = Counted(llm)
    streams = [llm.stream([prompt], 6, temperature=0) for prompt in (SHARED, ENDS[0])]
    found: list[list[int | None]] = [[], []]
    for _ in range(7):
        for stream, tokens in zip(streams, found, strict=True):
            tokens.append(next(stream).token)
    assert [tokens[:-1] for tokens in found] == expected
    assert len(counted.passes) < 8


def test_a_stream_that_is_left_takes_nobody_with_it(tiny_folder: Path) -> None:
    llm = build(tiny_folder, max_seq_len=64)
    expected = llm.generate([ENDS[0]], 9, temperature=0)[0][0]
    left, stays = (llm.stream([prompt], 9, temperature=0) for prompt in (SHARED, ENDS[0]))
    tokens = [next(stays).token]
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert [*tokens, *(event.token for event in stays)][:-1] == expected
    assert llm.engine.unfinished == llm.engine.scheduler.pool.n_held == 0


class Interrupted(BaseException):
    """As a user's Ctrl-C."""


def test_an_interrupt_within_a_pass_leaves_nothing_wrong(tiny_folder: Path) -> None:
    """Keys may be half written then: what was cached before stays, and what others run goes on."""
    llm = build(tiny_folder, max_seq_len=64)
    expected = [llm.generate([prompt], 6, temperature=0)[0][0] for prompt in (SHARED + ENDS[0], ENDS[3])]
    llm = build(tiny_folder, max_seq_len=64)
    list(llm.stream([SHARED], 6, temperature=0))
    going_on = llm.stream([ENDS[3]], 6, temperature=0)
    tokens = [next(going_on).token for _ in range(2)]
    hidden = llm.model.hidden

    def interrupted(tokens: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        batch.cache.keys[:, batch.page_table[-1, 1:].long()] = 1e3
        raise Interrupted

    llm.model.hidden = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        list(llm.stream([SHARED[:20] + ENDS[1]], 6, temperature=0))
    llm.model.hidden = hidden  # type: ignore[method-assign]
    assert [event.token for event in llm.stream([SHARED + ENDS[0]], 6, temperature=0)][:-1] == expected[0]
    assert [*tokens, *(event.token for event in going_on)][:-1] == expected[1]
    assert llm.metrics.reused_tokens >= 40


def test_an_interrupt_of_the_books_begins_with_free_pages(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a decision nothing is sure: all is computed again."""
    llm = build(tiny_folder, max_seq_len=64)
    expected = llm.generate([SHARED], 6, temperature=0)[0][0]
    going_on = llm.stream([SHARED], 6, temperature=0)
    tokens = [next(going_on).token]
    allocate = type(llm.engine.scheduler.pool).allocate

    def interrupted(*args: Any) -> int:
        allocate(*args)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(type(llm.engine.scheduler.pool), "allocate", interrupted)
        with pytest.raises(Interrupted):
            list(llm.stream([ENDS[1]], 6, temperature=0))
    assert [*tokens, *(event.token for event in going_on)][:-1] == expected
    assert llm.engine.scheduler.pool.n_held == 0


class Interrupter:
    """Raises Interrupted before a line of the package, so many lines from now."""

    def __init__(self, n_lines: int) -> None:
        self.n_lines = n_lines

    def __call__(self, frame: FrameType, event: str, argument: object) -> Interrupter | None:
        """Trace a function, unless it is `Engine.step`, as what that returns is lost to who interrupts."""
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code is Engine.step.__code__:
            return None
        if event == "line":
            self.n_lines -= 1
            if self.n_lines == 0:
                raise Interrupted
        return self


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"speculate": "lookup"}, {"draft_ckpt_dir": "self"}], ids=str)
def test_an_interrupt_at_any_line_changes_no_text(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Texts had holes, pages were lost, and a request that was neither waiting nor running was never heard of again."""
    monkeypatch.setattr(room, "page_limit", lambda *args: 11)
    options = {key: tiny_folder if value == "self" else value for key, value in way.items()}
    llm = build(tiny_folder, max_seq_len=120, max_batch_size=4, **options)
    plain = build(tiny_folder, max_seq_len=120)
    choose, n_interrupts = random.Random(0), 0
    for _ in range(8):
        requests, stories = dict[int, tuple[list[int], SamplingParams]](), defaultdict[int, Story](Story)
        while len(requests) < 5 or llm.engine.unfinished:
            if len(requests) < 5 and choose.random() < 0.4:
                prompt, params = random_request(choose)
                requests[llm.engine.add(prompt, params)] = prompt, params
            sys.settrace(Interrupter(choose.randint(1, 600)) if choose.random() < 0.3 else None)
            try:
                run(llm.engine, stories)
            except Interrupted:
                n_interrupts += 1
            finally:
                sys.settrace(None)
        llm.engine.step()
        assert llm.engine.scheduler.pool.n_held == 0
        for request, (prompt, params) in requests.items():
            assert_same(stories[request], alone(plain, prompt, params, 0))
    assert n_interrupts >= 40


def test_logits_that_are_not_numbers_end_one_request(tiny_folder: Path) -> None:
    """And say so; the others go on."""
    llm = build(tiny_folder, max_seq_len=64)
    expected = alone(llm, ENDS[0], SamplingParams(0, max_gen_len=4), 0)
    with torch.inference_mode():
        llm.model.get_parameter("tok_embeddings.weight")[200] = torch.nan
    engine, stories = llm.engine, defaultdict[int, Story](Story)
    good = engine.add([token if token != 200 else 1 for token in ENDS[0]], SamplingParams(0, max_gen_len=4))
    bad = engine.add([BYTE_BOS, 200, 5], SamplingParams(0, max_gen_len=4))
    while engine.unfinished:
        run(engine, stories)
    assert stories[bad].end == "error" and "are NaN or infinite after 3 tokens" in stories[bad].text
    assert stories[good].end == expected.end


def test_what_can_never_fit_is_refused_before_it_starts(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args: 250_000_000)
    llm = build(tiny_folder, max_seq_len=2**22)
    with pytest.raises(ValueError, match=r"a prompt of 40 tokens, 4194304 with what follows, needs .* of cache"):
        llm.engine.add(SHARED, SamplingParams(max_gen_len=2**22))
    assert llm.engine.unfinished == 0
    assert len(llm.generate([SHARED], 5)[0][0]) <= 5


def test_where_memory_is_short_requests_wait(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has become short since the cache was made, and until there is more again; texts are the same."""
    llm = build(tiny_folder, max_seq_len=256, max_batch_size=8)
    llm.tokenizer.stop_tokens = frozenset()
    prompts = random_tokens(8, 60, vocab_size=256).tolist()
    expected = llm.generate(prompts, 100, temperature=0)
    pool = llm.engine.scheduler.pool
    page = llm.engine.room.runners[0].cache.nbytes // pool.n_pages
    shape = BatchShape(8, 60, 160)
    beside = activation_bytes(llm.model.args, llm.model.parallel, torch.float32, backend_of(llm.model), shape)
    for n_pages in (40, 25, 70):
        # What is used is not free, as the system would say.
        monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args, n=n_pages: beside + (n - pool.n_used) * page)
        most = 0
        for _ in llm.stream(prompts, 100, temperature=0):
            most = max(most, pool.n_held)
        assert 10 <= most <= n_pages
        assert llm.generate(prompts, 100, temperature=0) == expected


def test_memory_follows_the_tokens_that_are_held(tiny_folder: Path) -> None:
    """32 rows of 100 tokens take their pages, not 32 times the longest text."""
    llm = build(tiny_folder, max_seq_len=8192, max_batch_size=32)
    llm.tokenizer.stop_tokens = frozenset()
    prompts = random_tokens(32, 60, vocab_size=256).tolist()
    llm.generate(prompts, 40)
    assert llm.engine.scheduler.pool.n_touched <= 1.1 * (1 + 32 * 7)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what memory is resident")
def test_memory_is_given_back_when_nothing_runs(tiny_folder: Path) -> None:
    """But for pages that are kept; and what was never written was never taken."""
    model_args = ModelArgs(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=512, hidden_dim=64)
    args = dataclasses.replace(model_args, max_seq_len=1024, max_batch_size=16)
    llm = Llama(transformer(args, random_state(model_args)), build(tiny_folder).tokenizer)
    llm.tokenizer.stop_tokens = frozenset()
    llm.generate([[5]], 1)
    page = llm.engine.room.runners[0].cache.nbytes // llm.engine.room.runners[0].cache.n_pages
    before = resident()
    assert "nh" in flags_of(llm.engine.room.runners[0].cache.keys), "huge pages take memory where nothing is written"
    for _ in range(2):
        prompts = random_tokens(16, 250, vocab_size=256, seed=4).tolist()
        streams = llm.stream(prompts, 100)
        for _ in range(50):
            next(streams)
        at_work = resident()
        streams.close()  # type: ignore[attr-defined]
        pages = 16 * 16
        assert pages * page <= at_work - before + 20_000_000
        assert at_work - before <= 1.1 * pages * page + 60_000_000
        assert resident() - before <= 2 * 64 * page + 60_000_000


def resident() -> int:
    """Bytes of memory that are resident and of no file: how much of libraries is, the system decides at any moment."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def flags_of(tensor: torch.Tensor) -> list[str]:
    """The system's flags of the memory that a tensor is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, stop = (int(end, 16) for end in first.split("-"))
            inside = start <= tensor.data_ptr() < stop
        elif inside and first == "VmFlags:":
            return rest
    return []
