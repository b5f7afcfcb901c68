"""The `llama` command: a file for each subcommand, and what reads flags, prints help and ends in one line."""

import os

# Read when torch is imported. Between two operations OpenMP's threads wait for the next; by libgomp's default they keep
# their cores busy for up to 20 ms, which on a machine with other work makes prompts 5 to 20 times slower: see D29.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
