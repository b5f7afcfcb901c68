"""Models of what further families compute: prompts by the kernels, and steps by graphs, against torch's operations."""

from __future__ import annotations

import dataclasses

import torch

from gpu_checking.bench import Bench
from gpu_checking.random_models import random_model
from gpu_checking.rows import Rows
from gpu_checking.sizes import FLOATS, TINY
from llama.cache import ForwardBatch
from llama.config import ModelArgs
from llama.rope_scaling import QueryScaling
from llama.sampling import SamplingParams

BOUND = 0.05  # of logits that have a deviation of about 3, in 16 bits
PROMPT_LEN, N_TOKENS = 12, 6
LATER = QueryScaling(beta=0.5, period=4)
FAMILIES: dict[str, ModelArgs] = {
    "chunks, unit norms, queries scaled in layers without rotation, relu2": dataclasses.replace(
        TINY,
        attention_chunk=5,
        full_layers=(1,),
        unrotated_layers=(1,),
        qk_norm="unit",
        query_scaling=LATER,
        activation="relu2",
    ),
    "windows with a rotation of their own, norms of all heads and of outputs, xIELU": dataclasses.replace(
        TINY,
        sliding_window=7,
        full_layers=(1,),
        window_rope_theta=50.0,
        qk_norm="all heads",
        output_norms=True,
        activation="xielu",
    ),
    "layer norms, norms after the rotation": dataclasses.replace(TINY, layer_norms=True, qk_norm="rotated head"),
    "norms of heads, scaled queries": dataclasses.replace(TINY, qk_norm="head", query_scaling=LATER),
}


def check_families(bench: Bench) -> None:
    for form in (FLOATS, "int4"):
        for name, args in FAMILIES.items():
            what = f"{bench.shown(form)}, {name}"
            if bench.report.has_time(what):
                bench.report.check(what, BOUND, logits_error, bench, form, args)


@torch.inference_mode()
def logits_error(bench: Bench, form: str, args: ModelArgs) -> float:
    """How far torch's logits of each token that graphs chose are below the highest, at most, or prompts' are apart."""
    model = random_model(args, form, bench.device, bench.dtype)
    prompt = torch.randint(args.vocab_size, (PROMPT_LEN,), generator=torch.Generator().manual_seed(5)).tolist()
    greedy = SamplingParams(temperature=0)
    made = [row[0] for row in Rows.of(model, [prompt], N_TOKENS, greedy).generate(N_TOKENS)]
    tokens = torch.tensor(prompt + made[:-1], device=bench.device)

    def batch() -> ForwardBatch:
        cache = model.new_cache(1, len(tokens))
        return ForwardBatch.of_rows(cache, torch.zeros(1, dtype=torch.long, device=bench.device), len(tokens))

    found = model.logits(model.hidden(tokens, batch()))
    steps = batch()
    wanted = model.logits(model.run_layers(tokens, model.rope(steps.positions, steps.lengths), steps))
    chosen = wanted[PROMPT_LEN - 1 :]
    below = chosen.amax(-1) - chosen[torch.arange(N_TOKENS), torch.tensor(made, device=bench.device)]
    return max(float((found - wanted).norm() / wanted.norm()), float(below.max()))
