"""`python -m tests.fuzz`: try mutants of one format or all, and print those that fail.

python -m tests.fuzz --mutants 1000          the first thousand of each format
python -m tests.fuzz gguf --mutants 1000     the first thousand of one
python -m tests.fuzz gguf 1234               one again
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys

from tests.fuzz.runner import run
from tests.fuzz.seeds import FORMATS

# Threads do not survive a fork. Both are read when a process starts.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    """Return 1 where a mutant has failed."""
    if not ONE_THREAD.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], os.environ | ONE_THREAD)
    parser = argparse.ArgumentParser()
    parser.add_argument("format", nargs="?", choices=[*FORMATS, "all"], default="all")
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--mutants", type=int, help="how many; default: a full run's")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    failed = 0
    for format in FORMATS if options.format == "all" else [options.format]:
        numbers = options.numbers or range(options.first, options.first + (options.mutants or FORMATS[format].mutants))
        kinds: collections.Counter[str] = collections.Counter()
        for result in run(format, numbers):
            kinds[result.outcome.kind] += 1
            failed += bool(result.failure)
            if result.failure or options.numbers or options.verbose:
                print(result, flush=True)
        print(f"{format}: {json.dumps(kinds)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
