"""Where a generation ends and why, and that no row of a batch disturbs another."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama, sampling
from llama.engine import sequence
from tests.checkpoints import TINY, chain_state, random_state, write_meta
from tests.models import BYTE_BOS, BYTE_EOS, build, one_pass, random_tokens

EOT = 265  # <|eot_id|>: the ranks are 256 bytes, and it is the tenth token after them
PROMPTS = [
    row[:length]
    for row, length in zip(random_tokens(7, 30, vocab_size=256, seed=5).tolist(), (9, 1, 30, 4, 2, 17, 25), strict=True)
]


@pytest.fixture(scope="module")
def restless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often says an end token, as random weights do not."""
    folder = tmp_path_factory.mktemp("restless")
    state = random_state(TINY)
    state["output.weight"][BYTE_EOS] *= 1.6
    state["output.weight"][EOT] *= 1.6
    write_meta(folder, state=state)
    return folder


def reasons(llm: Llama, prompts: list[list[int]], *arguments: Any, **options: Any) -> list[str | None]:
    ends = {step.index: step.finish_reason for step in llm.stream(prompts, *arguments, **options) if step.token is None}
    return [ends[row] for row in range(len(prompts))]


@torch.inference_mode()
def test_greedy_tokens_are_the_greatest_logits_of_one_pass(llama: Llama) -> None:
    """Without cache, batch or padding: the whole text again for each token."""
    tokens, _ = llama.generate(PROMPTS[:4], 8, temperature=0)
    for prompt, found in zip(PROMPTS[:4], tokens, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(one_pass(llama.model, torch.tensor([text]))[0, -1].argmax()))
        assert found == text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.95, "seed": 4}], ids=str)
def test_rows_that_end_early_do_not_disturb_the_others(restless_folder: Path, options: dict[str, Any]) -> None:
    """A row that ends gives its place in the cache to the last one; every prompt here ends after another length."""
    llm = build(restless_folder, max_seq_len=48, max_batch_size=7)
    together, scores = llm.generate(PROMPTS, None, logprobs=True, **options)
    lengths = {len(tokens) for tokens in together}
    ends = reasons(llm, PROMPTS, None, **options)
    assert len(lengths) >= 5 and set(ends) == {"stop", "length"}, "the prompts no longer end apart"
    assert scores is not None
    for row, prompt in enumerate(PROMPTS):
        # In its place, so that it draws the same random numbers; the others end at once.
        others = [prompt if i == row else [BYTE_BOS] * 47 for i in range(7)]
        alone, alone_scores = llm.generate(others, None, logprobs=True, **options)
        assert alone[row] == together[row]
        assert alone_scores is not None
        assert alone_scores[row] == pytest.approx(scores[row], abs=1e-5)


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 6])
def test_more_prompts_than_max_batch_size_come_out_in_order(restless_folder: Path, max_batch_size: int) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 4}
    together = build(restless_folder, max_seq_len=48, max_batch_size=7).generate(PROMPTS, 12, **options)
    assert (
        build(restless_folder, max_seq_len=48, max_batch_size=max_batch_size).generate(PROMPTS, 12, **options)
        == together
    )


@pytest.mark.parametrize("end", [BYTE_EOS, EOT, 264], ids=["end_of_text", "eot_id", "eom_id"])
def test_every_stop_token_ends_a_row_and_is_not_in_it(tmp_path: Path, end: int) -> None:
    """<|eot_id|> was once ignored, and Llama 3 talked on as its own user."""
    write_meta(tmp_path, state=chain_state(TINY, {5: 6, 6: 7, 7: end, end: 5}))
    llm = build(tmp_path, max_seq_len=32)
    assert llm.generate([[5]], 20, temperature=0)[0] == [[6, 7]]
    assert reasons(llm, [[5]], 20, temperature=0) == ["stop"]


def test_max_gen_len_ends_a_row_with_length(tmp_path: Path) -> None:
    write_meta(tmp_path, state=chain_state(TINY, {5: 6, 6: 7, 7: BYTE_EOS}))
    llm = build(tmp_path, max_seq_len=32)
    for max_gen_len, tokens, reason in ((1, [6], "length"), (2, [6, 7], "length"), (3, [6, 7], "stop")):
        assert llm.generate([[5]], max_gen_len, temperature=0)[0] == [tokens]
        assert reasons(llm, [[5]], max_gen_len, temperature=0) == [reason]


def test_an_end_token_as_the_first_word_is_an_empty_generation(tmp_path: Path) -> None:
    write_meta(tmp_path, state=chain_state(TINY, {5: BYTE_EOS}))
    llm = build(tmp_path, max_seq_len=32)
    assert llm.generate([[5]], 4, temperature=0, logprobs=True) == ([[]], [[]])
    assert llm.text_completion(["\x05"], temperature=0) == [{"generation": "", "tokens": [], "finish_reason": "stop"}]


@pytest.mark.slow
@pytest.mark.parametrize("max_gen_len", [None, 100])
def test_max_seq_len_holds_prompt_and_generation(llama: Llama, max_gen_len: int | None) -> None:
    prompts = [[7] * length for length in (1, 30, 62, 63)]
    tokens, _ = llama.generate(prompts, max_gen_len, temperature=0)
    assert [len(row) for row in tokens] == [63, 34, 2, 1]
    assert reasons(llama, prompts, max_gen_len, temperature=0) == ["length"] * 4


@pytest.mark.parametrize("speculate", [None, "lookup"])
def test_a_prompt_of_max_seq_len_is_an_empty_generation_and_disturbs_no_other(
    restless_folder: Path, speculate: str | None
) -> None:
    """Meta's code takes it; ours refused the whole list."""
    llm = build(restless_folder, max_seq_len=64, max_batch_size=3, speculate=speculate)
    prompts = [[7] * 64, [5, 6], [8] * 64, [9], [7] * 63, [4] * 64]
    tokens, scores = llm.generate(prompts, 8, seed=3, logprobs=True)
    assert scores is not None and [len(row) for row in scores] == [len(row) for row in tokens]
    assert [tokens[i] for i in (0, 2, 5)] == [[]] * 3 and len(tokens[4]) == 1 and len(tokens[1]) == 8
    for i in (1, 3, 4):
        others = [prompts[i] if j == i else [5] for j in range(6)]
        assert llm.generate(others, 8, seed=3)[0][i] == tokens[i]
    assert [each for i, each in enumerate(reasons(llm, prompts, 8, seed=3)) if not tokens[i]] == ["length"] * 3
    assert llm.generate([[7] * 64]) == ([[]], None)


def test_a_prompt_of_max_seq_len_can_be_scored(llama: Llama) -> None:
    prompt = [7] * 64
    tokens, scores = llama.generate([prompt], 0, logprobs=True, echo=True)
    assert tokens == [prompt] and scores is not None and len(scores[0]) == 64
    with pytest.raises(ValueError, match="prompt 0 has 65 tokens"):
        llama.generate([[7] * 65], 0)


def test_max_gen_len_zero_generates_nothing(llama: Llama) -> None:
    assert llama.generate([[5, 6], [7]], 0) == ([[], []], None)
    assert reasons(llama, [[5, 6], [7]], 0) == ["length", "length"]
    assert llama.text_completion(["ab"], max_gen_len=0, echo=True)[0]["generation"] == "ab"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "list of prompts is empty"),
        ([[5], []], "prompt 1 has no tokens"),
        ([[5], [6, 512]], "prompt 1 has token 512: ids are integers, 0 to 511"),
        ([[-1]], "prompt 0 has token -1"),
        ([[5, True]], "prompt 0 has token True: ids are integers"),
        ([[5.0]], "prompt 0 has token 5.0: ids are integers"),
        (torch.tensor([[5.0]]), "prompt 0 has token 5.0: ids are integers"),
        (torch.tensor([[[5]]]), r"prompt 0 has token \[5\]: ids are integers"),
        (torch.tensor([5, 6]), r"prompt 0 must be a list of token ids, got tensor\(5\): put it in a list"),
        (np.array([5, 6]), "prompt 0 must be a list of token ids, got .*5.*: put it in a list"),
        (5, "prompts must be a list of lists of token ids, got 5"),
        ({5: 6}, "prompts must be a list of lists of token ids, got {5: 6}"),
        ([[5], [7] * 65], "prompt 1 has 65 tokens, max_seq_len is 64: raise it or shorten the prompt"),
    ],
    ids=str,
)
def test_wrong_prompts_are_told_before_anything_runs(llama: Llama, prompts: Any, said: str) -> None:
    """A stream is lazy; its errors are not."""
    with pytest.raises(ValueError, match=said):
        llama.stream(prompts, 4)
    with pytest.raises(ValueError, match=said):
        llama.generate(prompts, 4)
    assert llama.metrics.prompt_tokens == 0


def test_ids_may_be_arrays_and_tensors(llama: Llama) -> None:
    """They were refused by "prompt 0 has token tensor(5)", or by an error of torch."""
    wanted = llama.generate([[5, 6], [7, 8]], 4, temperature=0)
    as_arrays: list[Any] = [
        np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]]), [np.array([5, 6], np.uint16), torch.tensor([7, 8])],
        [(np.int32(5), torch.tensor(6)), range(7, 9)], ((5, 6), (7, 8)), iter([iter([5, 6]), [7, 8]]),
    ]  # fmt: skip
    for prompts in as_arrays:
        assert llama.generate(prompts, 4, temperature=0) == wanted


def test_a_stop_token_of_ones_own_stands_in_for_the_tokenizers(tmp_path: Path) -> None:
    """As in Code Llama's generate, whose infilling ends at <EOT> alone."""
    write_meta(tmp_path, state=chain_state(TINY, {5: 65, 65: EOT, EOT: 66, 66: 67, 67: 68}))
    llm = build(tmp_path, max_seq_len=32)
    assert llm.generate([[5]], 8, temperature=0)[0] == [[65]]
    assert llm.generate([[5]], 8, 0, 0.9, False, False, 67)[0] == [[65, EOT, 66]]
    assert llm.generate([[5]], 8, temperature=0)[0] == [[65]]


def test_a_single_text_is_not_taken_for_a_list_of_characters(llama: Llama) -> None:
    with pytest.raises(ValueError, match="put it in a list"):
        llama.text_completion("Hello")
    with pytest.raises(ValueError, match="list"):
        llama.generate("Hello", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list"):
        llama.generate(["Hello"], 4)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="list"):
        llama.generate([5, 6, 7], 4)  # type: ignore[list-item]


def test_an_empty_text_is_continued_from_the_begin_token(llama: Llama) -> None:
    expected = llama.generate([[BYTE_BOS]], 5, temperature=0)[0][0]
    assert [step.token for step in llama.stream(llama.encode_prompts([""]), 5, temperature=0)][:-1] == expected
    assert len(llama.text_completion([""], temperature=0, max_gen_len=5)[0]["tokens"]) == 5


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_logits_that_are_not_numbers_are_an_error_that_says_so(tmp_path: Path, temperature: float) -> None:
    state = random_state(TINY)
    state["norm.weight"][3] = torch.nan
    write_meta(tmp_path, state=state)
    llm = build(tmp_path, max_seq_len=32)
    with pytest.raises(ValueError, match=r"prompt 0: the logits are NaN or infinite after 2 tokens.* --dtype float32"):
        llm.generate([[5, 6], [7]], 4, temperature=temperature)


def test_one_row_without_numbers_is_named(tmp_path: Path) -> None:
    state = random_state(TINY)
    state["tok_embeddings.weight"][99] = torch.inf
    write_meta(tmp_path, state=state)
    llm = build(tmp_path, max_seq_len=32)
    llm.generate([[5, 6], [7]], 4, temperature=0)
    with pytest.raises(ValueError, match="prompt 1: the logits are NaN or infinite after 3 tokens"):
        llm.generate([[5, 6], [7, 99, 8]], 4, temperature=0)


def test_a_stream_may_be_left_and_another_begun(llama: Llama) -> None:
    expected = llama.generate([[5, 6]], 6, temperature=0)[0]
    abandoned = llama.stream([[9, 9, 9], [8]], 6, temperature=0)
    next(abandoned)
    assert llama.generate([[5, 6]], 6, temperature=0)[0] == expected
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert llama.generate([[5, 6]], 6, temperature=0)[0] == expected
    assert not torch.is_inference_mode_enabled()


def test_every_row_ends_with_one_step_that_has_no_token(llama: Llama) -> None:
    steps = list(llama.stream(PROMPTS, 5, temperature=0))
    for row in range(len(PROMPTS)):
        own = [step for step in steps if step.index == row]
        assert [step.token is None for step in own] == [False] * 5 + [True]
        assert [step.finish_reason for step in own] == [None] * 5 + ["length"]


def test_statistics_count_what_was_computed(llama: Llama) -> None:
    llama.generate([[5, 6, 7], [8]], 4, temperature=0)
    statistics = llama.metrics
    # The first token of each row comes out of its prefill.
    assert (statistics.prompt_tokens, statistics.decode_steps, statistics.decoded_tokens) == (4, 3, 6)
    assert statistics.prefill_seconds > 0 and statistics.decode_seconds > 0


def test_random_numbers_are_drawn_batch_by_batch(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long list of prompts once took gigabytes before its first token."""
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=2)
    drawn: list[int] = []
    draw = sampling.uniforms

    def counted(seed: int, index: int, count: int, sample: int) -> torch.Tensor:
        drawn.append(index)
        return draw(seed, index, count, sample)

    monkeypatch.setattr(sequence, "uniforms", counted)
    events = llm.stream([[5]] * 10, 3, temperature=1.0)
    assert not drawn
    next(events)
    assert len(drawn) == 2
    assert len(list(events)) > 10 and len(drawn) == 10


def test_a_prompt_whose_logits_are_invalid_is_told_before_any_token(tiny_folder: Path) -> None:
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=2)
    with torch.no_grad():
        llm.model.get_parameter("tok_embeddings.weight")[7] = torch.nan
    with pytest.raises(ValueError, match="prompt 1: the logits are NaN or infinite after 2 tokens"):
        next(llm.stream([[5, 6], [5, 7]], 3, echo=True))


def test_a_model_is_freed_when_nobody_uses_it(tiny_folder: Path) -> None:
    """Its backend once held it in a circle, so that the next model found the memory taken."""
    llm = build(tiny_folder, max_seq_len=64)
    llm.generate([[5]], 2)
    model = weakref.ref(llm.model)
    gc.disable()
    try:
        del llm
        assert model() is None
    finally:
        gc.enable()
