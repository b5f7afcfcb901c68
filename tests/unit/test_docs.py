"""Decisions that code cites are written down in docs/decisions, each once, with its reasons; files they name exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
DECIDED = re.compile(r"^\*\*(D\d+)\.", re.MULTILINE)
CITED = re.compile(r"\bsee (D\d+(?:(?:,| and) D\d+)*)")
NAMED = re.compile(r"`((?:llama|scripts|tests)/[\w./-]*\w)`")
LISTED = re.compile(r"^\| (D\d+) \|.*\((\d+-[a-z-]+\.md)\) \|$", re.MULTILINE)


def decisions() -> list[tuple[str, str]]:
    """(id, name of its file) of every decision."""
    return [(number, path.name) for path in FILES for number in DECIDED.findall(path.read_text(encoding="utf-8"))]


def code() -> list[Path]:
    folders = [ROOT / name for name in ("llama", "scripts", "tests")]
    found = [path for folder in folders for suffix in ("py", "h", "cpp") for path in folder.rglob(f"*.{suffix}")]
    return [*found, *ROOT.glob("*.py")]


def test_every_decision_that_code_cites_is_written_down() -> None:
    """An id that leads nowhere is worse than no id: the comment that it replaced is gone."""
    texts = [path.read_text(encoding="utf-8") for path in code()]
    cited = {number for text in texts for cites in CITED.findall(text) for number in re.findall(r"D\d+", cites)}
    assert cited, "no code cites a decision: the pattern has lost them"
    assert cited <= {number for number, _ in decisions()}


def test_an_id_stands_for_one_decision() -> None:
    counts = Counter(number for number, _ in decisions())
    assert [number for number, count in counts.items() if count > 1] == []


def test_the_index_leads_to_every_decision() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert sorted(LISTED.findall(index)) == sorted(decisions())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_decision_tells_its_reasons(path: Path) -> None:
    headings = re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Context", "Decision", "Measured", "Rejected"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_files_that_a_document_names_exist(path: Path) -> None:
    """Modules move, and a path in prose is nobody's import."""
    named = set(NAMED.findall(path.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
