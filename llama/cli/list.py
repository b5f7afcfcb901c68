"""`llama list`: the models on this disk that have names."""

from __future__ import annotations

import os
import time
from pathlib import Path

from llama.cli.printing import json_line
from llama.errors import visible
from llama.hub.inventory import local_models, sum_of
from llama.hub.messages import megabytes

SECONDS_PER_DAY = 86400


def main(*, json: bool = False) -> None:
    """List the models on this disk by the names that --ckpt_dir takes: the demo model, and the hub's cache.

    Args:
        json: print a JSON object for each.
    """
    models = local_models()
    if json:
        for model in models:
            fields = {"name": model.name, "type": model.kind, "bytes": model.nbytes, "last_used": model.last_used}
            print(json_line({**fields, "path": str(model.path)}))
        return
    rows = [("name", "type", "size", "used", "where")]
    for model in models:
        rows.append((model.name, model.kind, megabytes(model.nbytes), ago(model.last_used), _short(model.path)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, kind, size, used, path in rows:
        print(visible(f"{name:{widths[0]}}  {kind:{widths[1]}}  {size:>{widths[2]}}  {used:{widths[3]}}  {path}"))
    what = "none: llama get NAME downloads one" if not models else f"{megabytes(sum_of(models))} in all"
    print(what)


def ago(moment: float) -> str:
    """Return the day of a moment as people say it."""
    days = int((time.time() - moment) // SECONDS_PER_DAY)
    return {0: "today", 1: "yesterday"}.get(max(days, 0), f"{days} days ago")


def _short(path: Path) -> str:
    """Return a file outside the hub's cache, or else the repository's folder in it, from the home folder on."""
    path = next((parent for parent in path.parents if parent.name.startswith("models--")), path)
    home = Path(os.path.expanduser("~"))
    return str("~" / path.relative_to(home)) if path.is_relative_to(home) else str(path)
