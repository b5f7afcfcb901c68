"""Kernels are compiled before they are checked and measured, by a process for each form of weights at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

from gpu_checking import check_kernels, check_products
from gpu_checking.bench import Bench, open_bench
from gpu_checking.clock import measure_copies
from gpu_checking.measure import measure_form
from gpu_checking.measure_kernels import measure_linears
from gpu_checking.processes import reply, started

KERNELS = "kernels"  # those that know no form


def warm(bench: Bench, measured: bool) -> None:
    """Fill Triton's cache, for what is measured, too, or for checks alone; the results are those of one layer."""
    what = [*dict.fromkeys([*bench.size.forms, *check_products.FORMS]), KERNELS]
    with contextlib.ExitStack() as stack:
        workers = {
            each: stack.enter_context(started("warming", {**bench.options, "what": each, "measured": measured}))
            for each in what
        }
        for each, process in workers.items():
            try:
                reply(process, bench.report.seconds_left())
            except ValueError as error:  # the check itself will tell more
                bench.report.left_out.append(f"kernels compiled ahead for {each}: {error}")


def compile_all(bench: Bench, what: str, measured: bool) -> None:
    """Run what needs the kernels of a form once, small."""
    args = dataclasses.replace(bench.size.args, n_layers=1)
    size = dataclasses.replace(
        bench.size,
        args=args,
        checked=args,
        forms=(what,),
        contexts=bench.size.contexts[:1],
        prompts=bench.size.prompts[:1],
        steps=1,
        repeats=1,
    )
    is_measured = measured and what in bench.size.forms
    bench = dataclasses.replace(bench, size=size)
    if what == KERNELS:
        check_kernels.check_attention(bench)
        check_kernels.check_between(bench)
        check_kernels.check_sampling(bench)
        return
    if what in check_products.FORMS:
        check_products.check_form(bench, what)
    if is_measured:
        measure_copies(bench)
        measure_form(bench, what)
        measure_linears(bench)


def main() -> None:
    options = json.loads(sys.argv[1])
    what, measured = options.pop("what"), options.pop("measured")
    with contextlib.redirect_stdout(sys.stderr):
        compile_all(open_bench(**options), what, measured)
    print(json.dumps({"warm": what}), flush=True)


if __name__ == "__main__":
    main()
