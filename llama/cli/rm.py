"""`llama rm`: models by name off this disk."""

from __future__ import annotations

import logging
import sys

from llama.hub.inventory import removal
from llama.hub.messages import megabytes

log = logging.getLogger("llama")


def main(name: list[str], *, yes: bool = False) -> None:
    """Remove models by the names that `llama list` shows. What other models need of their files stays.

    Args:
        name: org/name with all that is there of it, org/name:Q4_K_M, org/name@revision, or demo.
        yes: do not ask.

    Examples:
        llama rm bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    """
    removals = [(each, *removal(each)) for each in name]
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError("nobody can be asked, as stdin is no terminal: give --yes")
        freed = ", ".join(f"{each} ({megabytes(nbytes)})" for each, nbytes, _ in removals)
        print(f"Remove {freed}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            log.info("nothing was removed")
            return
    for each, nbytes, remove in removals:
        remove()
        log.info("removed %s: %s freed", each, megabytes(nbytes))
