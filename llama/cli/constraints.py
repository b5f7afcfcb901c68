"""What --json_schema, --regex and --grammar give: a text, or the file that holds it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.cli.prompts import on_first_rank, read_text
from llama.distributed.job import TIMEOUT
from llama.sampling import SamplingParams
from llama.structured import check_constraint

MAX_SHOWN = 60  # characters of a text that is neither a file nor what it should be
# What a text of the kind, and no path, begins with or has.
_TEXTS = {
    "json_schema": re.compile(r"\s*(\{|(true|false|null)\s*$|\[|\")"),
    "grammar": re.compile(r"::=|\n|^\s*(start|%llguidance)\b"),
}


def read_constraints(params: SamplingParams, timeout: float = TIMEOUT) -> SamplingParams:
    """Return params with the texts of files in place of their paths, and checked.

    A schema or a grammar is a path unless it looks like one; an expression is always itself. The job's first rank
    reads for all. ValueError or OSError, on every rank and before weights are read, for what is wrong.
    """
    paths = {
        name: Path(os.path.expanduser(text))
        for name, pattern in _TEXTS.items()
        if (text := getattr(params, name)) is not None and not pattern.search(text)
    }
    if paths:
        texts: Mapping[str, Any] = on_first_rank(
            lambda: {name: _read(name, path) for name, path in paths.items()}, timeout
        )
        params = dataclasses.replace(params, **texts)
    try:
        check_constraint(params)
    except ValueError as error:
        source = "".join(f"{path}: " for path in paths.values())
        raise ValueError(f"{source}{error}") from None
    return params


def _read(name: str, path: Path) -> str:
    if not path.is_file():
        form = 'JSON such as {"type": "object"}' if name == "json_schema" else 'rules such as root ::= "yes" | "no"'
        raise FileNotFoundError(f"--{name} {str(path)[:MAX_SHOWN]!r} is no file, and no {form}")
    return read_text(path)
