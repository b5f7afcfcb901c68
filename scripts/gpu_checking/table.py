"""What a person reads of a run: decoding by form, batch and context; what was to be reached; the rest in lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Figures = dict[str, list[dict[str, Any]]]

# Percent of the bandwidth of a copy that one row at the shortest context shall reach, and should.
SHARES = {"bf16": (80, 90), "int8": (60, 80), "int4": (45, 65), "Q4_K": (45, 65)}


def lines(figures: Figures) -> Iterator[str]:
    for row in figures.get("copy", []):
        yield f"a copy: {row['gb_s']:.0f} GB/s, read and written"
    yield from decode_lines(figures.get("decode", []))
    for row in figures.get("decode", []):
        if row["bsz"] == 1:
            yield (
                f"{row['form']} at {row['context']}: a step is launched in {row['host_us']:.0f} us, "
                f"its graph was recorded in {row['recording_s']:.2f} s"
            )
    for row in figures.get("prefill", []):
        yield f"prefill {row['form']} of {row['n_tokens']}: {row['tok_s']:.0f} tok/s, {row['ms']:.1f} ms"
    for row in figures.get("memory", []):
        yield f"peak memory {row['form']}: {row['peak_mib']:.0f} MiB"
    for row in figures.get("cold_start", []):
        yield (
            f"cold start {row['form']}, kernels {row['kernels']}: from the model, made in {row['model_s']:.2f} s, "
            f"{row['first_token_s']:.2f} s to the first token, {row['third_token_s']:.2f} s to the third; "
            f"the process took {row['process_s']:.1f} s"
        )
    for row in figures.get("linears", []):
        cublas = "" if row["cublas_gb_s"] is None else f", cuBLAS {row['cublas_gb_s']:.0f}"
        yield (
            f"{row['name']} ({row['rows']} x {row['columns']}) in {row['form']}, tokens: {row['n_tokens']}: "
            f"{row['us']:.1f} us, {row['gb_s']:.0f} GB/s{cublas}"
        )
    for row in figures.get("kernels", []):
        share = "" if row["gb_s"] is None else f", {row['gb_s']:.0f} GB/s, {row['percent_of_copy']:.0f} % of a copy"
        yield f"{row['name']}: {row['us']:.1f} us{share}"
    for row in figures.get("peers", []):
        if row["error"] is not None:
            yield f"peer {row['name']} failed: {row['error']}"
        else:
            times = f"ours {row['ours_ms']:.2f}, {row['ours_is_faster_by']:.2f} x as fast"
            yield f"peer {row['name']} at {row['context']}: {row['ms']:.2f} ms a token, {times}"
    for row in figures.get("goals", []):
        reached = "reached" if row["reached"] else "NOT reached"
        yield f"{row['name']}: {row['measured']:.3g}, {reached}: {row['needed']:.3g} needed, {row['aim']:.3g} aimed at"


def decode_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a form and context, one column a batch: ms a step, tokens a second, percent of a copy's bandwidth."""
    if not rows:
        return
    batches = sorted({row["bsz"] for row in rows})
    found = {(row["form"], row["context"], row["bsz"]): row for row in rows}
    yield "decoding: ms a step / tok/s / % of a copy's bandwidth"
    yield f"{'':<14}" + "".join(f"{f'batch {bsz}':>24}" for bsz in batches)
    for form, context in dict.fromkeys((row["form"], row["context"]) for row in rows):
        line = f"{f'{form} at {context}':<14}"
        for bsz in batches:
            row = found.get((form, context, bsz))
            cell = "-" if row is None else f"{row['ms']:.2f} / {row['tok_s']:.0f} / {row['percent_of_copy']:.0f} %"
            line += f"{cell:>24}"
        yield line


def goals(figures: Figures) -> Iterator[dict[str, Any]]:
    """What was to be reached, of what was measured."""
    decode = figures.get("decode", [])
    found = {(row["form"], row["bsz"], row["context"]): row for row in decode}
    contexts = sorted({row["context"] for row in decode})
    if not contexts:
        return
    shortest, longest = contexts[0], contexts[-1]
    for form, (needed, aim) in SHARES.items():
        if (form, 1, shortest) in found:
            yield goal(f"{form}, % of a copy", found[form, 1, shortest]["percent_of_copy"], needed, aim)
    for form in dict.fromkeys(row["form"] for row in decode):
        one, many, far = (found.get((form, *cell)) for cell in ((1, shortest), (64, shortest), (1, longest)))
        if one is not None and many is not None:
            yield goal(f"{form}, tok/s of batch 64 against 1", many["tok_s"] / one["tok_s"], 30, 45)
        if one is not None and far is not None and longest > shortest:
            more = (far["cache_bytes"] - one["cache_bytes"]) / figures["copy"][0]["gb_s"] / 1e6  # ms at a copy's speed
            name = f"{form}, ms at {longest} against those at {shortest} and more keys at a copy's bandwidth"
            yield goal(name, far["ms"] / (one["ms"] + more), 1.1, 1.0, most=True)
    for row in figures.get("cold_start", []):
        name = f"{row['form']}, s from a ready model to the first token, kernels {row['kernels']}"
        yield goal(name, row["first_token_s"], 3, 1.5, most=True)


def goal(name: str, measured: float, needed: float, aim: float, most: bool = False) -> dict[str, Any]:
    """most: it is reached by no more than what is needed, instead of no less."""
    reached = measured <= needed if most else measured >= needed
    return {"name": name, "measured": measured, "needed": needed, "aim": aim, "reached": reached}
