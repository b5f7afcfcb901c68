"""Flags from the types of a function: dataclasses become a flag a field, values are verbatim, mistakes are named."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from llama.cli.complete import main as complete
from llama.cli.flags import Fields, Late, decode_text, flags_of, parse, section
from llama.cli.help import page
from llama.cli.main import ALONE, NAMES, dispatch, overview
from llama.cli.options import CHAT
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams


@dataclass(frozen=True)
class Engine:
    """What drives.

    Args:
        fuel: what it burns.
        cylinders: how many; default: as many as
            there is room for.
        turbo: breathe faster.
        seed: of the engine.
    """

    fuel: str
    cylinders: int | None = None
    turbo: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if self.fuel == "water":
            raise ValueError("fuel must burn, got 'water'")


@dataclass(frozen=True)
class Driver:
    """Who drives.

    Args:
        name: what they are called.
        seed: of the driver.
        speed: most km/h.
    """

    name: str = "Ada"
    seed: int | None = None
    speed: float = 50.0


def find_fuel() -> str:
    raise FileNotFoundError("no fuel here")


FUEL = Late("what is there", find_fuel)


def drive(
    engine: Annotated[Engine, Fields("the engine", words=["fuel"], defaults={"fuel": FUEL})],
    driver: Annotated[Driver, Fields("the driver", hidden=["seed", "name"], defaults={"name": "Bo", "speed": 80.0})],
    *,
    to: list[str] | None = None,
    map: Path | None = None,
) -> None:
    """Drive somewhere.

    Args:
        to: where.
        map: what to follow.

    Examples:
        llama drive petrol --to sea
    """


def test_a_dataclass_becomes_a_flag_a_field_and_comes_back_whole() -> None:
    words = ["petrol", "--turbo", "--cylinders", "4", "--speed=120", "--map", "x"]
    assert parse(drive, [*words, "--to", "a,b", "--to", '["None", "-"]']) == {
        "engine": Engine("petrol", 4, True),
        "driver": Driver("Bo", speed=120.0),
        "to": ["a,b", "None", "-"],
        "map": Path("x"),
    }


def test_a_command_changes_defaults_and_hides_fields() -> None:
    """Two objects may have a field of one name: the flag sets the one that is not hidden."""
    assert parse(drive, ["--fuel", "gas", "--seed", "7"]) == {
        "engine": Engine("gas", seed=7),
        "driver": Driver("Bo", None, 80.0),
    }
    assert list(flags_of(drive)) == ["fuel", "cylinders", "turbo", "seed", "speed", "to", "map"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--name", "Cy"], "unknown flag --name"),
        (["--cylnders", "4"], "unknown flag --cylnders: did you mean --cylinders?"),
        (["--cylinders", "four"], "--cylinders must be an integer, got 'four'"),
        (["--speed", "fast"], "--speed must be a number, got 'fast'"),
        (["--turbo=a bit"], "--turbo is on or off: give it alone, got 'a bit'"),
        (["petrol", "gas"], "unexpected argument 'gas'"),
        (["water"], "fuel must burn, got 'water'"),
        (["--speed"], "--speed needs a value"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_named_before_anything_is_looked_for(words: list[str], error: str) -> None:
    """A default that has to be found is not: its own error would hide the typing mistake."""
    with pytest.raises(ValueError, match=error.replace("?", r"\?")):
        parse(drive, words)


def test_a_text_that_was_typed_as_utf_8_is_read_as_it_in_any_locale() -> None:
    """In the C locale Python takes no byte beyond ASCII for a character, and valid prompts were called invalid."""
    typed = "caf\udcc3\udca9"
    arguments = parse(drive, ["--fuel", typed, "--to", typed, "--to", f'["{typed}", "x"]'])
    assert isinstance(arguments, dict)
    assert (arguments["engine"], arguments["to"]) == (Engine("café"), ["café", "café", "x"])
    for words in (["--fuel=gas", "--to", "caf\udce9"], ["--fuel", "caf\udce9"]):
        with pytest.raises(ValueError, match=rf"{words[-2]} is not valid UTF-8: 'caf\\udce9'"):
            parse(drive, words)


def test_bytes_that_are_no_utf_8_are_in_the_locales_encoding() -> None:
    assert [decode_text(data, "latin-1") for data in (b"caf\xc3\xa9", b"caf\xe9")] == ["café", "café"]
    with pytest.raises(UnicodeDecodeError, match="utf-8"):
        decode_text(b"caf\xe9", "ascii")


@pytest.mark.parametrize("words", [["--map=~/x"], ["--map", "~/x"]], ids=str)
def test_a_tilde_is_the_home_folder_in_every_path(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves --name=~/x as it is, and so did we, but for --ckpt_dir."""
    monkeypatch.setenv("HOME", "/home/ada")
    assert parse(drive, ["petrol", *words]) == {
        "engine": Engine("petrol"),
        "driver": Driver("Bo", speed=80.0),
        "map": Path("/home/ada/x"),
    }
    arguments = parse(complete, ["--ckpt_dir=~/a", "--tokenizer_path=~/b", "--draft_ckpt_dir=~nobody-here/c"])
    assert isinstance(arguments, dict)
    expected = BuildOptions("/home/ada/a", "/home/ada/b", draft_ckpt_dir="~nobody-here/c")
    assert arguments["options"] == expected


def test_an_empty_path_is_refused() -> None:
    """That of a variable that is not set was once the current folder."""
    with pytest.raises(ValueError, match="--map must be a path, got ''"):
        parse(drive, ["petrol", "--map="])
    for name in ("ckpt_dir", "tokenizer_path", "draft_ckpt_dir"):
        paths: dict[str, Any] = {"ckpt_dir": "a", name: ""}
        with pytest.raises(ValueError, match=f"{name} must be a path, got ''"):
            BuildOptions(**paths)


def test_a_default_is_looked_up_where_its_flag_is_missing() -> None:
    with pytest.raises(FileNotFoundError, match="no fuel here"):
        parse(drive, [])


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["petrol", "--speed", "9", "--help_all"]], ids=str)
def test_help_is_asked_for_only_in_a_flags_place(words: list[str]) -> None:
    assert parse(drive, words) == words[-1]
    given = parse(drive, ["petrol", "--to", "--help"])
    assert given == parse(drive, ["petrol", "--to=--help"]) and isinstance(given, dict)


def test_a_help_page_names_flags_values_defaults_and_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert page(drive, "llama drive").splitlines() == [
        "usage: llama drive [FUEL] [--flag value]...",
        "",
        "Drive somewhere.",
        "",
        "this run:",
        "  --to TEXT      where",
        "  --map PATH     what to follow",
        "",
        "the engine:",
        "  --fuel VALUE   what it burns (default: what is there)",
        "  --cylinders N  how many (default: as many as there is room",
        "                 for)",
        "  --turbo        breathe faster",
        "",
        "the driver:",
        "  --speed X      most km/h (default: 80.0)",
        "",
        "sampling:",
        "  --seed N       of the engine (default: 1)",
        "",
        "examples:",
        "  llama drive petrol --to sea",
    ]


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_help_is_as_wide_as_the_terminal_up_to_a_hundred(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text, _, _ = page(complete, "llama complete").partition("examples:")
    longest = max(map(len, text.splitlines()))
    assert longest <= max(columns, 51) and longest <= 100  # 27 of flags, and never fewer than 24 of meaning
    assert longest > 0.8 * min(columns, 100)


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_command_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a pager, which is no terminal to who writes there; examples were never wrapped."""
    command = importlib.import_module(f"llama.cli.{name}").main
    monkeypatch.setenv("COLUMNS", "80")
    text = page(command, f"llama {name}")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    _, _, examples = text.partition("examples:\n")
    whole = [" ".join(line.split()) for line in examples.replace("\\\n", " ").splitlines()]
    assert whole == [" ".join(line.split()) for line in section(command, "Examples")]
    monkeypatch.setenv("COLUMNS", "0")
    assert page(command, f"llama {name}") == text


def test_the_overview_fits_80_columns() -> None:
    assert max(map(len, overview().splitlines())) <= 80


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_of_every_command_has_a_meaning(name: str) -> None:
    command = importlib.import_module(f"llama.cli.{name}").main
    assert [flag.name for flag in flags_of(command).values() if not flag.meaning] == []
    text = page(command, f"llama {name}")
    assert text.startswith(f"usage: llama {name}")
    assert [flag.shown for flag in flags_of(command).values() if text.count(f"\n  {flag.shown} ") != 1] == []


def sampling(*words: str) -> SamplingParams:
    arguments = parse(complete, ["--ckpt_dir", "a", *words])
    assert isinstance(arguments, dict)
    params = arguments["params"]
    assert isinstance(params, SamplingParams)
    return params


def test_flags_of_several_texts_and_of_token_ids_are_repeated_or_are_lists() -> None:
    """They were read as one value, or as the number that the first of their types is."""
    assert sampling("--stop", "a,b", "--stop", '["\\n", "None"]').stop == ("a,b", "\n", "None")
    assert sampling("--dry_breakers", "[]").dry_breakers == ()
    for words in (["1,2,3"], ["[1, 2, 3]"], ["1", "--stop_token_ids", "2,3"], ["1, 2,3 "]):
        assert sampling("--stop_token_ids", *words).stop_token_ids == (1, 2, 3)
    assert sampling("--banned_tokens", "7").banned_tokens == (7,)
    assert sampling("--banned_tokens=").banned_tokens == ()


def test_biases_are_a_json_object() -> None:
    biases = '{"504": -2.5, "30": 1}'
    assert sampling("--logit_bias", biases).logit_bias == {504: -2.5, 30: 1.0}
    assert sampling("--logit_bias", "None").logit_bias is None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--stop_token_ids", "1,x"], "--stop_token_ids must be token ids, as 1,2,3 or [1, 2, 3] are, got '1,x'"),
        (
            ["--banned_tokens", "[1, [2]]"],
            "--banned_tokens must be token ids, as 1,2,3 or [1, 2, 3] are, got '[1, [2]]'",
        ),
        (["--stop", ""], "stop must be a text or a list of texts, none of them empty, got ('',)"),
        *(
            (
                ["--logit_bias", text],
                f"--logit_bias must be a JSON object of token ids and numbers, as {{}}, got {text!r}",
            )
            for text in ("[1]", "504", '{"a": 1}', '{"504": null}', '{"504": NaN}', "{504: 1}", "[" * 9999)
        ),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_list_or_an_object_that_is_none_is_told_in_one_line(words: list[str], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        sampling(*words)
    assert str(caught.value) == error.replace("{}", """'{"504": -2.5, "30": 1}' is""")


def test_a_short_help_names_rare_flags_and_a_long_one_tells_them() -> None:
    """All flags of sampling were four screens, with those that everybody needs between them."""
    short, long = page(complete, "llama complete", is_short=True), page(complete, "llama complete")
    flags = flags_of(complete).values()
    told = [flag.name for flag in flags if f"\n  --{flag.name} " in short]
    assert {"temperature", "top_k", "min_p", "stop", "n", "seed"} <= set(told)
    assert [flag.name for flag in flags if flag.name not in told] == [flag.name for flag in flags if flag.is_rare] != []
    assert [flag.name for flag in flags if f"--{flag.name}" not in short or f"\n  --{flag.name} " not in long] == []
    assert len(long.splitlines()) - len(short.splitlines()) > 15


def test_completing_takes_every_option_of_building_and_sampling() -> None:
    """A new field of the options is a flag at once: no list of them is kept in the command."""
    fields = {each.name for kind in (BuildOptions, SamplingParams) for each in dataclasses.fields(kind)}
    assert fields - flags_of(complete).keys() == {*CHAT, "stop_token"}
    assert parse(complete, ["--ckpt_dir", "a", "--seed", "3", "--top_p", "0.5", "--compile"]) == {
        "options": BuildOptions("a", seed=3, compile=True),
        "params": SamplingParams(top_p=0.5, max_gen_len=64),
    }


@pytest.mark.parametrize("name", sorted(ALONE))
def test_what_works_in_one_process_is_refused_under_torchrun(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank converted at once: the first won, and the others ended with "exists already"."""
    for variable, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"llama {name} works in one process: leave torchrun out"):
        dispatch([name])
