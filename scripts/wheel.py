"""Builds a wheel that brings compiled kernels, for machines without a C++ compiler.

`python scripts/wheel.py [MACHINE [FOLDER [ARCH ...]]]`, with the Python that the package is installed for: for x86_64
or aarch64, by default the machine at hand, into the folder dist, with the kernels of ARCHS. It runs on systems as old
as the one that it is built on. CXX names the compiler. The wheel without kernels is `pip wheel .`
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llama.backends.cpu.build import compile_library

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("llama", "pyproject.toml", "README.md", "LICENSE")
# By the compiler's names, from what nearly all processors have to what newer ones add.
ARCHS = {
    "x86_64": ("x86-64-v3", "x86-64-v4", "cascadelake"),
    "aarch64": ("armv8-a", "armv8.2-a+dotprod"),
}
OLDEST_GLIBC = 17  # of the tags manylinux_2_x


def main(machine: str = platform.machine(), folder: str = "dist", *archs: str) -> None:
    if machine not in ARCHS:
        sys.exit(f"a wheel with kernels is for {' or '.join(ARCHS)}, not {machine}")
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        "c++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
    ]
    with tempfile.TemporaryDirectory() as temporary:
        tree, wheels = Path(temporary) / "tree", Path(temporary) / "wheels"
        for name in BUILT_FROM:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
            else:
                shutil.copy(ROOT / name, tree / name)
        prebuilt = tree / "llama/backends/cpu/prebuilt"
        prebuilt.mkdir()
        for arch in archs or ARCHS[machine]:
            # With the compiler's own libraries, which may be newer than those of the machine that it is for.
            static = ["-static-libgcc", "-static-libstdc++"]
            compile_library([*compiler, *static], arch, prebuilt / f"kernels-{arch}.so")
        libraries = [path.read_bytes() for path in prebuilt.iterdir()]
        glibc = max([OLDEST_GLIBC, *(int(n) for each in libraries for n in re.findall(rb"GLIBC_2\.(\d+)", each))])
        (tree / "setup.cfg").write_text(f"[bdist_wheel]\nplat_name = manylinux_2_{glibc}_{machine}\n")
        flags = ["--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, "-w", wheels, tree], check=True)
        (wheel,) = wheels.glob("*.whl")
        Path(folder).mkdir(parents=True, exist_ok=True)
        print(shutil.copy(wheel, folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
