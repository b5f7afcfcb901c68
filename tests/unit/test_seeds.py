"""A row's text follows from its seed and its place alone, and calls go on where the last one stopped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from llama.sampling import uniforms
from tests.checkpoints import TINY, random_state, write_meta
from tests.models import build

PROMPT = [256, 72, 105]
OTHERS = [[256], [5] * 20, [300, 301, 302]]
HOT = {"temperature": 1.2, "top_p": 1.0}


def test_two_calls_differ_and_a_new_model_repeats_them(tiny_folder: Path) -> None:
    """As with the global generator of Meta's code, which every call moves on."""
    llm = build(tiny_folder)
    first, second = (llm.generate([PROMPT], 12, **HOT)[0] for _ in range(2))
    assert first != second
    again = build(tiny_folder)
    assert [again.generate([PROMPT], 12, **HOT)[0] for _ in range(2)] == [first, second]


@pytest.mark.slow
def test_one_call_with_two_prompts_is_two_calls_with_one(tiny_folder: Path) -> None:
    """The running count counts rows, so a service may batch as it likes."""
    one, other = build(tiny_folder), build(tiny_folder)
    together = one.generate([PROMPT] * 5, 12, **HOT)[0] + one.generate([PROMPT] * 2, 12, **HOT)[0]
    assert [other.generate([PROMPT], 12, **HOT)[0][0] for _ in range(7)] == together
    assert len({tuple(row) for row in together}) == 7


def test_every_token_is_drawn_with_a_random_number_of_its_own(tmp_path: Path) -> None:
    """Where all tokens are as likely, a uniform is a token."""
    state = random_state(TINY)
    state["output.weight"].zero_()
    write_meta(tmp_path, state=state)
    tokens, _ = build(tmp_path, max_seq_len=32).generate([[5]] * 6, 20, temperature=1.0, top_p=1.0, seed=11)
    for place, row in enumerate(tokens):
        drawn = [int(512 * uniform) for uniform in uniforms(11, place, 20).tolist()]
        assert row == list(itertools.takewhile(lambda token: token not in (257, 264, 265), drawn))
    assert sum(len(row) == 20 for row in tokens) >= 3


def test_a_call_with_a_seed_is_reproducible_by_itself(tiny_folder: Path) -> None:
    """Whatever ran before it, and it does not move the running count."""
    llm = build(tiny_folder)
    expected = llm.generate([PROMPT], 12, seed=5, **HOT)
    llm.generate(OTHERS, 3, **HOT)
    assert llm.generate([PROMPT], 12, seed=5, **HOT) == expected
    assert llm.generate([PROMPT], 12, seed=6, **HOT) != expected
    one, two = build(tiny_folder), build(tiny_folder)
    one.generate([PROMPT], 3, seed=9, **HOT)
    assert one.generate([PROMPT], 12, **HOT) == two.generate([PROMPT], 12, **HOT)


def test_the_build_seed_is_the_first_of_the_calls(tiny_folder: Path) -> None:
    assert build(tiny_folder).seed == 1
    first = build(tiny_folder, seed=5).generate([PROMPT], 12, **HOT)
    assert first == build(tiny_folder, seed=7).generate([PROMPT], 12, seed=5, **HOT)
    assert first != build(tiny_folder, seed=7).generate([PROMPT], 12, **HOT)


@pytest.mark.parametrize("options", [HOT, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_a_rows_text_does_not_depend_on_its_batch_mates(tiny_folder: Path, options: dict[str, float]) -> None:
    llm = build(tiny_folder)
    expected = llm.generate([PROMPT], 12, seed=5, **options)[0][0]
    for mates in (OTHERS[:1], OTHERS, [PROMPT] * 5):
        assert llm.generate([PROMPT, *mates], 12, seed=5, **options)[0][0] == expected


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
def test_texts_do_not_depend_on_max_batch_size(tiny_folder: Path, max_batch_size: int) -> None:
    prompts = [PROMPT, *OTHERS, PROMPT]
    expected = build(tiny_folder).generate(prompts, 12, **HOT)
    assert build(tiny_folder, max_batch_size=max_batch_size).generate(prompts, 12, **HOT) == expected


def test_a_shorter_limit_only_cuts_the_text(tiny_folder: Path) -> None:
    llm = build(tiny_folder)
    whole = llm.generate([PROMPT], 60, seed=5, **HOT)[0][0]
    for max_gen_len in (1, 7, 15, 16, 17, 40):
        assert llm.generate([PROMPT], max_gen_len, seed=5, **HOT)[0][0] == whole[:max_gen_len]
    short = build(tiny_folder, max_seq_len=32).generate([PROMPT], None, seed=5, **HOT)[0][0]
    assert short == whole[:29]


def test_the_global_generator_neither_matters_nor_moves(tiny_folder: Path) -> None:
    llm = build(tiny_folder)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = llm.generate([PROMPT], 12, seed=5, **HOT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert llm.generate([PROMPT], 12, seed=5, **HOT) == first


def test_temperature_zero_ignores_every_seed(tiny_folder: Path) -> None:
    llm = build(tiny_folder)
    texts = [llm.generate([PROMPT], 12, temperature=0, top_p=0.1, seed=seed) for seed in (None, 1, 2)]
    assert texts[0] == texts[1] == texts[2]
