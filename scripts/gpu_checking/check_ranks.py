"""What several GPUs do together, under torchrun: sums in one kernel against NCCL's, and the same tokens everywhere."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gpu_checking.bench import Bench
from gpu_checking.random_models import random_model
from gpu_checking.report import relative_error
from gpu_checking.rows import Rows
from gpu_checking.sizes import FLOATS
from llama.backends.cuda.one_shot import OneShot, open_one_shot
from llama.distributed.groups import ModelParallel, join_model_parallel
from llama.distributed.job import from_all_ranks, join_job, local_world_size
from llama.quantization.planar import MAX_GEMV_TOKENS
from llama.sampling import SamplingParams

SUM_BOUND = 1e-6
N_TOKENS = 16


def check_ranks(bench: Bench) -> None:
    join_job()
    ranks = join_model_parallel(None, bench.device)
    torch.manual_seed(ranks.rank)  # shares differ
    assert ranks.group is not None
    one_shot = None
    if bench.device.type == "cuda":
        one_shot = open_one_shot(ranks.group, MAX_GEMV_TOKENS * bench.size.args.dim, bench.device, local_world_size())
    if one_shot is None:
        bench.report.left_out.append("sums between GPUs in one kernel: these GPUs do not read each other's memory")
    else:
        for n in (1, MAX_GEMV_TOKENS):
            what = f"sum over {ranks.size} GPUs, tokens: {n}"
            bench.report.check(what, SUM_BOUND, sum_error, bench, ranks, one_shot, n)
    bench.report.check(f"tokens of {ranks.size} ranks that differ", 0, differing_ranks, bench, ranks)


def sum_error(bench: Bench, ranks: ModelParallel, one_shot: OneShot, n: int) -> float:
    x = torch.randn(n, bench.size.args.dim, device=bench.device)
    expected = x.double()
    dist.all_reduce(expected, group=ranks.group)
    return relative_error(one_shot(x), expected)


def differing_ranks(bench: Bench, ranks: ModelParallel) -> float:
    """How many ranks have other tokens than the first."""
    model = random_model(bench.size.checked, FLOATS, bench.device, bench.dtype, ranks)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(model.args.vocab_size, (2, 5), generator=generator).tolist()
    with torch.inference_mode():
        tokens = list(Rows.of(model, prompts, N_TOKENS, SamplingParams(temperature=0)).generate(N_TOKENS))
    everywhere = from_all_ranks(tokens)
    return float(sum(each != everywhere[0] for each in everywhere))
