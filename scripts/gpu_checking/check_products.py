"""Products with weights of every form against fp64 on the values that they store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checking.bench import Bench
from gpu_checking.random_models import random_weight
from gpu_checking.report import differing, relative_error
from llama import gpu_layers
from llama.gpu import elementwise, products
from llama.gpu.planes import MOST_UNROUNDED
from llama.gpu_layers import GpuWeight

FORMS = ("bf16", "fp16", "int8", "int4", "Q4_0", "Q4_K", "Q6_K", "fp8")
FEW_BOUND = 1e-5  # of few tokens, which are summed in fp32
FP8_BOUND = 0.06  # of many tokens, which are rounded to 3 bits of mantissa
MANY = (33, 200)


def check_products(bench: Bench) -> None:
    for form in FORMS:
        if bench.report.has_time(f"products with {form}"):
            check_form(bench, form)


def check_form(bench: Bench, form: str) -> None:
    check = bench.report.check
    # Many tokens are brought to the dtype of floats.
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    eps = max(torch.finfo(dtype).eps for dtype in (bench.dtype, dtypes.get(form, bench.dtype)))
    for rows, columns in bench.size.products:
        case = make_case(bench, form, rows, columns)
        what = f"product {form} {rows} x {columns}"
        for n in (1, products.FEW):
            check(f"{what}, tokens: {n}", FEW_BOUND, case.few_error, n)
        check(f"{what}, tokens: 3, bias", FEW_BOUND, case.few_error, 3, torch.randn(rows, device=bench.device))
        check(f"{what}, gated, tokens: {products.FEW}", 2 * FEW_BOUND, case.gated_error)
        check(f"{what}, values that differ alone and among {products.FEW}", 0, case.differing_alone)
        for n in (products.MOST, *MANY):
            rounds = form == "fp8" and n > MOST_UNROUNDED
            check(f"{what}, tokens: {n}", FP8_BOUND if rounds else eps, case.many_error, n)


@dataclass(frozen=True)
class Case:
    """A weight and tokens x (n_tokens, columns), and their products in fp64."""

    weight: GpuWeight
    x: Tensor
    exact: Tensor

    def few_error(self, n: int, bias: Tensor | None = None) -> float:
        exact = self.exact[:n] if bias is None else self.exact[:n] + bias
        return relative_error(gpu_layers.multiply(self.x[:n], self.weight, bias, torch.float32), exact)

    def many_error(self, n: int) -> float:
        return relative_error(gpu_layers.multiply(self.x[:n], self.weight), self.exact[:n])

    def gated_error(self) -> float:
        """Of an odd number of hidden features: rows are one more than a multiple of four."""
        rows = self.weight.shape[0] - 3
        both = self.weight[:rows] if isinstance(self.weight, Tensor) else self.weight.part(0, rows)
        gates, ups = self.exact[: products.FEW, :rows].chunk(2, dim=-1)
        x = self.x[: products.FEW]
        if isinstance(both, Tensor):
            y = elementwise.gate(gpu_layers.multiply(x, both, None, torch.float32))
        else:
            y = products.multiply_gated(x, both, torch.float32)
        return relative_error(y, F.silu(gates) * ups)

    def differing_alone(self) -> float:
        together = gpu_layers.multiply(self.x[: products.FEW], self.weight, None, torch.float32)
        tokens = (0, 2, products.FEW - 1)
        alone = [gpu_layers.multiply(self.x[i : i + 1], self.weight, None, torch.float32) for i in tokens]
        return differing(torch.cat(alone), together[list(tokens)])


def make_case(bench: Bench, form: str, rows: int, columns: int) -> Case:
    weight, values = random_weight(form, rows, columns, bench.device)
    x = torch.randn(max(MANY), columns, device=bench.device, dtype=bench.dtype)
    return Case(weight, x, x.double() @ values.t())
