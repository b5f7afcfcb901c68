"""What is printed when: results in order, each as soon as it can be, in every encoding."""

from __future__ import annotations

import io
import json
import sys

import pytest

from llama.cli.printing import ResultPrinter, json_line
from llama.outputs import CompletionPrediction, TokenEvent


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
