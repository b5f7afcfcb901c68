"""The `llama` command: its subcommands, its help and its version.

Imports a subcommand when it is called, so that help comes at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from llama import __version__
from llama.cli.runner import call, is_first_rank, supervise
from llama.cli.suggestions import suggestion
from llama.distributed.torchrun_env import read_torchrun_env

# By what one wants to do; each is main() of the file of its name.
COMMANDS = {
    "run a model": {
        "complete": "complete prompts, or fill the gaps in them (Code Llama)",
        "batch": "complete millions of lines of a file, and go on after any end",
        "chat": "talk with a model on the terminal, or answer lines from a pipe",
    },
    "measure": {
        "plan": "tell the memory that a run needs on each rank, and read no weights",
        "bench": "measure the speed of prefill and decode",
        "perplexity": "measure how well a model predicts a text",
    },
    "checkpoints": {
        "get": "download models by name, or the demo model (98 MB)",
        "list": "list the models on this disk that have names",
        "rm": "remove models by name",
        "verify": "check a checkpoint's files before they are used",
        "convert": "convert a checkpoint to Meta's shards, Hugging Face's or GGUF",
        "calibrate": "measure on a text which weights to quantize with most care",
        "make": "make a checkpoint of a released model's shape, with random weights",
    },
    "the shell": {
        "completion": "print a script that has bash, zsh or fish complete commands",
    },
}
# Which write or remove files, in one process.
ALONE = {"convert", "make", "rm"}
NAMES = [name for commands in COMMANDS.values() for name in commands]
EXAMPLES = """\
examples:
  llama get
  llama complete --prompt "The capital of France is"
  llama chat --ckpt_dir meta-llama/Llama-3.2-1B-Instruct
  torchrun --nproc_per_node 8 -m llama complete --ckpt_dir Llama-3.1-70B

`llama COMMAND --help` tells the flags of a command."""


def main() -> None:
    """Run the subcommand that sys.argv names."""
    supervise(lambda: dispatch(sys.argv[1:]))


def dispatch(argv: Sequence[str]) -> None:
    """Do what the words of a command line say; ValueError where they name no subcommand."""
    first = argv[0] if argv else "--help"
    if first in ("--help", "-h", "--version"):
        if is_first_rank():
            print(f"llama {__version__}" if first == "--version" else overview())
        return
    if first.startswith("-"):
        raise ValueError(f"a command comes before its flags, as in llama complete {first}: see llama --help")
    if first not in NAMES:
        close = suggestion(first, NAMES)
        raise ValueError(f"unknown command {first!r}: " + (f"did you mean {close}?" if close else "see llama --help"))
    if first in ALONE and read_torchrun_env().world_size > 1:
        raise ValueError(f"llama {first} works in one process: leave torchrun out")
    import fire

    fire.Fire({name: subcommand(name, argv[1:]) for name in NAMES}, command=[first], name="llama")


def subcommand(name: str, argv: Sequence[str]) -> Callable[[], None]:
    """What runs a subcommand with its flags; only then is its file imported."""

    def run_it() -> None:
        call(importlib.import_module(f"llama.cli.{name}").main, f"llama {name}", argv)

    return run_it


def overview() -> str:
    """The help of `llama` itself."""
    parts = [
        "usage: llama COMMAND [--flag value]...",
        "Run LLaMA models with PyTorch: on GPUs of one or several hosts, a Mac or a CPU.",
    ]
    for heading, commands in COMMANDS.items():
        parts.append("\n".join([f"{heading}:", *(f"  {name:<12}{what}" for name, what in commands.items())]))
    return "\n\n".join([*parts, EXAMPLES])
