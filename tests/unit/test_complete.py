"""`llama complete` in this process: what is printed, written and told for new flags, on a tiny model."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from llama.cli.complete import main
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams
from tests.checkpoints import write_meta
from tests.unit.test_token_page import Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_meta(folder)
    return folder


def options(folder: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(folder, device="cpu", **{"max_seq_len": 64, **changes})


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_gen_len": 6, "temperature": 0.0, **changes})


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": ["a", "b" * 70]}, "prompt 2 of 2 has 71 tokens, max_seq_len is 64: raise it or shorten the prompt"),
        ({"params": params(stop_token_ids=(512,))}, "stop_token_ids has token 512: ids are integers, 0 to 511"),
        ({"params": params(logit_bias={-1: 2})}, "logit_bias has token -1: ids are integers, 0 to 511"),
        ({"html": Path("/nowhere/page.html")}, "--html /nowhere/page.html: there is no folder /nowhere"),
        ({"json": True, "show_probs": True}, "--show_probs is for people and --json for programs"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_what_cannot_run_is_told_before_weights_are_read(
    changes: dict[str, Any], error: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """A prompt that was too long was told after minutes of loading, and an id beyond the vocabulary never was."""
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match=error):
        main(options(folder), **{"params": params(), "prompt": ["a"], **changes})
    assert capsys.readouterr().out == "" and not any("loaded" in message for message in caplog.messages)


def test_several_samples_and_the_likeliest_tokens_come_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(options(folder), params(n=2, temperature=1.0, logprobs=True, top_logprobs=3), prompt=["a", "b"], json=True)
    found = lines(capsys)
    assert [(each["prompt"], each["sample"]) for each in found] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    for each in found:
        assert len(each["tokens"]) == len(each["logprobs"]) == len(each["top_logprobs"])
        for token, score, top in zip(each["tokens"], each["logprobs"], each["top_logprobs"], strict=True):
            assert len(top) == 3 and top == sorted(top, key=lambda one: -one["logprob"])
            assert top[0]["logprob"] >= score
            if token.isascii():  # bytes that are no character by themselves are all U+FFFD
                assert all(one["logprob"] == pytest.approx(score) for one in top if one["token"] == token)
    assert found[0]["generation"] != found[1]["generation"]


def test_a_page_changes_nothing_that_is_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page asks for scores, which other outputs have only where flags ask for them."""
    pages = tmp_path / "page.html"
    main(options(folder), params(n=2, temperature=1.0), prompt=["a<b", "c"], json=True)
    plain = lines(capsys)
    main(options(folder), params(n=2, temperature=1.0), prompt=["a<b", "c"], json=True, html=pages)
    assert lines(capsys) == plain and set(plain[0]) == {"prompt", "sample", "generation", "tokens", "finish_reason"}
    page = Reader(pages.read_text(encoding="utf-8"))
    assert page.texts["prompt"] == ["a<b", "c"]
    assert len(page.texts["t"]) == len(page.texts["a"]) == sum(len(each["tokens"]) for each in plain)


def test_probabilities_are_a_table_where_there_are_no_colours(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    main(options(folder), params(logprobs=True), prompt=["a"], json=True)
    (scored,) = lines(capsys)
    main(options(folder), params(), prompt=["a"], show_probs=True)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    scores = zip(scored["tokens"], scored["logprobs"], strict=True)
    table = "".join(f"{100 * math.exp(score):8.2f}%  {token!r}\n" for token, score in scores)
    assert out.startswith(f"a\n> {scored['generation']}\n{table}\n===")
    assert "--show_probs prints tables, as stdout has no colours: it is no terminal" in caplog.messages


@pytest.mark.parametrize("echo", [False, True])
def test_the_report_says_how_full_the_context_is(
    echo: bool, folder: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """Of the longest text; an echo is no part of the completion."""
    caplog.set_level(logging.INFO)
    main(options(folder), params(n=2, ignore_eos=True, echo=echo), prompt=["a", "bcd"], json=True)
    assert capsys.readouterr().out.count("\n") == 4
    assert caplog.messages[-1].endswith("; context: prompt 4 + completion 6 of 64 tokens")
