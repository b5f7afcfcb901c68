"""A process that has imported what programs import, which takes longer than what most of them do, and forks for each.

`python -m tests.e2e.forks SOCKET` computes nothing. It listens on the Unix socket until its stdin ends, and forks for
each request of tests/e2e/forked_python.py. A fork does what `python SCRIPT ...` or `python -m MODULE ...` would: it has
the arguments, the folder, the environment and the standard streams of who asked, and a session of its own. It ends
without freeing what was imported, which takes half as long as the imports.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path


def preload() -> None:
    """Import torchrun and the package; kernels for GPUs only where they are used, as Triton may be absent."""
    importlib.import_module("torch.distributed.run")
    package = importlib.import_module("llama")
    for found in pkgutil.walk_packages(package.__path__, "llama."):
        if "__main__" not in found.name and ".cuda" not in found.name:
            importlib.import_module(found.name)


def run_program(words: list[str], cwd: str, environment: dict[str, str], streams: list[int]) -> None:
    """Do what `python *words` does in the folder cwd, with file descriptors for stdin, stdout and stderr."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing gives a fork an empty one
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if words[0] == "-u":
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        words = words[1:]
    module = words[0] == "-m"
    sys.argv = words[module:]
    sys.path[0] = cwd if module else str(Path(words[0]).parent)
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def serve(connection: socket.socket) -> None:
    """Do what a request asks for in a fork, with the signals that come; answer with its exit code, 4 bytes."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        words, cwd, environment = json.loads(file.read(int.from_bytes(head, "little")))
    fork = multiprocessing.get_context("fork").Process(target=run_program, args=(words, cwd, environment, streams))
    fork.start()
    for stream in streams:
        os.close(stream)
    pid = fork.pid
    assert pid is not None

    def pass_signals_on() -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            while number := connection.recv(1):
                os.killpg(pid, number[0])
            os.killpg(pid, signal.SIGKILL)  # who asked was killed

    threading.Thread(target=pass_signals_on, daemon=True).start()
    fork.join()
    assert fork.exitcode is not None
    connection.sendall(fork.exitcode.to_bytes(4, "little", signed=True))
    os._exit(0)


def main() -> None:
    """Say "ready" on stdout, and serve requests until stdin ends; each in a process that keeps the fork."""
    preload()
    gc.freeze()  # a collection in a fork would otherwise touch, and so copy, all that was imported
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        keepers: set[int] = set()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            keeper = os.fork()
            if keeper == 0:
                listener.close()
                serve(connection)
            connection.close()
            keepers = {pid for pid in keepers | {keeper} if os.waitpid(pid, os.WNOHANG)[0] == 0}


if __name__ == "__main__":
    main()
