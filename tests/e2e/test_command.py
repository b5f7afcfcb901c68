"""The `llama` command as a whole: its pages, its version, and subcommands that no other test runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import llama as package
from llama import Tokenizer
from tests.checkpoints import TINY, chain_state, write_meta
from tests.e2e.processes import COMPLETION, LLAMA, llama, python, run, torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_names_every_subcommand(words: list[str]) -> None:
    done = llama(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: llama COMMAND ")
    names = re.findall(r"^  ([a-z]+)  +[a-z]", done.stdout, re.MULTILINE)
    folder = Path(package.__file__).parent / "cli"
    commands = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")}
    assert sorted(names) == sorted(commands - {"main"})


def test_help_and_version_do_not_wait_for_torch() -> None:
    """Importing torch takes more than a second."""
    code = "import sys; from llama.cli.main import dispatch; dispatch(sys.argv[1:]); assert 'torch' not in sys.modules"
    for word in ("--help", "--version", "get --help"):
        done = run([sys.executable, "-c", code, *word.split()])
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_version_is_that_of_the_package() -> None:
    done = llama("--version")
    assert done.stdout == f"llama {package.__version__}\n" and re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)


NO_POSIX = """
import builtins, importlib, mmap, os, pkgutil, signal, socket, sys
import torch

ABSENT = ("fcntl", "termios", "resource", "readline", "pwd", "grp", "tty", "pty", "syslog", "prompt_toolkit")
builtin_import = builtins.__import__

def windows_import(name, globals=None, *args, **kwargs):
    if name.partition(".")[0] in ABSENT and (globals or {}).get("__name__", "").startswith("llama."):
        raise ImportError(f"no module {name} here")
    return builtin_import(name, globals, *args, **kwargs)

for name in [name for name in sys.modules if name.partition(".")[0] == "llama"]:
    del sys.modules[name]
builtins.__import__ = windows_import
os.environ["LLAMA_KERNELS"] = "0"  # as kernels are built on Linux alone
del signal.SIGHUP, signal.SIGKILL, signal.SIGUSR1, signal.SIGALRM, signal.setitimer, socket.if_nameindex
for name in ("geteuid", "getuid", "statvfs", "getpriority", "sched_getaffinity", "set_blocking", "fork", "killpg"):
    delattr(os, name)
for name in ("sysconf", "getloadavg", "uname", "setsid", "getpgid", "mkfifo", "posix_fadvise", "lockf", "chown"):
    delattr(os, name)
for name in [name for name in dir(mmap) if name.startswith("MAP_")]:
    delattr(mmap, name)
import llama
for found in pkgutil.walk_packages(llama.__path__, "llama."):
    if "__main__" not in found.name and ".cuda" not in found.name:
        importlib.import_module(found.name)
sys.argv[1:] = ["complete", *sys.argv[1:]]
importlib.import_module("llama.cli.main").main()
"""


def test_the_package_imports_and_completes_without_what_windows_lacks(tiny_folder: Path, tmp_path: Path) -> None:
    """`import fcntl` and `signal.SIGHUP` at the head of two modules ended every command there."""
    flags = ["--ckpt_dir", tiny_folder, "--prompt", "hello", "--max_gen_len", "5", "--temperature", "0", "--json"]
    (tmp_path / "windows.py").write_text(NO_POSIX)
    done = python(tmp_path / "windows.py", *flags)
    assert done.json_lines == llama("complete", *flags).json_lines


def test_no_escape_codes_reach_a_pipe(tmp_path: Path) -> None:
    """Nor a line that is written over: colours and bars are for terminals."""
    a, b, newline = b"ab\n"
    write_meta(tmp_path / "model", TINY, state=chain_state(TINY, {newline: a, a: b, b: a}))
    folder = tmp_path / "model"
    model = ["--ckpt_dir", folder, "--max_gen_len", "5", "--temperature", "0"]
    (tmp_path / "in.txt").write_text("a\nab\n")
    for words in (
        ["complete", *model, "--prompt", "a", "--logprobs"],
        ["chat", *model],
        ["batch", tmp_path / "in.txt", tmp_path / "out.jsonl", *model],
        ["plan", "--ckpt_dir", folder],
        ["verify", folder, "--deep"],
        ["convert", folder, tmp_path / "hf", "--format", "hf"],
        ["perplexity", "--ckpt_dir", folder, "--max_tokens", "40", "--text", tmp_path / "in.txt"],
        ["complete", "--ckpt_dir", tmp_path / "none", "--prompt", "hello"],
    ):
        done = llama(*words, stdin="hello\n" if words[0] == "chat" else "")
        assert done.stdout + done.stderr, words
        assert [char for char in done.stdout + done.stderr if char < " " and char != "\n"] == [], words


def test_the_example_and_the_command_are_one(tiny_folder: Path) -> None:
    flags = ["--ckpt_dir", tiny_folder, "--prompt", "hello", "--max_gen_len", "5", "--seed", "3", "--json"]
    assert llama("complete", *flags).json_lines == python(COMPLETION, *flags).json_lines


def test_the_command_runs_on_ranks(tiny_folder: Path) -> None:
    flags = ["--ckpt_dir", tiny_folder, "--prompt", "hello", "--max_gen_len", "5", "--json", "--dtype", "float32"]
    assert torchrun(2, *LLAMA, "complete", *flags).json_lines == llama("complete", *flags).json_lines


def test_a_plan_is_that_of_a_dry_run(tiny_folder: Path) -> None:
    flags = ["--ckpt_dir", tiny_folder, "--device", "cpu", "--prompt", "hello", "--max_gen_len", "9"]
    planned, dry = llama("plan", *flags), llama("complete", *flags, "--dry_run")
    assert planned.returncode == 0 and planned.stderr == ""
    # What is free is another process's at every moment.
    tables = [re.sub(r"(?m)^free.*\n", "", done.stdout) for done in (planned, dry)]
    assert tables[0] == tables[1] and "these prompts" in tables[0]
    assert "these prompts" not in llama("plan", *flags[:4]).stdout


def test_a_bench_says_how_fast_prefill_and_decode_are(tmp_path: Path) -> None:
    """And an end token, here the first that the model makes, does not end a run."""
    state = chain_state(TINY, {})
    state["tok_embeddings.weight"].fill_(1)  # whatever came before
    write_meta(tmp_path, TINY, state=state)
    stop_token = min(Tokenizer(tmp_path / "tokenizer.model").stop_tokens)
    state["output.weight"][stop_token] = 1
    write_meta(tmp_path, TINY, state=state)
    (answer,) = llama("complete", "--ckpt_dir", tmp_path, "--prompt", "a", "--temperature", "0", "--json").json_lines
    assert (answer["tokens"], answer["finish_reason"]) == ([], "stop")
    flags = ["--ckpt_dir", tmp_path, "--prompt_len", "40", "--gen_len", "30", "--runs", "2"]
    (figures,) = llama("bench", *flags, "--json").json_lines
    assert (figures["prompt_len"], figures["gen_len"], figures["runs"], figures["ranks"]) == (40, 30, 2, 1)
    assert figures["prefill_tok_s"] > 0 and figures["decode_tok_s"] > 0 and figures["bandwidth_gb_s"] > 0
    done = llama("bench", *flags)
    assert re.fullmatch(
        r"prefill 40 tokens at [\d.]+ tok/s; decode 30 tokens at [\d.]+ tok/s, [\d.]+ GB/s of weights; median of 2\n",
        done.stdout,
    )
    two = torchrun(2, *LLAMA, "bench", *flags, "--json")
    assert [json.loads(line)["ranks"] for line in two.stdout.splitlines()] == [2]
