"""Triton kernels compiled ahead of time, which needs no GPU: the registers and spills that ptxas reports.

Triton's interpreter, by which tests run kernels without a GPU, is chosen when triton is imported and compiles nothing.
So a test file says in `ahead_of_time()` what to compile, and `compiled_kernels` does it in a process of its own:
`python -m tests.gpu_compile tests.unit.test_of_kernels`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Ahead:
    """A kernel to compile, and for what arguments; see `compile_kernel`."""

    name: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int  # of a thread
    spills: int  # bytes of a thread, stored and loaded
    shared: int  # bytes of a program


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile for a GPU (80 or 90), in a process without TRITON_INTERPRET.

    signature: the types of all arguments that are not in constants: "*bf16", "i32", "fp32". Pointers are taken to be
    aligned to 16 bytes, and an integer is a multiple of 16 where its type says so: "i32:16".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    assert types.keys() == signature.keys() | constants.keys(), (types, signature, constants)
    aligned = [at for at, kind in enumerate(types.values()) if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        fn,
        {name: kind.removesuffix(":16") for name, kind in types.items()},
        {name: value for name, value in constants.items() if types[name] == "constexpr"},
        {(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    registers, spills = _assemble(ptx)
    return Compiled(ptx, registers, spills, kernel.metadata.shared)


def _assemble(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread, by the assembler that comes with triton."""
    from triton import knobs

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes spill", said)))


@cache
def compiled_kernels(module: str) -> dict[str, Compiled]:
    """All that `ahead_of_time() -> Iterable[Ahead]` of a test module names, as "name sm_90": compiled elsewhere.

    Skips the test where triton cannot compile.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    if sys.platform != "linux":
        pytest.skip("triton's ptxas is for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_compile", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Compiled(**fields) for name, fields in json.loads(done.stdout.splitlines()[-1]).items()}


def main(module: str) -> None:
    results = {
        f"{ahead.name} sm_{capability}": compile_kernel(
            ahead.fn, ahead.signature, ahead.constants, capability, ahead.num_warps, ahead.num_stages
        ).__dict__
        for ahead in importlib.import_module(module).ahead_of_time()
        for capability in CAPABILITIES
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
