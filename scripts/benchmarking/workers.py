"""Systems that are measured, each in a process of its own, and what their replies mean in tokens and bytes.

A worker reads its jobs as lines of JSON and answers each with a line; how it computes is not known here.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoint import open_checkpoint
from llama.checkpoint.gguf import GGUFCheckpoint, split_files
from llama.checkpoint.gguf_header import read_header

HERE = Path(__file__).parent


@dataclass(frozen=True)
class BatchShape:
    prompts: list[list[int]]
    gen_len: int


class Worker:
    """A process that runs jobs one at a time and idles between them; `weights` says in which form it holds them."""

    def __init__(self, process: subprocess.Popen[str], name: str, **known: Any) -> None:
        self.process, self.name = process, name
        loaded = known | self._reply()
        self.vocab_size: int = loaded["vocab_size"]
        self.weight_bytes: int = loaded["weight_bytes"]
        self.weights: str = loaded["weights"]

    def run(self, job: BatchShape) -> tuple[dict[str, float], list[list[int]]]:
        """The figures of a job, and its new tokens."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _reply tells what ended it
            self.process.stdin.write(json.dumps({"prompts": job.prompts, "gen_len": job.gen_len}) + "\n")
            self.process.stdin.flush()
        reply = self._reply()
        decoded = (job.gen_len - 1) * len(job.prompts)  # the first tokens come out of the prefill
        bytes_read = self.weight_bytes * reply["decode_steps"]
        figures = {
            "prefill_tok_s": sum(map(len, job.prompts)) / reply["prefill_s"],
            "ttft_s": reply["prefill_s"],
            "decode_tok_s": decoded / reply["decode_s"],
            "bandwidth_gb_s": bytes_read / reply["decode_s"] / 1e9,
            "bytes_per_token": bytes_read / decoded,
            "peak_mib": reply["peak_mib"],
        }
        return figures, reply["tokens"]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code} and the message above"
            raise ValueError(f"{self.name} ended early, with {how}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ValueError(f"{self.name}: {reply['error']}")
        return reply


@contextlib.contextmanager
def started(python: str, script: str, options: dict[str, Any], name: str, **known: Any) -> Iterator[Worker]:
    """A worker that has loaded its model; it ends with the block.

    known: what it does not say itself of `weights` and `weight_bytes`.
    """
    command = [python, str(HERE / script), json.dumps(options)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        raise ValueError(f"{python} cannot be run ({error.strerror}): give an interpreter with --peer_python") from None
    with process:  # closes its pipes, at which it ends, and waits
        yield Worker(process, name, **known)


def torch_worker(name: str, system: str, **options: Any) -> contextlib.AbstractContextManager[Worker]:
    """This package ("ours") or "transformers"."""
    return started(sys.executable, "torch_worker.py", {"system": system, **options}, name)


def llama_cpp_worker(
    name: str, python: str, path: str, threads: int, max_seq_len: int
) -> contextlib.AbstractContextManager[Worker]:
    """llama.cpp in an interpreter that has llama-cpp-python. ValueError unless `path` is, or holds, a GGUF file."""
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint, GGUFCheckpoint):
        raise ValueError(f"--peer llama_cpp reads GGUF files, and {path} is none: name one with --peer_ckpt_dir")
    options = {"path": str(checkpoint.path), "threads": threads, "max_seq_len": max_seq_len}
    return started(python, "llama_cpp_worker.py", options, name, **stored_weights(checkpoint.path))


def stored_weights(file: Path) -> dict[str, Any]:
    """A GGUF model's `weights`, as its kind of file is called, and `weight_bytes`: as they are stored."""
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
