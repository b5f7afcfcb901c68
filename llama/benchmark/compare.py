"""Measure systems in turn on the same prompts, and what their seconds mean in tokens and bytes.

Each of several systems works in a process of its own and idles while another is measured, so that a machine that slows
down slows all of them, and peaks of memory are each system's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llama.benchmark.ours import SHORT
from llama.benchmark.peer_worker import PEERS
from llama.benchmark.prompts import copy_prompts, random_prompts
from llama.benchmark.workers import Worker, dense_bytes, start_ours, start_peer, stored_weights
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint, dtype_name
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.gguf import GGUFCheckpoint
from llama.distributed.device import choose_device, choose_dtype
from llama.engine.options import BuildOptions

log = logging.getLogger("llama")

PLAIN = "plain"  # this package as it is by default
SPEEDS = ("decode_tok_s", "prefill_tok_s")


class MeasuredSystem(Protocol):
    """What is measured; `loaded` has at least `weights` and `weight_bytes`, those read in one step of decoding."""

    name: str
    vocab_size: int
    loaded: dict[str, Any]

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        """Complete prompts greedily by exactly gen_len tokens; prefill_s, decode_s, decode_steps and tokens."""
        ...

    def peak_mib(self) -> float: ...


@dataclass(frozen=True)
class Workload:
    """What each system does in a run. Row i of a batch has (i + 1) / batch_size of the longest prompt's tokens.

    text: what prompts repeat the beginning of; None for random tokens.
    """

    prompt_len: int
    gen_len: int
    batch_size: int
    runs: int
    text: str | None = None

    def __post_init__(self) -> None:
        # 2 tokens: the prefill gives the first.
        least = {"batch_size": 1, "prompt_len": self.batch_size, "gen_len": 2, "runs": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"--{name} must be at least {limit}, got {getattr(self, name)}")

    @property
    def lengths(self) -> list[int]:
        return [self.prompt_len * (i + 1) // self.batch_size for i in range(self.batch_size)]


def measure(
    systems: Sequence[MeasuredSystem], workload: Workload, checkpoint: Checkpoint
) -> list[list[dict[str, float]]]:
    """Return the figures of each run and system, after one run that pays for allocations and code paths.

    Each run has prompts of its own, so that none is found in a cache, and each call has the same.
    """
    generator = torch.Generator().manual_seed(0)
    tokenizer = None if workload.text is None else checkpoint.tokenizer()
    vocab_size = min(system.vocab_size for system in systems)
    runs = []
    for _ in range(1 + workload.runs):
        copies: list[list[int]] = []
        if tokenizer is not None and workload.text is not None:
            prompts, copies = copy_prompts(workload.text, workload.lengths, workload.gen_len, tokenizer, generator)
        else:
            prompts = random_prompts(workload.lengths, vocab_size, generator)
        runs.append([_figures(system, prompts, workload.gen_len, copies) for system in systems])
    return runs[1:]


def _figures(
    system: MeasuredSystem, prompts: list[list[int]], gen_len: int, copies: list[list[int]]
) -> dict[str, float]:
    """Measure one run; copies: what each prompt's completion is to be, if that is known."""
    done = system.run(prompts, gen_len)
    decoded = (gen_len - 1) * len(prompts)  # the first tokens come out of the prefill
    bytes_read = system.loaded["weight_bytes"] * done["decode_steps"]
    figures = {
        "prefill_tok_s": sum(map(len, prompts)) / done["prefill_s"],
        "ttft_s": done["prefill_s"],
        "decode_tok_s": decoded / done["decode_s"],
        "bandwidth_gb_s": bytes_read / done["decode_s"] / 1e9,
        "bytes_per_token": bytes_read / decoded,
        "peak_mib": system.peak_mib(),
    }
    if copies:
        pairs = [pair for row, copy in zip(done["tokens"], copies, strict=True) for pair in zip(row, copy, strict=True)]
        figures["copied_percent"] = 100 * statistics.mean(token == expected for token, expected in pairs)
    return figures


def summarise(systems: Sequence[MeasuredSystem], runs: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return each system's medians; those after the first have ours / theirs, run by run: [median, least, most]."""
    summaries = []
    for i, system in enumerate(systems):
        summary: dict[str, Any] = {"system": system.name, **system.loaded}
        summary |= {key: statistics.median(run[i][key] for run in runs) for key in runs[0][i]}
        for speed in SPEEDS if i else ():
            ratios = [run[0][speed] / run[i][speed] for run in runs]
            summary[speed.replace("_tok_s", "_ratio")] = [statistics.median(ratios), min(ratios), max(ratios)]
        summaries.append(summary)
    return summaries


def choose_peers(asked: str, found: Mapping[str, str], looked_in: Sequence[str]) -> list[str]:
    """Return the peers that --compare names: all that were found, or those names, which must be there.

    found: as `find_peers` returned it for the interpreters of looked_in.
    """
    names = list(found) if asked == "all" else asked.split(",")
    unknown = [name for name in names if name not in (*PEERS, PLAIN)]
    if unknown:
        known = f"{', '.join(PEERS)} and {PLAIN}"
        raise ValueError(f"--compare takes all, or names separated by commas of {known}, got {unknown[0]!r}")
    missing = [name for name in names if name in PEERS and name not in found]
    if missing or not names:
        what = " or ".join(missing or PEERS)
        raise ValueError(
            f"--compare: {what} cannot be imported by {', '.join(looked_in)}: pip install '.[bench]', or name an "
            "interpreter that has it with --peer_python"
        )
    return names


@contextlib.contextmanager
def started_systems(
    options: BuildOptions, peers: Sequence[str], found: Mapping[str, str], all_must_run: bool
) -> Iterator[list[Worker]]:
    """Start ours and the peers for one checkpoint, ours first in the list.

    options: max_seq_len and max_batch_size are those of the workload.
    all_must_run: raise ValueError for a peer that cannot run the checkpoint, in place of a line that says so.
    """
    log.info("%s: starting %s", options.ckpt_dir, ", ".join([*peers, "ours"]))
    with contextlib.ExitStack() as stack:
        systems = []
        for name in peers:  # first, so that a peer that cannot run is told before ours reads gigabytes
            try:
                systems.append(stack.enter_context(_started_peer(name, options, found)))
            except ValueError as error:
                if all_must_run:
                    raise
                log.info("left out: %s", error)
        yield [stack.enter_context(start_ours(_given(options), "ours")), *systems]


@contextlib.contextmanager
def _started_peer(name: str, options: BuildOptions, found: Mapping[str, str]) -> Iterator[Worker]:
    checkpoint, device = open_checkpoint(options.ckpt_dir), choose_device(options.device)
    sizes = {"max_seq_len": options.max_seq_len, "threads": torch.get_num_threads()}
    if name == PLAIN:
        plain = BuildOptions(
            options.ckpt_dir,
            device=options.device,
            dtype=options.dtype,
            max_seq_len=options.max_seq_len,
            max_batch_size=options.max_batch_size,
        )
        with start_ours(_given(plain), PLAIN) as worker:
            yield worker
    elif name == "llama_cpp":
        if options.max_batch_size > 1 or device.type != "cpu":
            raise ValueError("llama_cpp is compared on a CPU with one prompt: give --device cpu --batch_size 1")
        if not isinstance(checkpoint, GGUFCheckpoint):
            raise ValueError(f"llama_cpp reads GGUF files, and {checkpoint.path} is none")
        known = stored_weights(checkpoint.path)
        with start_peer(name, found[name], {"path": str(checkpoint.path), **sizes}, known) as worker:
            yield worker
    else:
        dtype = dtype_name(choose_dtype(options.dtype, device, checkpoint.dtype))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            made = writer(checkpoint, tokenizer_source(checkpoint), "hf", dtype=dtype, context_len=options.max_seq_len)
            write_checkpoint(made, path, lambda n_bytes: None)
            known = {"weights": SHORT[dtype], "weight_bytes": dense_bytes(open_checkpoint(path))}
            own = {"device": str(device), "threads": sizes["threads"]}
            if name == "vllm":
                own = {**sizes, "max_batch_size": options.max_batch_size}
            with start_peer(name, found[name], {"path": str(path), "dtype": dtype, **own}, known) as worker:
                yield worker


def _given(options: BuildOptions) -> dict[str, Any]:
    """Return the options that are not left to the library, for JSON."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in values.items()
        if value != defaults[name]
    }
