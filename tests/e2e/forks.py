"""A process that has imported what programs import, which takes longer than what most of them do, and forks for each.

`python -m tests.e2e.forks` computes nothing, and forks for each line of its stdin. A fork does what `python SCRIPT ...`
or `python -m MODULE ...` would: it has arguments, a folder, a session and standard streams of its own. It ends without
freeing what was imported, which takes half as long as the imports.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import runpy
import sys
from pathlib import Path


def preload() -> None:
    """Import the package; kernels for GPUs only where they are used, as Triton may be absent."""
    package = importlib.import_module("llama")
    for found in pkgutil.walk_packages(package.__path__, "llama."):
        if "__main__" not in found.name and ".cuda" not in found.name:
            importlib.import_module(found.name)


def run_program(words: list[str], cwd: str, streams: str) -> None:
    """Do what `python *words` does in the folder cwd, with the files stdin, stdout and stderr of the folder streams."""
    os.setsid()
    new = os.O_WRONLY | os.O_CREAT
    for number, (name, flags) in enumerate([("stdin", os.O_RDONLY), ("stdout", new), ("stderr", new)]):
        os.dup2(os.open(Path(streams, name), flags, 0o600), number)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing gives a fork an empty one
    os.chdir(cwd)
    module = words[0] == "-m"
    sys.argv = words[module:]
    sys.path[0] = cwd if module else str(Path(words[0]).parent)
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """Serve requests, one line of arguments of `run_program` each: print the fork's process id, then its exit code."""
    preload()
    gc.freeze()  # a collection in a fork would otherwise touch, and so copy, all that was imported
    for line in sys.stdin:
        fork = multiprocessing.get_context("fork").Process(target=run_program, args=json.loads(line))
        fork.start()
        print(fork.pid, flush=True)
        fork.join()
        print(fork.exitcode, flush=True)


if __name__ == "__main__":
    main()
