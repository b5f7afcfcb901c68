"""The CPU kernels are compiled once, for any processor, and a machine where they cannot be runs all the same."""

from __future__ import annotations

import contextlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from llama.backends.cpu.libraries import processor_flags
from llama.config import ModelArgs
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer
from tests.e2e.processes import COMPLETION, TIMEOUT, Finished, python, run, started
from tests.gguf_files import write_gguf_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler that kernels are built with here"),
]
TESTS = Path(__file__).parents[1]
SOFTMAX = "test_cpu_attention.py::test_attention_is_a_softmax_over_the_keys_that_are_seen"
FAMILIES = [
    f"test_cpu_families.py::test_{name}"
    for name in (
        "layers_of_every_family_are_what_the_model_says[everything-floats]",
        "layers_of_every_family_are_what_the_model_says[everything-blocks]",
        "layers_of_every_family_are_what_the_model_says[narrow heads-floats]",
        "tokens_of_every_family_are_computed_at_their_own_pace[everything]",
    )
]
KERNEL_TESTS = [TESTS / "unit" / name for name in ("test_kernels.py", SOFTMAX, *FAMILIES)]
ARGS = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=160)
COMPILED = re.compile(r"compiled CPU kernels in [\d.]+ s, once: (\S+/kernels-\w+\.so)")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A job of a tiny quantized model, whose text is the same every time."""
    folder = tmp_path_factory.mktemp("blocks")
    write_gguf_model(folder / "m.gguf", ARGS, random_state(ARGS), GGMLQuantizationType.Q4_1)
    weights = ["--ckpt_dir", folder / "m.gguf", "--tokenizer_path", write_byte_tokenizer(folder)]
    return [*weights, "--dtype", "float32", "--prompt", "hello", "--temperature", "0", "--max_gen_len", "8", "--json"]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The machine's own, without its optimizations, which take four fifths of the time."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def two_at_once(
    flags: list[object], compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Finished]]:
    """Two processes that find no library, and the folder that they keep one in."""
    cache = tmp_path_factory.mktemp("cache")
    env = {"XDG_CACHE_HOME": str(cache), "CXX": compiler}
    with contextlib.ExitStack() as stack:
        command = [sys.executable, COMPLETION, *flags]
        processes = [stack.enter_context(started(command, env=env)) for _ in range(2)]
        outputs = [process.communicate("", TIMEOUT) for process in processes]
    return cache, [Finished(process.returncode, *out) for process, out in zip(processes, outputs, strict=True)]


def test_two_processes_at_once_compile_once(two_at_once: tuple[Path, list[Finished]]) -> None:
    cache, both = two_at_once
    assert both[0].json_lines == both[1].json_lines and len(both[0].json_lines[0]["tokens"]) == 8
    compiled = COMPILED.findall(both[0].stderr + both[1].stderr)
    assert compiled == [str(path) for path in cache.glob("llama/*.so")] and len(compiled) == 1
    assert all(done.stderr.count("own kernels") == 1 for done in both)
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".so", ".lock"}


def test_a_later_process_uses_what_was_compiled(
    two_at_once: tuple[Path, list[Finished]], flags: list[object], compiler: str
) -> None:
    cache, both = two_at_once
    done = python(COMPLETION, *flags, env={"XDG_CACHE_HOME": str(cache), "CXX": compiler})
    assert done.json_lines == both[0].json_lines
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["loaded", "prefill"]


@pytest.mark.parametrize(
    ("env", "why"),
    [
        (
            {"CXX": "/nonexistent"},
            "no CPU kernels, so tokens come slower: no C++ compiler (/nonexistent): install g++, or name one in CXX",
        ),
        (
            {"CXX": "false"},
            "no CPU kernels, so tokens come slower: {false} failed with exit code 1: it says no more; "
            "not tried again for a day, or until {note} is removed",
        ),
        ({"LLAMA_KERNELS": "0"}, "no CPU kernels, as LLAMA_KERNELS=0 says: torch's own operations are used"),
    ],
    ids=["none", "fails", "off"],
)
def test_without_kernels_the_same_comes_from_dense_weights(
    two_at_once: tuple[Path, list[Finished]], flags: list[object], env: dict[str, str], why: str, tmp_path: Path
) -> None:
    """One line says why, and one what the weights are loaded as."""
    done = python(COMPLETION, *flags, env={"XDG_CACHE_HOME": str(tmp_path), **env})
    assert done.json_lines == two_at_once[1][0].json_lines
    first, held, loaded, report = done.all_stderr.splitlines()
    note = next(tmp_path.glob("llama/*.failed"), None)
    assert first == why.format(false=shutil.which("false"), note=note)
    assert held == f"Q4_1 loaded as float32: {2 + 7 * ARGS.n_layers} matrices"
    assert loaded.startswith("loaded ") and "torch's operations" in loaded and report.startswith("prefill ")


def test_kernels_keep_to_their_memory(tmp_path: Path) -> None:
    """All tests of the kernels, under AddressSanitizer and UBSan, and with a stand-in where there is no matrix unit.

    They run on the kernels' own threads there, as they do where torch has no OpenMP.
    A buffer of half the size that C++ took it for once let the process die long after, in another place.
    """
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("the C++ compiler has no AddressSanitizer (libasan) here")
    checks = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    script = tmp_path / "c++"
    script.write_text(
        f'#!/bin/sh\nunset LD_PRELOAD\nexec c++ "$@" -O0 {checks} -DOWN_THREADS -include {TESTS / "amx.h"}\n'
    )
    script.chmod(0o755)
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(script), "LD_PRELOAD": found}
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS, env=env | {"ASAN_OPTIONS": "detect_leaks=0"}
    )  # what Python keeps is no leak of ours
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def test_own_threads_do_each_piece_once(tmp_path: Path) -> None:
    """Of several callers at once, after a change of their number, and in a fork, which has none of its parent's."""
    program = tmp_path / "threads"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-DOWN_THREADS"]
    subprocess.run(["c++", *flags, TESTS / "threads.cpp", "-o", program], check=True)
    assert run([program]).stdout == "done\n"


PROCESSORS = {  # the machine, flags of the compiler, and what a processor at hand needs to have
    "AVX2": ("x86_64", ["-march=x86-64-v3"], "avx2"),
    "AVX-VNNI": ("x86_64", ["-march=x86-64-v3", "-include", str(TESTS / "avx_vnni.h")], "avx2"),
    # AVX-VNNI beside AVX-512 is not used: both halves of a product go by one of them.
    "AVX-512": ("x86_64", ["-march=x86-64-v4", "-include", str(TESTS / "avx_vnni.h")], "avx512bw"),
    "NEON": ("aarch64", ["-march=armv8-a"], "asimd"),
    "NEON dotprod": ("aarch64", ["-march=armv8.2-a+dotprod"], "asimddp"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_kernels_compute_the_same_on_other_processors(name: str, tmp_path: Path) -> None:
    """All tests of the kernels, compiled for less than the processor at hand has, or for one that is emulated."""
    machine, flags, extension = PROCESSORS[name]
    compiler, emulator, program = f"{machine}-linux-gnu-g++", f"qemu-{machine}", tmp_path / "kernels"
    command: list[object] = [program]
    if platform.machine() != machine or extension not in processor_flags():
        command = [emulator, "-L", f"/usr/{machine}-linux-gnu", program]
    for needed in (compiler, str(command[0])):
        if needed != str(program) and shutil.which(needed) is None:
            pytest.skip(f"no {needed} here (Debian: apt install g++-{machine.replace('_', '-')}-linux-gnu qemu-user)")
    flags = ["-std=c++17", "-pthread", "-rdynamic", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *flags]
    subprocess.run([compiler, *flags, TESTS / "emulated_kernels.cpp", "-o", program], check=True)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.emulated_kernels", *KERNEL_TESTS]
    env = {"KERNELS_COMMAND": shlex.join(map(str, command)), "PYTHONPATH": str(TESTS.parent)}
    done = python(*tests, env=env, cwd=TESTS.parent)
    assert done.returncode == 0 and "skipped" not in done.stdout, done
