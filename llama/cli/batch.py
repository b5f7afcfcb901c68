"""`llama batch`: the lines of a file completed, on any number of replicas, from where an earlier run ended."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from llama import Llama
from llama.cli.batch_progress import BatchProgress
from llama.cli.constraints import read_constraints
from llama.cli.options import build_flags, sampling_flags
from llama.cli.prompts import on_first_rank
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.signals import before_end
from llama.cli.tools import read_tools
from llama.distributed.job import add_up, agree, ends_with_others, from_all_ranks
from llama.distributed.torchrun_env import read_torchrun_env
from llama.engine.leader import follow, lead
from llama.engine.options import BuildOptions
from llama.engine.prompts import check_token_ids
from llama.jobs.finished import Digest, FinishedLines, line_digest
from llama.jobs.lines import NO_BUNDLE, STANDARD_STREAM, JobInput, deal, read_ahead, read_now
from llama.jobs.result_file import ResultFile, join_parts, part_path, parts_of, sort_results
from llama.jobs.run import JobOptions, LineRunner
from llama.sampling import SamplingParams

log = logging.getLogger("llama")


def main(
    input: Path,
    output: Path,
    options: Annotated[BuildOptions, build_flags()],
    params: Annotated[SamplingParams, sampling_flags(max_gen_len=256)],
    *,
    ordered: bool = False,
    strict: bool = False,
    text: bool = False,
    tools: Path | None = None,
) -> None:
    """Complete each line of INPUT, and append a line of JSON to OUTPUT as soon as it is complete.

    A line is a JSON string, an object with prompt, messages or tokens, and maybe an id and sampling options of its own,
    or a line of OpenAI's batch files; of a .txt file it is a prompt. Started again after any end, the same command
    completes the lines that have no result yet.

    Args:
        input: a file with a line for each prompt; - is stdin.
        output: a file of JSON lines, which may hold results of an earlier run; - is stdout.
        ordered: write results in the order of the input.
        strict: stop at a line that cannot be completed; else its result has an error in place of a text.
        text: take each line of the input as a prompt, verbatim.
        tools: a file with a JSON list of what the model may call, for lines with messages and no tools of their own.

    Examples:
        llama batch prompts.txt completions.jsonl
        llama batch questions.jsonl answers.jsonl --ckpt_dir Meta-Llama-3-8B-Instruct --max_gen_len 512
        torchrun --nproc_per_node 8 --max_restarts 3 -m llama batch in.jsonl out.jsonl --model_parallel_size 2
    """
    params = read_constraints(params, options.timeout)
    ranks = read_torchrun_env().world_size
    n_replicas = ranks // (options.model_parallel_size or ranks)
    if n_replicas > 1 and STANDARD_STREAM in (input, output):
        raise ValueError(
            f"{n_replicas} replicas cannot share {'stdin' if input == STANDARD_STREAM else 'stdout'}: give a file that "
            "all hosts can reach"
        )
    digest = line_digest(dataclasses.replace(params, seed=options.seed))
    job = _Job(input, output, text)
    offered = on_first_rank(lambda: read_tools(tools), options.timeout)
    finished, left = on_first_rank(lambda: job.resume(digest), options.timeout)
    if left == 0:
        log.info("%s has the results of all %d lines already", output, finished.count)
        return
    llm = Llama.from_options(options, check=lambda _, args: check_token_ids(params, args))
    leads = llm.model.parallel.rank == 0
    with agree():
        if leads:
            job.open(read_torchrun_env().rank)
    if len({nbytes for nbytes in from_all_ranks(job.source.nbytes if leads else None) if nbytes is not None}) > 1:
        raise ValueError(f"{input} has another size on another host: put it on a file system that all hosts share")
    with agree():
        if is_first_rank() and len(parts_of(output)) < n_replicas - 1:
            raise ValueError(f"{output} is not on a file system that all hosts share, as its parts do not meet there")

    error: Exception | None = None
    if leads:
        source, results = job.source, job.results
        progress = BatchProgress(source.nbytes, finished.count, is_shared=n_replicas > 1, is_shown=is_first_rank())
        lines = finished.unfinished(source, digest)
        if n_replicas > 1:
            lines = deal(lines, lambda: add_up("bundles", 1) - 1)
        next_line = progress.of((read_now if source.is_file else read_ahead)(lines))

        def finish() -> None:
            results.stop()
            progress.close()
            log.info("ended: %s has all that is complete, and the same command goes on from there", results.name)

        name = Path(options.ckpt_dir).name
        job_options = JobOptions(params, digest, name, ordered and n_replicas == 1, strict, offered)
        with before_end(finish):
            try:
                waits = nullcontext() if source.is_file else ends_with_others()  # for more lines
                leading = lead(llm.engine) if llm.model.parallel.size > 1 else nullcontext(llm.engine)
                with waits, leading as engine:
                    LineRunner(llm, engine, job_options, results.append, progress.add).run(
                        next_line, lambda: source.is_json
                    )
            except Exception as caught:
                error = caught
                if n_replicas > 1:
                    add_up("bundles", NO_BUNDLE)  # the others end soon, too
                if not isinstance(error, ValueError | OSError):
                    raise  # the ranks that follow do not know: see lead
        progress.flush()
        if not is_first_rank():
            results.close()  # the first rank joins it to the output
    else:
        follow(llm.engine)
    with agree():
        if error is not None:
            raise error
    with agree():
        if is_first_rank():
            progress.close()
            if results.is_file:
                join_parts(results, finished)
                if ordered and not results.is_ordered:
                    sort_results(results)
                results.sync()
    if is_first_rank():
        lines_done, errors = progress.totals()
        log.info("%d lines in %s%s", lines_done, results.name, f", {errors} of them with an error" if errors else "")
        report(llm)


class _Job:
    """The files of a job, as far as this rank has opened them."""

    source: JobInput
    results: ResultFile

    def __init__(self, input: Path, output: Path, is_text: bool) -> None:
        self._input, self._output, self._is_text = input, output, is_text
        self._is_open = False

    def resume(self, digest: Digest) -> tuple[FinishedLines, int | None]:
        """On the first rank, open the files, and bring the output into order after an earlier run.

        Return which lines are finished, and how many are left where that is known. Raise ValueError where the output is
        not of this input; then nothing is changed.
        """
        self.source = JobInput(self._input, self._is_text)
        if self.source.is_same_file(self._output):
            raise ValueError(f"{self._input} is the input, and the output would overwrite it: give another file")
        self.results = ResultFile(self._output)
        self._is_open = True
        finished = FinishedLines(self.results.name)
        for number, stored, _ in self.results.results():
            if not finished.add(number, stored):
                raise ValueError(f"{self._output} has two results of the line with index {number}: remove one")
        if not self.results.is_file:
            return finished, None
        in_parts = FinishedLines(f"a part of the output, {self._output}.rank*,")
        for path in parts_of(self._output):
            part = ResultFile(path)
            for number, stored, _ in part.results():
                in_parts.add(number, stored)
            part.close()
        left: int | None = None
        if self.source.is_file and (finished.count or in_parts.count):
            before = finished.count
            left = sum(1 for _ in finished.unfinished(self.source, digest))
            for _ in in_parts.unfinished(self.source, digest):
                pass
        self.results.drop_torn_line()
        join_parts(self.results, finished)
        return finished, None if left is None else left - (finished.count - before)

    def open(self, rank: int) -> None:
        """Open the files of a replica whose first rank is `rank`, unless they are open."""
        if not self._is_open:
            self.source = JobInput(self._input, self._is_text)
            self.results = ResultFile(part_path(self._output, rank))
