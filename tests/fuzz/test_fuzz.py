"""Ten thousand damaged and hostile files, of all formats: no traceback, no crash, no hang, no silent success."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.claims import silent
from tests.fuzz.runner import mutant
from tests.fuzz.seeds import FORMATS, write_seed
from tests.fuzz.trial import Outcome

ROOT = Path(__file__).parents[2]
CONFIG = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 2, "use_cache": True}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_loads_or_is_refused_in_one_line(format: str) -> None:
    """Each mutant ran in a process with limits of memory and time; a number that fails can be run again alone.

    `python -m tests.fuzz FORMAT NUMBER` does so. Weights and vocabularies have no checksums, so that other values are
    another model; what describes them may not be ignored without a word.
    """
    command = [sys.executable, "-m", "tests.fuzz", format]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2000:]
    counts = json.loads(run.stdout.splitlines()[-1].partition(": ")[2])
    assert sum(counts.values()) == FORMATS[format].mutants
    fair = FORMATS[format].mutants / 20
    loaded = counts.get("same", 0) + counts.get("changed", 0)
    assert counts["refused"] > fair and loaded > fair, "too harmless, or too harmful"


def test_all_formats_together_have_ten_thousand_mutants() -> None:
    assert sum(format.mutants for format in FORMATS.values()) >= 10_000


def test_a_mutant_has_the_same_bytes_whenever_it_is_made(tmp_path: Path) -> None:
    write_seed("gguf", tmp_path / "one")
    made = [mutant("gguf", number, tmp_path / "one") for number in range(20)]
    assert made == [mutant("gguf", number, tmp_path / "one") for number in range(20)]
    assert len({data for _, data in made}) == 20


@pytest.mark.parametrize(
    ("change", "warned", "said"),
    [
        ({"rms_norm_eps": 1e-6}, False, ""),
        ({"rope_thetb": 5e5}, False, "'rope_thetb' is not known"),
        ({"rope_thetb": 5e5}, True, ""),
        ({"rope_theta": [5e5]}, False, "rope_theta is"),
        ({"eos_token_id": [2, 3]}, False, ""),
        ({"use_cache": False}, False, "another text, but"),
    ],
)
def test_what_was_ignored_without_a_word_counts_as_a_fault(change: dict[str, object], warned: bool, said: str) -> None:
    """Else the mutants that load would show nothing."""
    before, after = json.dumps(CONFIG).encode(), json.dumps(CONFIG | change).encode()
    failure = silent("config.json", before, after, Outcome("changed", "", ("ignored",) * warned))
    assert said in failure and bool(said) == bool(failure)
