"""Documents tell the truth: what code cites is written down, and what they name, link to and describe is there."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest

from llama import Llama
from llama.backends.cpu.build import library
from llama.cli.flags import flags_of
from llama.cli.main import NAMES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
ARCHITECTURE = ROOT / "docs" / "architecture.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
# What describes the tree as it is; CHANGELOG.md also names what is gone.
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ARCHITECTURE, *GUIDES, *FILES]
DECIDED = re.compile(r"^\*\*(D\d+)\.", re.MULTILINE)
CITED = re.compile(r"\bsee (D\d+(?:(?:,| and) D\d+)*)")
NAMED = re.compile(r"`((?:llama|scripts|tests|docs)/[\w./-]*\w)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_]+)")
LISTED = re.compile(r"^\| (D\d+) \|.*\((\d+-[a-z-]+\.md)\) \|$", re.MULTILINE)

MODULES = [*(f"llama.cli.{name}" for name in NAMES), "example_ray_data"]
COMMANDS = [importlib.import_module(name).main for name in MODULES]
# torchrun's, pip's and pytest's, and gpu_check's, which needs a GPU to say.
OF_OTHER_PROGRAMS = {"nproc_per_node", "nnodes", "max_restarts", "rdzv_backend", "rdzv_endpoint"}
OF_OTHER_PROGRAMS |= {"editable", "help", "help_all", "version"}


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_a_document_names_exist(path: Path) -> None:
    """Modules move, and a path in prose is nobody's import."""
    named = set(NAMED.findall(path.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    lost = []
    for target, heading in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        if not file.exists() or (heading and heading not in headings(file)):
            lost.append(f"{target}#{heading}")
    assert lost == []


def headings(path: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [ROOT / "README.md", *GUIDES], ids=lambda path: path.stem)
def test_flags_that_a_document_names_exist(path: Path) -> None:
    """Commands are run by tests/e2e/test_guides.py; this is about prose."""
    flags = {name for command in COMMANDS for name in flags_of(command)} | OF_OTHER_PROGRAMS
    assert set(FLAG.findall(path.read_text(encoding="utf-8"))) - flags == set()


def test_what_is_to_be_changed_lies_where_the_table_says() -> None:
    """Each name in the last column of "Where do I change" is in one of the files beside it."""
    _, _, table = ARCHITECTURE.read_text(encoding="utf-8").partition("## Where do I change\n")
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| (`[^|]+) \|$", table, re.MULTILINE)
    assert len(rows) >= 20, "the pattern has lost the table"
    for files, names in rows:
        code = "".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"`([^`]+)`", files))
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"\b{name}\b", code), f"{name} is not in {files}"


@pytest.mark.skipif(library() is None, reason="the way described is that of the CPU kernels, which are not here")
def test_a_token_passes_the_files_that_the_architecture_says(demo_model: Path) -> None:
    _, _, life = ARCHITECTURE.read_text(encoding="utf-8").partition("## The life of a token\n")
    described = re.findall(r"^\d+\. `llama/([^`]+)`", life.partition("\n## ")[0], re.MULTILINE)
    package = ROOT / "llama"
    passed: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            passed.setdefault(path.relative_to(package).as_posix())

    llm = Llama.build(demo_model, device="cpu")
    events = llm.stream(llm.encode_prompts(["The capital of France is"]), max_gen_len=8, temperature=0)
    for _ in range(4):
        next(events)
    sys.setprofile(note)
    try:
        next(events)
    finally:
        sys.setprofile(None)
    assert list(passed) == described
