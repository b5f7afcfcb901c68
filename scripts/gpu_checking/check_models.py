"""Whole models: their logits against fp32, and their tokens by CUDA graphs, with guesses and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_checking.bench import Bench
from gpu_checking.clock import Recorder
from gpu_checking.random_models import in_floats, random_model
from gpu_checking.report import free_memory
from gpu_checking.sizes import FLOATS
from llama.engine.context import Context
from llama.engine.cuda_graph_runner import GraphSteps
from llama.engine.metrics import Statistics
from llama.engine.runner import PlainSteps, Steps
from llama.engine.scheduler import Batch, Row
from llama.engine.speculative import Draft, Lookup, Pace, Proposer
from llama.model import Transformer
from llama.sampling import SamplingParams, uniforms

CHECKED = (FLOATS, "int4", "int8", "Q4_K", "fp8")
# Against the error of torch's operations in the same dtype: another way of rounding, neither nearer everywhere.
TIMES_TORCHS = 1.5
# Where rows go on, and by how many tokens at once.
STARTS = (20, 4, 13)
STEPS = (1, 2, 3)
# A lead is clear where it is so many times the error of torch's operations.
CLEAR = 8
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=0.7, top_p=0.95),
    "sampled of all": SamplingParams(temperature=1.0, top_p=1.0),
}


# --- logits --------------------------------------------------------------------------------------------------------


def check_logits(bench: Bench) -> None:
    for form in CHECKED:
        if (form in bench.size.forms or form == FLOATS) and bench.report.has_time(f"logits of {form}"):
            check_logits_of(bench, form)
            free_memory(bench.device)


@torch.inference_mode()
def check_logits_of(bench: Bench, form: str) -> None:
    model = random_model(bench.size.checked, form, bench.device, bench.dtype)
    found = logits_by_kernels(model)
    rounded, exact = (logits_by_torch(in_floats(model, dtype)) for dtype in (bench.dtype, torch.float32))
    for what in found:
        scale = float(exact[what].square().mean().sqrt())
        error, torchs = (float((logits[what] - exact[what]).square().mean().sqrt()) for logits in (found, rounded))
        name = f"logits {bench.shown(form)}, {what}"
        bound = TIMES_TORCHS * torchs / scale
        bench.report.check(f"{name}, against {TIMES_TORCHS} x torch's error", bound, float, error / scale)
        first, second = exact[what].topk(2, dim=-1).values.unbind(-1)
        clear = first - second > CLEAR * torchs
        others = int((found[what].argmax(-1) != exact[what].argmax(-1))[clear].sum())
        bench.report.check(f"{name}, other tokens of {int(clear.sum())} that lead clearly", 0, float, others)


def some_texts(model: Transformer) -> tuple[Tensor, Tensor]:
    """Prompts, (3, 20), fewer tokens than fp8 rounds; and what is read behind the beginnings of them, (3, 6)."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(model.args.vocab_size, (len(STARTS), 26), generator=generator).to(model.device)
    return tokens[:, :20], tokens[:, 20:]


def logits_by_kernels(model: Transformer) -> dict[str, Tensor]:
    """Of prompts, and of steps at positions of each row's own."""
    prompts, new = some_texts(model)
    cache = model.new_cache(len(prompts), 32)
    start_pos = torch.tensor(STARTS, device=model.device)
    found = {"prompts": model(prompts, torch.zeros_like(start_pos), cache)}
    read = 0
    for seqlen in STEPS:
        found[f"steps of {seqlen}"] = model(new[:, read : read + seqlen], start_pos + read, cache)
        read += seqlen
    return found


def logits_by_torch(model: Transformer) -> dict[str, Tensor]:
    """The same of whole texts in one pass: of so many tokens no product is ours."""
    prompts, new = some_texts(model)
    texts = torch.cat([prompts, torch.zeros_like(new)], dim=1)
    for row, start in enumerate(STARTS):
        texts[row, start : start + new.shape[1]] = new[row]
    start_pos = torch.zeros(len(STARTS), dtype=torch.long, device=model.device)
    found = {"prompts": model(prompts, start_pos, model.new_cache(*prompts.shape))}
    logits = model(texts, start_pos, model.new_cache(*texts.shape))
    of_new = torch.stack([logits[row, start : start + new.shape[1]] for row, start in enumerate(STARTS)])
    for seqlen, part in zip(STEPS, of_new.split(list(STEPS), dim=1), strict=True):
        found[f"steps of {seqlen}"] = part
    return found


# --- tokens --------------------------------------------------------------------------------------------------------


class AlwaysGuess(Pace):
    """Guesses whatever they cost, so that what is checked does not depend on clocks."""

    def next_count(self) -> int:
        return 5


def check_tokens(bench: Bench) -> None:
    for form in bench.size.graphed:
        if bench.report.has_time(f"tokens of {form}"):
            model = random_model(bench.size.checked, form, bench.device, bench.dtype)
            check_graphs(bench, model, bench.shown(form))
            check_guesses(bench, model, bench.shown(form))
            del model
            free_memory(bench.device)


def check_graphs(bench: Bench, model: Transformer, form: str) -> None:
    """Ragged prompts whose rows end apart; at most 256 positions, as attention shares more by the number of rows."""
    limits = bench.size.limits
    prompts = [some_tokens(model, 3 + 7 * i % 31, seed=i) for i in range(len(limits))]
    length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    recorder = Recorder(bench.device)
    plain = PlainSteps(Context(model, len(prompts), length))
    graphed = GraphSteps(Context(model, len(prompts), length), recorder)
    for kind in bench.size.kinds:
        expected, _ = complete(plain, prompts, limits, KINDS[kind])
        for call in ("a first", "a second"):
            recorded = recorder.count
            job = graphed, prompts, limits, KINDS[kind]
            what = f"tokens {form}, {kind}, {call} call by graphs"
            bench.report.check(f"{what}, other rows than by plain steps", 0, other_rows, expected, *job)
        bench.report.check(f"{what}, graphs made", 0, float, recorder.count - recorded)


def check_guesses(bench: Bench, model: Transformer, form: str) -> None:
    """One row, so that a step has at most eight tokens: those have the same bits as alone."""
    limits = [max(bench.size.limits)]
    prompts = [some_tokens(model, 4, seed=9) * 4]
    contexts = [Context(model, 1, len(prompts[0]) + limits[0]) for _ in range(3)]
    plain, steps, drafts = PlainSteps(contexts[0]), *(GraphSteps(each, Recorder(bench.device)) for each in contexts[1:])
    for kind in bench.size.kinds:
        expected, _ = complete(plain, prompts, limits, KINDS[kind])
        job = steps, prompts, limits, KINDS[kind]
        what = f"tokens {form}, {kind}"
        bench.report.check(f"{what}, by lookup: other rows than without", 0, other_rows, expected, *job, Lookup())
        bench.report.check(f"{what}, itself as draft: share refused", 0, refused, expected, *job, Draft(drafts))


def other_rows(expected: list[list[int]], *job: Any) -> float:
    """How many rows of what `complete` makes of a job differ."""
    found, _ = complete(*job)
    return float(sum(one != other for one, other in zip(found, expected, strict=True)))


def refused(expected: list[list[int]], *job: Any) -> float:
    """The share of guesses that were wrong; 1 where tokens are not those expected."""
    found, statistics = complete(*job)
    return 1 - statistics.accepted / statistics.proposed if found == expected else 1.0


@torch.inference_mode()
def complete(
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    params: SamplingParams,
    proposer: Proposer | None = None,
) -> tuple[list[list[int]], Statistics]:
    """New tokens of each prompt, as many as its limit says; nothing that was read before is used."""
    for each in (steps, getattr(proposer, "steps", None)):
        if each is not None:
            each.context.forget([0] * len(each.context.held))
    pairs = enumerate(zip(prompts, limits, strict=True))
    rows = [Row(i, prompt, limit, uniforms(3, i, limit)) for i, (prompt, limit) in pairs]
    statistics = Statistics()
    batch = Batch(steps, rows, params, (), False, statistics, proposer)
    batch.pace = AlwaysGuess()
    tokens: list[list[int]] = [[] for _ in prompts]
    for chosen in batch.run(echo=False):
        if chosen.token is not None:
            tokens[chosen.place].append(chosen.token)
    return tokens, statistics


def some_tokens(model: Transformer, n: int, seed: int) -> list[int]:
    return torch.randint(model.args.vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
