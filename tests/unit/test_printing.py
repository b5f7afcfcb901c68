"""What is printed when: results in order, each as soon as it can be, in every encoding."""

from __future__ import annotations

import io
import json
import math
import sys
from typing import cast

import pytest

from llama.cli.printing import RULE, ResultPrinter, json_line, score_table
from llama.outputs import CompletionPrediction, TokenEvent, TopToken


def predict(index: int, events: list[TokenEvent]) -> CompletionPrediction:
    return CompletionPrediction(generation="".join(event.text for event in events), tokens=[])


def token(index: int, text: str) -> TokenEvent:
    return TokenEvent(index, 0, text)


def end(index: int) -> TokenEvent:
    return TokenEvent(index, None, "", finish_reason="stop")


def test_a_result_is_out_when_it_and_those_before_it_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """All were once printed after the last had ended."""
    printer = ResultPrinter(["A", "B", "C", "D"], predict, json=True)
    shown = []
    for event in (token(1, "b"), end(1), token(0, "a"), token(3, "d"), end(3), end(0), token(2, "c"), end(2)):
        printer.add(event)
        shown.append([json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()])
    assert shown == [[], [], [], [], [], ["A", "B"], [], ["C", "D"]]
    printer.finish()
    assert capsys.readouterr().out == ""


def test_what_is_complete_is_printed_when_nothing_more_will_come(capsys: pytest.CaptureFixture[str]) -> None:
    printer = ResultPrinter(["A", "B", "C"], predict, json=True)
    for event in (token(0, "a"), token(1, "b"), token(2, "c"), end(2)):
        printer.add(event)
    assert capsys.readouterr().out == ""
    printer.finish()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"prompt": "C", "generation": "c", "tokens": []}
    ]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_text_whose_turn_it_is_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks like what a pipe gets in the end."""
    events = [token(0, "a"), token(1, "b"), token(0, "aa"), token(1, "bb"), end(0), token(1, "b"), end(1)]
    outputs = []
    for stdout in (Screen(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        printer = ResultPrinter(["A", "B"], predict, json=False)
        for i, event in enumerate(events):
            printer.add(event)
            if isinstance(stdout, Screen) and i in (2, 4):
                assert stdout.getvalue().endswith({2: "A\n> aaa", 4: "B\n> bbb"}[i])
        outputs.append(stdout.getvalue())
    assert outputs[0] == outputs[1] != ""


def test_a_pipe_gets_the_text_of_one_prompt_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever read it saw nothing until the last token."""
    printer = ResultPrinter(["A"], predict, json=False)
    shown = [capsys.readouterr().out]
    for event in (token(0, "a"), token(0, " b"), end(0)):
        printer.add(event)
        shown.append(capsys.readouterr().out)
    assert shown == ["A\n> ", "a", " b", f"\n{RULE}"]
    lines = ResultPrinter(["A"], predict, json=True)
    lines.add(token(0, "a"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stdout", [Screen(), io.StringIO()], ids=["terminal", "pipe"])
def test_several_results_of_a_prompt_are_numbered_below_it(
    stdout: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)
    printer = ResultPrinter(["A", "B"], predict, json=False, n=2)
    for event in (token(1, "a2"), token(0, "a1"), end(1), token(3, "b2"), end(0), token(2, "b1"), end(2), end(3)):
        printer.add(event)
    assert stdout.getvalue() == (
        f"A\n[1 of 2] > a1\n[2 of 2] > a2\n{RULE}" + f"B\n[1 of 2] > b1\n[2 of 2] > b2\n{RULE}"
    )


def test_json_numbers_several_results_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    printer = ResultPrinter(["A", "B"], predict, json=True, n=2)
    for index in (1, 0, 2, 3):
        printer.add(end(index))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["prompt"], each["sample"]) for each in found] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]


def test_a_table_has_what_was_asked_for_of_each_token() -> None:
    """The likeliest tokens come in the unit that a line begins with."""
    top = [[{"token": "a", "id": 5, "logprob": math.log(0.5)}, {"token": "\n", "id": 6, "logprob": math.log(0.25)}], []]
    plain = CompletionPrediction(tokens=["\n", "b"], logprobs=[math.log(0.25), math.log(0.002)])
    full = CompletionPrediction(**plain, top_logprobs=cast(list[list[TopToken]], top))
    assert score_table(plain, logprobs=True) == "   -1.3863  '\\n'\n   -6.2146  'b'\n"
    assert score_table(full, probabilities=True) == "   25.00%  '\\n'  of 'a' 50.00%, '\\n' 25.00%\n    0.20%  'b'\n"
    both = score_table(full, logprobs=True, probabilities=True).splitlines()
    assert both[0] == "   -1.3863   25.00%  '\\n'  of 'a' -0.6931, '\\n' -1.3863"
    assert score_table(CompletionPrediction(tokens=["a"]), logprobs=True) == ""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_is_json_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""A character that the encoding lacks once became \xe9 or \U0001f642, which JSON knows nothing of."""
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stdout)
    value = {"prompt": "né 🙂", "tokens": ["\x85"]}
    print(json_line(value), flush=True)
    assert json.loads(written.getvalue()) == value  # bytes: JSON's own encodings, or ASCII
    assert ("🙂".encode() in written.getvalue()) == (encoding == "utf-8")
