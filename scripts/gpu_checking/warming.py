"""Kernels are compiled before they are measured, by a process for each form of weights at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

from gpu_checking.bench import Bench, open_bench
from gpu_checking.clock import measure_copies
from gpu_checking.measure import measure_form
from gpu_checking.measure_kernels import measure_linears
from gpu_checking.processes import reply, started


def warm(bench: Bench) -> None:
    """Fill Triton's cache for what is measured; the results are those of one layer."""
    with contextlib.ExitStack() as stack:
        workers = {
            form: stack.enter_context(started("warming", {**bench.options, "form": form})) for form in bench.size.forms
        }
        for form, process in workers.items():
            try:
                reply(process, bench.report.seconds_left())
            except ValueError as error:  # what is measured will tell more
                bench.report.left_out.append(f"kernels compiled ahead for {form}: {error}")


def compile_all(bench: Bench, form: str) -> None:
    """Run what needs the kernels of a form once, small."""
    args = dataclasses.replace(bench.size.args, n_layers=1)
    size = dataclasses.replace(
        bench.size,
        args=args,
        forms=(form,),
        contexts=bench.size.contexts[:1],
        prompts=bench.size.prompts[:1],
        steps=1,
        repeats=1,
    )
    bench = dataclasses.replace(bench, size=size)
    measure_copies(bench)
    measure_form(bench, form)
    measure_linears(bench)


def main() -> None:
    options = json.loads(sys.argv[1])
    form = options.pop("form")
    with contextlib.redirect_stdout(sys.stderr):
        compile_all(open_bench(**options), form)
    print(json.dumps({"warm": form}), flush=True)


if __name__ == "__main__":
    main()
