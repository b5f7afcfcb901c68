"""Run jobs of several ranks on this machine: `python -m tests.parity.ranks_worker JOBS.json`.

Ranks are forked after the imports, which take longer than all that they do; nothing may be computed before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import socket
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported here so that the ranks need not, of which each would take half a second: what they import as they go.
import fairscale.nn.model_parallel  # noqa: F401
import sympy  # type: ignore[import-untyped]  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch.distributed._symmetric_memory

from llama import Llama, sampling
from llama.backends.cuda.one_shot import open_one_shot
from llama.backends.eager import EagerBackend
from llama.checkpoint.names import module_name
from llama.engine import room
from llama.engine.engine import Engine
from llama.engine.leader import follow, lead
from llama.quantization.weights import QuantizedWeight
from llama.sampling import SamplingParams

DRAFT = {"draft": True}
# Of the ranks, the first alone has penalties and masks, and its tokens are everybody's.
CONTROLLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "repetition_penalty": 1.5, "stop": ["e", "a"]},
    {"temperature": 1.0, "top_k": 20, "xtc_probability": 0.5, "xtc_threshold": 0.01, "n": 2},
    {"temperature": 1.0, "regex": "[a-f]{2,4}[0-9]+", "min_p": 0.01},
)


class RepeatingBackend(EagerBackend):
    """Steps run again instead of captured ones, launched ahead as those are."""

    captures_graphs = True

    def graph_capture(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        return lambda run: run


def run_rank(job: dict[str, Any], rank: int) -> None:
    """Save what this rank computes, or what it raises, to OUT.RANK."""
    result: dict[str, Any] = {"log": listen()}
    if rank in job.get("without_kernels", []):
        os.environ["LLAMA_KERNELS"] = "0"
    try:
        options = {"max_seq_len": 32, "device": "cpu", "dtype": "float32", **job.get("options", {})}
        llm = Llama.build(job["folder"], job.get("tokenizer"), **options)
        modules = llm.model.named_modules()
        blocks = [name for name, module in modules if isinstance(module, QuantizedWeight)]
        result["blocks"] = {module_name(name) for name in blocks}
        with torch.inference_mode():
            tokens = torch.tensor(job["tokens"])
            start_pos = torch.zeros(len(tokens), dtype=torch.long)
            result["logits"] = llm.model(tokens, start_pos, llm.model.new_cache(*tokens.shape))
        result["greedy"] = llm.generate(job["prompts"], 6, temperature=0, logprobs=True)
        result["sampled"] = llm.generate(job["prompts"], 6, temperature=1.0, top_p=0.95)
        if job.get("guess"):
            result["controlled"] = [llm.generate(job["prompts"], 12, **options) for options in CONTROLLED]
        if llm.model.parallel.group is not None and llm.model.parallel.size > 1:
            result["one_shot"] = open_one_shot(llm.model.parallel.group, 64, torch.device("cpu"), job["size"])
        if job.get("guess"):
            result["plain"] = llm.generate(job["prompts"], 24, temperature=0.1, seed=1)
            result["guessed"] = guess(job, rank)
            result["perturbed"] = perturbed(job, rank)
            result["joined"] = joined(llm, lambda engine: engine)
            result["led"] = led(llm, rank)
    except ValueError as error:
        result = {"error": str(error)}
    torch.save(result, f"{job['out']}.{rank}")


def listen() -> list[str]:
    """A list of what is logged from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("llama").addHandler(handler)
    logging.getLogger("llama").setLevel(logging.INFO)
    return lines


def guess(job: dict[str, Any], rank: int) -> list[Any]:
    """What speculation makes of the prompts, by a clock that tells each rank something else."""
    time.perf_counter = random.Random(rank).random
    found = []
    for way in ({"speculate": "lookup"}, {"draft_ckpt_dir": job["folder"]}):
        llm = Llama.build(job["folder"], max_seq_len=32, device="cpu", dtype="float32", **way)
        tokens = llm.generate(job["prompts"], 24, temperature=0.1, seed=1)
        found.append((tokens, llm.metrics.proposed, llm.metrics.accepted))
    return found


def perturbed(job: dict[str, Any], rank: int) -> list[Any]:
    """Tokens where every rank but the first has damaged weights and chooses other tokens than its logits say.

    By plain steps, by steps that are recorded and launched ahead, and with guesses.
    """
    choose = sampling.sample

    def other(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return (choose(logits, *args) + rank) % logits.shape[-1]

    found = []
    for captured, way in ((False, {}), (True, {}), (True, {"speculate": "lookup"}), (True, DRAFT)):
        options = {"draft_ckpt_dir": job["folder"]} if way is DRAFT else way
        llm = Llama.build(job["folder"], max_seq_len=32, device="cpu", dtype="float32", **options)
        if rank > 0:
            generator = torch.Generator().manual_seed(rank)
            llm.model.norm.weight.mul_(1 + torch.rand(llm.model.args.dim, generator=generator))
        sampling.sample = other
        if captured:
            for model in filter(None, (llm.model, llm.draft)):
                RepeatingBackend(model.device).bind(model)
        found.append(llm.generate(job["prompts"], 24, temperature=0.4, seed=1))
        sampling.sample = choose
    return found


def joined(llm: Llama, choose_engine: Callable[[Engine], Any]) -> dict[int, list[int | None]]:
    """Tokens of requests that join and leave at random moments, which need more pages than there are."""
    room.page_limit = lambda *args: 5  # type: ignore[attr-defined]
    engine, choose = choose_engine(Engine(llm.model, llm.tokenizer)), random.Random(7)
    stays, tokens = list[int](), defaultdict[int, list[int | None]](list)
    while len(stays) < 12 or engine.unfinished:
        if len(stays) < 12 and choose.random() < 0.5:
            prompt = [choose.randrange(256) for _ in range(choose.randint(1, 20))]
            params = SamplingParams(choose.choice([0, 0.7]), max_gen_len=choose.randint(1, 12), seed=len(stays))
            stays.append(engine.add(prompt, params, interactive=choose.random() < 0.5))
            if choose.random() < 0.3:
                engine.cancel(engine.add(prompt[:1], params))
        for event in engine.step():
            tokens[event.index].append(event.token)
    return {index: tokens[request] for index, request in enumerate(stays)}


def led(llm: Llama, rank: int) -> dict[int, list[int | None]]:
    """The same where only the first rank has the requests."""
    if rank > 0:
        engine = Engine(llm.model, llm.tokenizer)
        follow(engine)
        return {}
    with contextlib.ExitStack() as stack:
        return joined(llm, lambda engine: stack.enter_context(lead(engine)))


def run_job(job: dict[str, Any]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = job["size"]
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        try:
            run_rank(job, rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    assert not failed, f"{len(failed)} of {size} ranks failed on {job['folder']}"


if __name__ == "__main__":
    gc.freeze()  # a collection in a rank would otherwise touch, and so copy, all that was imported
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run_job(each)
