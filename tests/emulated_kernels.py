"""A pytest plugin: the kernels are those of another processor, in a process that an emulator runs.

KERNELS_COMMAND names the program (emulated_kernels.cpp) and its emulator. Functions are called there by name. What they
read and write is copied to memory that both processes have, and back after each call.
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from ctypes import c_void_p

import pytest
import torch
from torch import Tensor

from llama.backends.cpu import build, ops

ADDRESS, SIZE = 1 << 38, 1 << 30  # where the emulated program has the memory
_check = ops.pointers


class EmulatedKernels:
    """Has the functions of the library, with the arguments that ctypes takes for them."""

    def __init__(self, command: list[str]) -> None:
        file = os.memfd_create("kernels")
        os.truncate(file, SIZE)
        self._memory = mmap.mmap(file, SIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        command = [*command, f"/proc/{os.getpid()}/fd/{file}", str(ADDRESS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._process.kill)
        self.extensions = self._answer()
        self.forget()

    def forget(self) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}  # by address: the memory, and its place here
        self._end = 0

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.endswith("\n"), f"the emulated kernels ended with exit code {self._process.wait()}"
        return line.strip()

    def _reserve(self, size: int) -> int:
        place, self._end = self._end, (self._end + size + 63) // 64 * 64
        assert self._end <= SIZE, self._end
        return place

    def pointers(self, *buffers: tuple[Tensor, torch.dtype, int]) -> list[c_void_p]:
        """What `ops.pointers` does, with addresses of the emulated program."""
        _check(*buffers)
        addresses = []
        for tensor, _, _ in buffers:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            if start not in self._storages:  # which is kept, so that no other memory gets its address
                self._storages[start] = storage, self._reserve(storage.nbytes())
            addresses.append(c_void_p(ADDRESS + self._storages[start][1] + tensor.data_ptr() - start))
        return addresses

    def _word(self, argument: object) -> int:
        """An argument as the emulated program gets it; structures are copied."""
        argument = getattr(argument, "_obj", argument)  # of byref
        if isinstance(argument, ctypes.Structure | ctypes.Array):
            place = self._reserve(ctypes.sizeof(argument))
            ctypes.memmove(self._address + place, ctypes.addressof(argument), ctypes.sizeof(argument))
            return ADDRESS + place
        value = getattr(argument, "value", argument)
        assert value is None or isinstance(value, int), value
        return value or 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            before = self._end
            words = [self._word(each) for each in arguments if not isinstance(each, ctypes.c_float)]
            real = sum(each.value for each in arguments if isinstance(each, ctypes.c_float))
            for start, (storage, place) in self._storages.items():
                ctypes.memmove(self._address + place, start, storage.nbytes())
            assert self._process.stdin is not None and len(words) <= 9
            print(name, *words, *[0] * (9 - len(words)), real, file=self._process.stdin, flush=True)
            result = int(self._answer())
            for start, (storage, place) in self._storages.items():
                ctypes.memmove(start, self._address + place, storage.nbytes())
            self._end = before
            return result

        return call


kernels = EmulatedKernels(shlex.split(os.environ["KERNELS_COMMAND"]))
build.library = lambda: kernels  # type: ignore[assignment]
ops.kernels = lambda: kernels  # type: ignore[assignment]
ops.pointers = kernels.pointers


@pytest.fixture(autouse=True)
def memory_of_one_test() -> Iterator[None]:
    yield
    kernels.forget()


def pytest_report_header() -> str:
    return f"kernels with {kernels.extensions or 'no extensions'}"
