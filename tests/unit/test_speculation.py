"""Speculation changes how many positions run together and nothing else: tokens, scores, ends and seeds stay."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine import speculative
from llama.engine.options import BuildOptions
from llama.engine.runner import EagerRunner
from llama.engine.sequence import Chunk
from llama.engine.speculative import DraftLengthController, NgramProposer
from llama.rope_scaling import DynamicScaling
from tests.checkpoints import TINY, chain_state, random_state, write_meta, write_model_and_draft
from tests.models import BYTE_BOS, build, random_tokens, transformer

WAYS = ["lookup", "draft", "same"]
PROMPTS = [
    [BYTE_BOS, *b"one two three, one two three, one"],
    [BYTE_BOS, *b"ab"],
    [7] * 20,
    random_tokens(17, vocab_size=256, seed=5).tolist(),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that go in circles at times and end at times, and a draft of fewer layers that is right at times."""
    return write_model_and_draft(tmp_path_factory.mktemp("speculation"))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess in every step, and never rest, so that what is tested happens."""
    monkeypatch.setattr(DraftLengthController, "next_draft_len", lambda self: 5)


def build_way(folders: dict[str, Path], way: str | None, **options: Any) -> Llama:
    if way == "lookup":
        options["speculate"] = "lookup"
    elif way is not None:
        options["draft_ckpt_dir"] = folders["draft" if way == "draft" else "model"]
    return build(folders["model"], **{"max_seq_len": 96, "max_batch_size": 3, **options})


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.1, "top_p": 0.95, "seed": 3}], ids=str)
def test_tokens_and_scores_are_those_of_plain_steps(
    folders: dict[str, Path], way: str, options: dict[str, Any]
) -> None:
    """In ragged batches whose rows end apart, accept apart and move; alone; and up to the end of the cache."""
    plain, guessing = build_way(folders, None), build_way(folders, way)
    for prompts, max_gen_len in ((PROMPTS, None), (PROMPTS[:1], None), (PROMPTS[2:3], 7), (PROMPTS, 11)):
        expected, expected_scores = plain.generate(prompts, max_gen_len, logprobs=True, echo=True, **options)
        found, scores = guessing.generate(prompts, max_gen_len, logprobs=True, echo=True, **options)
        assert found == expected
        assert scores is not None and expected_scores is not None
        for row, wanted in zip(scores, expected_scores, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
    metrics = guessing.metrics
    assert 0 < metrics.accepted <= metrics.proposed
    assert metrics.decoded_tokens == plain.metrics.decoded_tokens
    # As many steps as before are taken where the row that ends last has no guess that is right.
    assert metrics.decode_steps <= plain.metrics.decode_steps


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_draft_that_is_the_model_is_always_right(folders: dict[str, Path], temperature: float) -> None:
    """Sampled, too: it draws with the same random numbers. Only the tokens after an end are in vain."""
    llm = build_way(folders, "same")
    llm.generate(PROMPTS[2:3], 19, temperature=temperature, top_p=0.95, seed=4)
    assert llm.metrics.proposed == llm.metrics.accepted == 15
    assert llm.metrics.decode_steps == 3


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_sampled_tokens_have_the_distribution_of_the_model(
    folders: dict[str, Path], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third token of a row, of 1,500 rows, against the sum over all pairs before it."""
    monkeypatch.setattr(speculative, "MAX_SPECULATIVE_POSITIONS", 4 * 250)  # as many a row as otherwise with four rows
    args = dataclasses.replace(TINY, vocab_size=5, n_layers=1)
    state = random_state(args, seed=2)
    model = transformer(dataclasses.replace(args, max_seq_len=16, max_batch_size=250), state)
    prompt = [1, 2, 3, 1, 2]
    texts = torch.tensor([[*prompt, *pair] for pair in itertools.product(range(5), repeat=2)])
    with torch.inference_mode():
        probs = model(texts, torch.zeros(25, dtype=torch.long), model.new_cache(25, 7)).softmax(-1)
    first, second, third = probs[0, 4], probs[::5, 5], probs[:, 6].unflatten(0, (5, 5))
    expected = torch.einsum("i,ij,ijk->k", first, second, third)

    tokenizer = build(folders["model"]).tokenizer
    tokenizer.stop_tokens = frozenset()
    draft = transformer(args, random_state(args, seed=3)) if way == "draft" else None
    llm = Llama(model, tokenizer, speculate=None if draft else "lookup", draft=draft)
    rows, _ = llm.generate([prompt] * 1500, 4, temperature=1.0, top_p=1.0, seed=1)
    counts = torch.bincount(torch.tensor([row[2] for row in rows]), minlength=5)
    assert 0 < llm.metrics.accepted < llm.metrics.proposed
    chi_square = float(((counts - 1500 * expected) ** 2 / (1500 * expected)).sum())
    assert chi_square < 18.5, (counts, 1500 * expected)  # 4 degrees of freedom: p = 0.001


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("end", "tokens"), [(7, [5, 6]), (6, [5]), (5, [])])
def test_a_stop_token_within_a_right_guess_ends_the_row(tmp_path: Path, end: int, tokens: list[int]) -> None:
    """What was guessed and right beyond it is not said."""
    write_meta(tmp_path, state=chain_state(TINY, {5: 6, 6: 7, 7: 8, 8: 5}))
    llm = build(tmp_path, max_seq_len=64, speculate="lookup")
    llm.tokenizer.stop_tokens = frozenset({end})
    prompt = [5, 6, 7, 8] * 3
    ends = [step.finish_reason for step in llm.stream([prompt], 20, temperature=0)]
    assert len(ends) == len(tokens) + 1 and ends[-1] == "stop"
    assert llm.generate([prompt], 20, temperature=0)[0] == [tokens]


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_a_limit_within_a_right_guess_ends_the_row(tmp_path: Path) -> None:
    write_meta(tmp_path, state=chain_state(TINY, {5: 6, 6: 7, 7: 8, 8: 5}))
    prompt = [5, 6, 7, 8] * 3
    for max_seq_len in (14, 16, 17, 24):
        llm = build(tmp_path, max_seq_len=max_seq_len, speculate="lookup")
        for max_gen_len in (1, 2, 3, 9, None):
            tokens = llm.generate([prompt, [8]], max_gen_len, temperature=0)[0]
            for row, length in zip(tokens, (12, 1), strict=True):
                room = max_seq_len - length
                wanted = room if max_gen_len is None else min(room, max_gen_len)
                assert row == list(itertools.islice(itertools.cycle([5, 6, 7, 8]), wanted))


@pytest.mark.usefixtures("eager")
def test_logits_that_are_not_numbers_are_told_with_their_place(tmp_path: Path) -> None:
    state = chain_state(TINY, {5: 6, 6: 7, 7: 8, 8: 9, 9: 10})
    state["tok_embeddings.weight"][8] = torch.nan
    write_meta(tmp_path, state=state)
    llm = build(tmp_path, max_seq_len=64, speculate="lookup")
    with pytest.raises(ValueError, match="prompt 0: the logits are NaN or infinite after 4 tokens"):
        llm.generate([[5]], 9, temperature=0)


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_dynamic_scaling_takes_plain_steps_beyond_its_context(folders: dict[str, Path]) -> None:
    """A key's rotation depends on the row's length when it was written: guesses would change it."""
    args = dataclasses.replace(TINY, rope_scaling=DynamicScaling(4.0, 32), max_seq_len=64, max_batch_size=2)
    tokenizer = build(folders["model"]).tokenizer
    model = transformer(args, random_state(TINY))
    plain, guessing = Llama(model, tokenizer), Llama(model, tokenizer, speculate="lookup")
    assert guessing.generate(PROMPTS, 40, temperature=0) == plain.generate(PROMPTS, 40, temperature=0)
    assert guessing.metrics.proposed == 0
    guessing.generate(PROMPTS[2:3], 10, temperature=0)
    assert guessing.metrics.proposed > 0


def test_another_vocabulary_is_refused_by_name(folders: dict[str, Path], tmp_path: Path, llama2_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"draft model in .* another vocabulary \(400 tokens\) than .* \(512 tokens\)"):
        build(folders["model"], draft_ckpt_dir=llama2_folder)
    write_meta(tmp_path)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines(keepends=True)
    first, second = (line.split()[0] for line in lines[:2])
    lines[:2] = [second + b" 0\n", first + b" 1\n"]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"another vocabulary \(512 tokens\) than the model \(512 tokens\)"):
        build(folders["model"], draft_ckpt_dir=tmp_path)


def test_wrong_choices_are_told_before_anything_is_read(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="speculate must be lookup, or left out, got 'medusa'"):
        Llama.build("nowhere", speculate="medusa")
    model, tokenizer = transformer(TINY, random_state(TINY)), build(folders["model"]).tokenizer
    with pytest.raises(ValueError, match="speculate must be lookup, or left out, got 'medusa'"):
        Llama(model, tokenizer, speculate="medusa")
    with pytest.raises(ValueError, match="give one of them"):
        Llama(model, tokenizer, speculate="lookup", draft=model)
    with pytest.raises(ValueError, match="give one of them"):
        BuildOptions("nowhere", speculate="lookup", draft_ckpt_dir="some/folder")


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),
        ([1, 2, 9, 5, 1, 2, 3, 1, 2], [3, 1, 2, 3]),  # of two places, the later one; then round in a circle
        ([4, 1, 2, 9, 5, 1, 2, 3, 4, 1, 2], [9, 5, 1, 2]),  # but the one with more tokens before it
        ([6, 6, 6], [6, 6, 6, 6]),
        ([1, 2, 3, 2], []),  # one token alone says too little
        ([1], []),
    ],
    ids=str,
)
def test_lookup_goes_on_as_after_the_last_place_with_the_same_tokens(text: list[int], guess: list[int]) -> None:
    assert NgramProposer().continuation(text, 4) == guess


@pytest.mark.slow
def test_guesses_that_cost_more_than_they_give_rest(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only steps move: a second each, and more for each guess."""
    clock = {"now": 0.0, "more": 0.0}
    launch = EagerRunner.launch

    def timed(self: EagerRunner, chunks: list[Chunk], announced: int = 0) -> None:
        clock["now"] += 1 + clock["more"] * max(chunk.n_drafts for chunk in chunks)
        launch(self, chunks, announced)

    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr(EagerRunner, "launch", timed)
    options = {"temperature": 0, "max_gen_len": 400}
    results = {}
    for more in (0.0, 3.0):
        clock["more"] = more
        llm = build_way(folders, "lookup", max_seq_len=512)
        llm.tokenizer.stop_tokens = frozenset()
        llm.generate(PROMPTS[2:3], **options)
        results[more] = llm.metrics
    assert results[0.0].backoff_tokens == 0
    assert results[0.0].speculation_gain > 2
    assert results[3.0].backoff_tokens > 200
    assert 0.6 < results[3.0].speculation_gain < 1
