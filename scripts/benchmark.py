"""Measure prefill, decode, time to first token and memory; with --peer, in turn with another system in the same run.

Each system works in a process of its own and idles while another is measured, so that a machine that slows down slows
both, and peaks of memory are each system's own. Prompts are random tokens; end tokens do not end a run.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from llama import Llama, cli
from llama.checkpoint import open_checkpoint
from llama.checkpoint.write import write_checkpoint, writer
from llama.checkpoint.write_tokenizer import tokenizer_source
from llama.parallel import choose_device, choose_dtype
from llama.statistics import peak_memory_mib

ROOT = Path(__file__).resolve().parents[1]
BANDWIDTH_BYTES = 512 << 20  # beyond any cache's size


def main(
    *,
    ckpt_dir: str | None = None,
    peer: str | None = None,
    prompt_len: int = 512,
    gen_len: int = 64,
    batch_size: int = 1,
    max_seq_len: int = 2048,
    runs: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    cold: bool = False,
    json: bool = False,
    worker: str | None = None,
) -> None:
    """Benchmark this package, alone or in turn with a peer; medians over the runs, ratios run by run.

    Args:
        ckpt_dir: as for the examples; default: the demo model.
        peer: transformers (same weights, dtype and threads), or max_seq_len=N (this package with another bound).
        prompt_len: tokens of the longest prompt; in a batch, row i has (i + 1) / batch_size of them.
        gen_len: tokens to generate for each prompt.
        batch_size: prompts that run together.
        max_seq_len: most tokens of a prompt and its completion.
        runs: runs that count, after one that does not.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        cold: also time whole processes: `import torch`, and 8 tokens of the completion example.
        json: end with one JSON object on the last line of stdout.
        worker: for its own use.
    """
    path = ckpt_dir if ckpt_dir is not None else str(cli.demo_model(ROOT))
    if worker is not None:
        serve(worker, path, device, dtype, max_seq_len)
        return
    flags = {"ckpt_dir": path, "device": device, "dtype": dtype, "max_seq_len": max_seq_len}
    systems = [_Worker("ours", flags)]
    if peer is not None:
        if peer.startswith("max_seq_len="):
            systems.append(_Worker("ours", {**flags, "max_seq_len": peer.removeprefix("max_seq_len=")}))
        else:
            systems.append(_Worker(peer, flags))
    job = {"lengths": [prompt_len * (i + 1) // batch_size for i in range(batch_size)], "gen_len": gen_len}
    for system in systems:
        system.run(job)  # the first run of a process pays for allocations and code paths
    results = [[system.run(job) for system in systems] for _ in range(runs)]
    bandwidth = read_bandwidth_gb_s(choose_device(device))
    summary = summarise([result[0] for result in results], bandwidth)
    print_row("ours", summary)
    if peer is not None:
        theirs = summarise([result[1] for result in results], bandwidth)
        print_row(peer, theirs)
        for figure in ("decode", "prefill"):
            ratios = [ours[f"{figure}_tok_s"] / other[f"{figure}_tok_s"] for ours, other in results]
            summary[f"{figure}_ratio"] = statistics.median(ratios)
            print(f"{figure}: {statistics.median(ratios):.2f} x {peer} (runs: {min(ratios):.2f} to {max(ratios):.2f})")
    for system in systems:
        system.stop()
    if cold:
        summary |= cold_seconds(path, runs)
        print(f"import torch {summary['import_torch_s']:.2f} s, whole process, 8 tokens: {summary['cold_s']:.2f} s")
    if json:
        print(json_format.dumps(summary))


def summarise(results: list[dict[str, float]], bandwidth: float) -> dict[str, float]:
    summary = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return {**summary, "read_gb_s": bandwidth, "bandwidth_percent": 100 * summary["bandwidth_gb_s"] / bandwidth}


def print_row(name: str, summary: dict[str, float]) -> None:
    print(
        f"{name:>16}: prefill {summary['prefill_tok_s']:8.1f} tok/s, first token {summary['ttft_s']:6.3f} s, decode "
        f"{summary['decode_tok_s']:7.1f} tok/s = {summary['bandwidth_gb_s']:6.1f} GB/s "
        f"({summary['bandwidth_percent']:.0f} % of {summary['read_gb_s']:.1f}), peak {summary['peak_mib']:.0f} MiB"
    )


def read_bandwidth_gb_s(device: torch.device) -> float:
    """The best GB/s at which this device reads memory in a matrix-vector product."""
    matrix = torch.ones(BANDWIDTH_BYTES // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        torch.mv(matrix, vector).sum().item()  # item() waits for the device
        best = max(best, matrix.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def cold_seconds(path: str, runs: int) -> dict[str, float]:
    """Median seconds of whole processes, in turn."""
    example = [str(ROOT / "example_text_completion.py"), "--ckpt_dir", path, "--prompt", "Hello", "--max_gen_len", "8"]
    commands = {"import_torch_s": ["-c", "import torch"], "cold_s": example}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class _Worker:
    """A system in a process of its own: a job as a line of JSON in, its figures as a line of JSON out."""

    def __init__(self, system: str, flags: dict[str, Any]) -> None:
        arguments = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={system}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json_format.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError("a system that was to be measured ended early: its own message is above")
        result: dict[str, float] = json_format.loads(line)
        return result

    def stop(self) -> None:
        self.process.communicate()


def serve(system: str, path: str, device: str | None, dtype: str | None, max_seq_len: int) -> None:
    """Run jobs from stdin until it ends."""
    if system not in SYSTEMS:
        raise ValueError(f"peer must be one of {', '.join(SYSTEMS)} or max_seq_len=N, got {system!r}")
    measured = SYSTEMS[system](path, device, dtype, max_seq_len)
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        job = json_format.loads(line)
        prompts = [torch.randint(measured.vocab_size, (n,), generator=generator).tolist() for n in job["lengths"]]
        prefill_s, decode_s = measured.run(prompts, job["gen_len"])
        steps = job["gen_len"] - 1  # the first token comes out of the prefill
        result = {
            "prefill_tok_s": sum(job["lengths"]) / prefill_s,
            "ttft_s": prefill_s,
            "decode_tok_s": steps * len(prompts) / decode_s,
            "bandwidth_gb_s": measured.weight_bytes * steps / decode_s / 1e9,
            "peak_mib": peak_memory_mib(measured.device),
        }
        print(json_format.dumps(result), flush=True)


class _System(Protocol):
    """What is measured; weight_bytes are those read for one token."""

    device: torch.device
    vocab_size: int
    weight_bytes: int

    def run(self, prompts: list[list[int]], gen_len: int) -> tuple[float, float]:
        """Seconds until the first tokens, and for the rest."""
        ...


class _Ours:
    def __init__(self, path: str, device: str | None, dtype: str | None, max_seq_len: int) -> None:
        self.llm = Llama.build(path, max_seq_len=max_seq_len, device=device, dtype=dtype)
        self.llm.tokenizer.stop_tokens = frozenset()
        self.device, self.vocab_size = self.llm.model.device, self.llm.model.args.vocab_size
        self.weight_bytes = self.llm.model.weight_bytes

    def run(self, prompts: list[list[int]], gen_len: int) -> tuple[float, float]:
        before = dataclasses.replace(self.llm.statistics)
        self.llm.generate(prompts, gen_len, temperature=0)
        after = self.llm.statistics
        return after.prefill_seconds - before.prefill_seconds, after.decode_seconds - before.decode_seconds


class _Transformers:
    """transformers' `generate` with the same weights, dtype and device."""

    def __init__(self, path: str, device: str | None, dtype: str | None, max_seq_len: int) -> None:
        import transformers

        checkpoint = open_checkpoint(path)
        self.device = choose_device(device)
        chosen = choose_dtype(dtype, self.device, checkpoint.dtype)
        with tempfile.TemporaryDirectory() as folder:
            name = str(chosen).removeprefix("torch.")
            made = writer(checkpoint, tokenizer_source(checkpoint), "hf", dtype=name, context_len=max_seq_len)
            write_checkpoint(made, Path(folder, "model"), lambda n_bytes: None)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=chosen)
        self.model = model.to(device=self.device).eval()
        self.vocab_size = model.config.vocab_size
        self.weight_bytes = sum(weight.nbytes for weight in model.parameters())

    def run(self, prompts: list[list[int]], gen_len: int) -> tuple[float, float]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        seconds = []
        for new_tokens in (1, gen_len):
            start = time.perf_counter()
            self.model.generate(
                tokens,
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            ).cpu()
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1] - seconds[0]


SYSTEMS: dict[str, Callable[[str, str | None, str | None, int], _System]] = {
    "ours": _Ours,
    "transformers": _Transformers,
}


if __name__ == "__main__":
    cli.run(main)
