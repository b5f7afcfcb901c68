"""Which sequences run together, and when each ends: a batch is prefilled, then decode steps run until all have ended.

All results leave as `TokenEvent`s. Knows nothing of file formats.
"""

from __future__ import annotations

import itertools
import time
from collections import abc
from typing import Any

import torch
from torch import Tensor

from llama.engine.metrics import Metrics
from llama.engine.options import check_speculation
from llama.engine.runner import Runner, StepOutput
from llama.engine.runner_pool import RunnerPool
from llama.engine.sequence import Sequence
from llama.engine.speculative import DraftModelProposer, NgramProposer, Proposer, Speculation
from llama.memory.estimate import BatchShape
from llama.outputs import FinishReason, TokenEvent
from llama.sampling import INVALID, SamplingParams
from llama.tokenizer import Tokenizer


class Scheduler:
    """Splits sequences into batches, and runs one batch after the other."""

    def __init__(self, pool: RunnerPool, tokenizer: Tokenizer, speculate: str | None = None) -> None:
        """Make a scheduler; speculate: "lookup" or None, as a draft model is in the pool."""
        check_speculation(speculate, pool.draft is not None)
        self.pool, self.tokenizer, self.speculate = pool, tokenizer, speculate
        self.metrics = Metrics()
        args = pool.model.args
        self.max_batch_size = args.max_batch_size
        # Control tokens, and the ids of padding in an embedding, add nothing to a text.
        self.silent_tokens = {*tokenizer.special_tokens.values(), *range(tokenizer.n_words, args.vocab_size)}

    def run(
        self, sequences: abc.Iterable[Sequence], params: SamplingParams, keep_cache: bool = False
    ) -> abc.Iterator[TokenEvent]:
        """Complete the sequences and yield their events, with params.echo those of their prompts first.

        keep_cache: keep the cache of the one sequence, so that the next run with keep_cache prefills only what is new.
        Raise ValueError where logits are NaN or infinite. The caller's autograd and autocast are left while an event is
        computed, and theirs again when they have it.
        """
        events = self._run(sequences, params, keep_cache)
        device_type = self.pool.model.device.type
        try:
            while True:
                with torch.inference_mode(), torch.autocast(device_type, enabled=False):
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            events.close()

    def _run(
        self, sequences: abc.Iterable[Sequence], params: SamplingParams, keep_cache: bool
    ) -> abc.Generator[TokenEvent]:
        """See `run`."""
        waiting = iter(sequences)
        while batch := list(itertools.islice(waiting, self.max_batch_size)):
            shape = BatchShape(
                len(batch),
                max(len(sequence.prompt) for sequence in batch),
                max(sequence.max_len for sequence in batch),
                params.echo and params.logprobs,
                self.speculate is not None or self.pool.draft is not None,
            )
            runners = self.pool.take(shape, keep_cache)
            proposer: Proposer | None = NgramProposer() if self.speculate == "lookup" else None
            if self.pool.draft is not None:
                proposer = DraftModelProposer(runners[1])
            try:
                yield from Batch(runners[0], batch, params, self, proposer).run()
            finally:
                self.pool.give_back(runners, keep_cache, shape)


class Batch:
    """Sequences that run together until the last has ended.

    The running sequences are the first rows of the runner's context, in order. Where one ends, the last moves into its
    row.
    """

    def __init__(
        self,
        runner: Runner,
        sequences: abc.Sequence[Sequence],
        params: SamplingParams,
        scheduler: Scheduler,
        proposer: Proposer | None = None,
    ) -> None:
        self.runner, self.context = runner, runner.context
        self.running = list(sequences)
        self.params, self.metrics = params, scheduler.metrics
        stop = params.stop_token
        self.stop_tokens = scheduler.tokenizer.stop_tokens if stop is None else frozenset({stop})
        self.silent_tokens = scheduler.silent_tokens
        self.speculation: Speculation | None = None
        if proposer is not None and self.context.prefix_reusable:  # otherwise draft tokens would change earlier keys
            self.speculation = Speculation(proposer, runner, self.stop_tokens, self.metrics)
        self._in_flight = False  # whether a step is launched and not yet waited for
        self._began = 0.0  # when the step that is waited for began

    def run(self) -> abc.Iterator[TokenEvent]:
        """Complete the sequences; see `Scheduler.run`."""
        sequences = list(self.running)
        output, scores = self._prefill()
        self._check(output)
        if self.params.echo:
            for i, sequence in enumerate(sequences):
                for j, token in enumerate(sequence.prompt):
                    logprob = scores[i][j] if scores else None
                    yield TokenEvent(sequence.index, token, self._text(sequence, token), logprob)
        full = [i for i, sequence in enumerate(self.running) if not sequence.max_new_tokens]
        for i in full:
            yield TokenEvent(self.running[i].index, None, self.running[i].decoder.flush(), finish_reason="length")
        self._remove(full, output)
        if output is None or not self.running:
            return
        while True:
            ended = []
            for i, sequence in enumerate(self.running):
                reason: FinishReason | None = None
                for j, token in enumerate(output.tokens[i]):
                    if token in self.stop_tokens:
                        reason = "stop"
                        break
                    sequence.tokens.append(token)
                    text = self._text(sequence, token)
                    logprob = output.logprobs[i][j] if output.logprobs else None
                    yield TokenEvent(sequence.index, token, text, logprob)
                if reason is None and len(sequence.tokens) == sequence.max_len:
                    reason = "length"
                if reason is not None:
                    yield TokenEvent(sequence.index, None, sequence.decoder.flush(), finish_reason=reason)
                    ended.append(i)
            # A step that was launched ahead still has the rows of sequences that have ended.
            late = self.runner.wait() if ended and self._in_flight else None
            if ended:
                self._remove(ended, late)
                if not self.running:
                    return
            output = late or self._step()
            if late:
                self._in_flight = False
                self._count_step()
            self._check(output)

    def _prefill(self) -> tuple[StepOutput | None, list[list[float]]]:
        """Prefill the prompts; return their first new tokens, None if max_gen_len is 0, and the prompts' scores."""
        start, computed = time.perf_counter(), self.context.n_computed
        prompts = [sequence.prompt for sequence in self.running]
        uniforms = self._uniforms()
        self.runner.begin(self.params, uniforms)
        hidden, scores = self.context.prefill(prompts, scored=self.params.echo and self.params.logprobs)
        computed = self.context.n_computed - computed
        output = None
        if self.params.max_gen_len != 0:
            draft_len = self.speculation.next_draft_len() if self.speculation else 0
            output = self.runner.sample(hidden[:, None], [len(prompt) - 1 for prompt in prompts], draft_len)
            if self.speculation:
                self.speculation.begin(prompts, self.params, uniforms, output)
        self.metrics.prefill_seconds += time.perf_counter() - start
        self.metrics.prompt_tokens += computed
        self.metrics.reused_tokens += sum(map(len, prompts)) - computed
        return output, scores

    def _uniforms(self) -> Tensor:
        """Return each sequence's random numbers, at the positions after which they sample a token: (bsz, seqlen)."""
        uniforms = torch.zeros(len(self.running), self.context.cache.max_seq_len, dtype=torch.float32, device="cpu")
        for numbers, sequence in zip(uniforms, self.running, strict=True):
            numbers[len(sequence.prompt) - 1 :][: sequence.max_new_tokens] = sequence.uniforms
        return uniforms

    def _step(self) -> StepOutput:
        """Generate the next tokens of each running sequence."""
        if self.speculation:
            return self.speculation.step(self.running)
        if not self._in_flight:
            self._began = time.perf_counter()
            newest = [[sequence.tokens[-1]] for sequence in self.running]
            self.runner.launch(newest, [len(sequence.tokens) - 1 for sequence in self.running])
        # The next step is launched before this one is waited for, where every sequence is sure to need it.
        self._in_flight = self.runner.runs_ahead and all(
            len(sequence.tokens) + 1 < sequence.max_len for sequence in self.running
        )
        if self._in_flight:
            self.runner.launch_next()
        output = self.runner.wait()
        self._count_step()
        return output

    def _count_step(self) -> None:
        """Add the step that was waited for to the metrics."""
        now, metrics = time.perf_counter(), self.metrics
        metrics.decode_seconds += now - self._began
        metrics.decode_steps += 1
        metrics.decoded_tokens += len(self.running)
        self._began = now

    def _remove(self, ended: abc.Sequence[int], late: StepOutput | None) -> None:
        """Remove sequences that have ended: the last running one moves into the row of each.

        late: the output of a step that was launched before they ended, or None; its rows move, too.
        """
        outputs = (late.tokens, late.logprobs) if late is not None else ()
        late_rows: list[list[Any]] = [rows for rows in outputs if rows is not None]
        for i in reversed(ended):
            last = self.running.pop()
            source = len(self.running)
            for rows in late_rows:
                moved = rows.pop()
                if i < source:
                    rows[i] = moved
            if i < source:
                seqlen = len(last.tokens) - (late is None)
                self.runner.copy_row(source, i, seqlen)
                if self.speculation:
                    self.speculation.proposer.copy_row(source, i, seqlen)
                self.running[i] = last

    def _text(self, sequence: Sequence, token: int) -> str:
        """Return the text that a token adds to its sequence."""
        return "" if token in self.silent_tokens else sequence.decoder.push(token)

    def _check(self, output: StepOutput | None) -> None:
        """Raise ValueError where the logits of a running sequence were NaN or infinite, before any token is told."""
        for sequence, tokens in zip(self.running, output.tokens if output else (), strict=False):
            if INVALID in tokens:
                raise ValueError(
                    f"the logits of prompt {sequence.index} are NaN or infinite after "
                    f"{len(sequence.tokens) + tokens.index(INVALID)} tokens: the weights are damaged, or too large for "
                    "this dtype (try --dtype float32)"
                )
