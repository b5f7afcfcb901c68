"""The tools that a model may call, from a file that the command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama.chat.tools import plain_tools

MAX_TOOLS_BYTES = 4 << 20


def read_tools(path: Path | None) -> list[dict[str, Any]] | None:
    """The tools of a file with a JSON list of descriptions, or one; None without a file. ValueError for any other."""
    if path is None:
        return None
    with path.open("rb") as file:
        data = file.read(MAX_TOOLS_BYTES + 1)
    try:
        if len(data) > MAX_TOOLS_BYTES:
            raise ValueError(f"it has more than {MAX_TOOLS_BYTES >> 20} MiB")
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--tools {path} is no list of tools as JSON: {error}") from None
    try:
        return plain_tools([found] if isinstance(found, dict) else found) or []
    except ValueError as error:
        raise ValueError(f"--tools {path}: {error}") from None
