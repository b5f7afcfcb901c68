"""Systems that are measured, each in a process of its own that has loaded a model, and where other libraries are found.

A worker reads its jobs as lines of JSON and answers each with a line; how it computes is not known here.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llama.benchmark.peer_worker import PEERS
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.gguf import split_files
from llama.checkpoint.gguf_header import read_header

PEER_SCRIPT = Path(__file__).with_name("peer_worker.py")
# Prints which of the modules it is given can be imported; a folder of that name is none.
FIND = """\
import importlib.util, sys
specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(*[name for name, spec in specs.items() if spec and spec.origin])"""


class Worker:
    """A process that runs jobs one at a time and idles between them.

    loaded: `weights`, how they are held in words, their `weight_bytes`, and what else is known of them.
    """

    def __init__(
        self, process: subprocess.Popen[str], name: str, errors: IO[str] | None, known: dict[str, Any]
    ) -> None:
        self._process, self.name, self._errors = process, name, errors
        answer = self._answer()
        self.vocab_size: int = answer.pop("vocab_size")
        self.loaded = known | answer

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        """Run one job: seconds, steps, tokens and peak memory."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer tells what ended it
            self._process.stdin.write(json.dumps({"prompts": prompts, "gen_len": gen_len}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._peak_mib: float = answer.pop("peak_mib")
        return answer

    def peak_mib(self) -> float:
        return self._peak_mib

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code < 0:
                raise ValueError(f"{self.name} ended early, with {signal.Signals(-code).name}")
            last = "what is written above"
            if self._errors is not None:
                self._errors.seek(0)
                last = next((each.strip() for each in reversed(self._errors.readlines()) if each.strip()), "no word")
            raise ValueError(f"{self.name} ended early, with exit code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{self.name}: {' '.join(answer['error'].split())}")
        return answer


@contextlib.contextmanager
def started(command: Sequence[str], name: str, known: dict[str, Any], quiet: bool) -> Iterator[Worker]:
    """Start a worker, and end it with the block.

    known: what it does not say itself of what it loaded.
    quiet: keep what it writes to stderr for the message of a sudden end.
    """
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) if quiet else None
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        stack.enter_context(process)  # closes its pipes, at which it ends, and waits
        yield Worker(process, name, errors, known)


def start_ours(options: dict[str, Any], name: str) -> contextlib.AbstractContextManager[Worker]:
    """Start a worker with this package. options: those of BuildOptions that are not left to it."""
    command = [sys.executable, "-m", "llama.benchmark.ours", json.dumps(options)]
    return started(command, name, {}, quiet=False)


def start_peer(
    name: str, python: str, options: dict[str, Any], known: dict[str, Any]
) -> contextlib.AbstractContextManager[Worker]:
    """Start a worker with another library, in an interpreter that has it."""
    return started([python, str(PEER_SCRIPT), json.dumps({"peer": name, **options})], name, known, quiet=True)


def find_peers(pythons: Sequence[str]) -> dict[str, str]:
    """Return the peers that are installed, each with the first of the interpreters that can import it.

    Raise ValueError for an interpreter that cannot be run.
    """
    found: dict[str, str] = {}
    for python in pythons:
        try:
            done = subprocess.run([python, "-c", FIND, *PEERS], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            raise ValueError(f"--peer_python {python} is no Python that runs: name an interpreter") from None
        found |= {name: python for name in done.stdout.split() if name not in found}
    return found


def stored_weights(file: Path) -> dict[str, Any]:
    """Return a GGUF model's `weights`, as its kind of file is called, and `weight_bytes`: as they are stored."""
    import gguf

    headers = [read_header(part) for part in split_files(file)]
    tensors = {info.name: info for header in headers for info in header.tensors.values()}
    if "output.weight" in tensors:  # else the table is the output, too, and is read
        del tensors["token_embd.weight"]
    n_bytes = 0
    for info in tensors.values():
        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.ggml_type)]
        n_bytes += math.prod(info.shape) // elements * size
    kind = gguf.LlamaFileType(headers[0].metadata.get("general.file_type", gguf.LlamaFileType.GUESSED))
    return {"weights": kind.name.removeprefix("MOSTLY_"), "weight_bytes": n_bytes}


def dense_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's weights that a token reads, where all are of its dtype."""
    names = set(checkpoint.names())
    if "output.weight" in names:  # else the table is the output, too, and is read
        names.remove("tok_embeddings.weight")
    return sum(math.prod(checkpoint.shape(name)) for name in names) * checkpoint.dtype.itemsize
