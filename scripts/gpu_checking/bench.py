"""Where and what a run tests and measures; its parts in processes of their own are told by `options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from gpu_checking.report import Report
from gpu_checking.sizes import FLOATS, SIZES, Size
from llama.backends.cuda import elementwise, gemm, gemv
from llama.backends.cuda.available import has_triton
from llama.distributed.device import choose_device
from llama.quantization.planar import MAX_DEQUANT_GEMM_TOKENS, MAX_GEMV_TOKENS


@dataclass(frozen=True)
class Bench:
    device: torch.device
    dtype: torch.dtype  # that is computed in
    size: Size
    report: Report
    options: dict[str, Any]  # of `open_bench`
    quick: bool

    def shown(self, form: str) -> str:
        """A form of weights as people call it."""
        return short_name(self.dtype) if form == FLOATS else form


def short_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def open_bench(device: str | None, size: str, seconds: float, quick: bool = False) -> Bench:
    """ValueError where the kernels do not run, or for a size that is none."""
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    chosen = choose_device(device)
    if chosen.type == "cpu":
        prepare_interpreter()
    elif not has_triton(chosen):
        raise ValueError(f"the kernels do not run on {chosen}: it takes CUDA of capability 8.0 and LLAMA_KERNELS not 0")
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    dtype = torch.float16 if chosen.type == "cpu" else torch.bfloat16
    options = {"device": device, "size": size, "seconds": seconds, "quick": quick}
    return Bench(chosen, dtype, SIZES[size], Report(chosen, seconds), options, quick)


def prepare_interpreter() -> None:
    """Large programs, as it takes as long for a few rows as for many."""
    if not triton.knobs.runtime.interpret:
        raise ValueError("on a CPU Triton's interpreter runs the kernels: set TRITON_INTERPRET=1, and give --size tiny")
    tile = gemm.Tile(256, 16, 4, 1)
    gemm.TILES = dict.fromkeys(gemm.TILES, dict.fromkeys((MAX_GEMV_TOKENS, MAX_DEQUANT_GEMM_TOKENS), (tile, tile)))
    gemm.FP32_TILE, elementwise.VECTOR = tile, 4096
    gemv.ROWS = dict.fromkeys(gemv.ROWS, tile.rows)
