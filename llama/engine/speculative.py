"""Speculative decoding (arXiv:2211.17192): draft tokens that the model verifies in one pass, and whether they pay.

Texts are the same with and without it: draft tokens only decide which positions are computed together, as the random
number of each token is fixed (see D24 and D25).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor

from llama.engine.context import common_prefix_len
from llama.engine.metrics import Metrics
from llama.engine.runner import Runner, StepOutput
from llama.engine.sequence import Sequence as SequenceState
from llama.memory.estimate import MAX_SPECULATIVE_POSITIONS
from llama.sampling import SamplingParams

# Most draft tokens of one sequence: with its newest token they are 8, which the kernels compute in one pass.
MAX_DRAFT_LEN = 7

# Plain steps after speculation has lost for the first time.
FIRST_BACKOFF = 32


class Proposer(Protocol):
    """Proposes the next tokens of sequences; the running ones are the first rows, in the order of the batch."""

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None:
        """Begin a batch; see `Runner.begin`."""
        ...

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Propose at most `count` tokens for each text, the same on every rank."""
        ...

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        """Copy row `source` over row `target`; see `Runner.copy_row`."""
        ...


class NgramProposer:
    """Prompt lookup: proposes the tokens that followed when a text last had its newest two or three tokens."""

    longest = 3  # most tokens to find again; the least is 2
    window = 8192  # tokens to search, from the end: 0.5 ms

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None:
        pass

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [self._continuation(text, count) for text in texts]

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        pass

    def _continuation(self, text: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens that follow the last of the longest matches of the newest tokens; none without one."""
        best, after = 1, 0
        for end in range(len(text) - 1, max(len(text) - self.window, best), -1):
            if text[end - 1] != text[-1] or text[end - 2] != text[-2]:
                continue
            length = 2
            while length < self.longest and length < end and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best:
                best, after = length, end
            if best == self.longest:
                break
        period = len(text) - after  # beyond the end of the text, repeat it from the match on
        return [text[after + i % period] for i in range(count)] if after else []


class DraftModelProposer:
    """Proposes the tokens that a smaller model of the same vocabulary samples with the same random numbers."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def begin(self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor) -> None:
        self.runner.begin(params, uniforms)
        self.runner.context.prefill(prompts)

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        context = self.runner.context
        new = max(
            len(text) - common_prefix_len(cached, text)
            for cached, text in zip(context.cached_tokens, texts, strict=False)
        )
        new = 1 << max(new - 1, 0).bit_length()  # what a captured step computes without padding
        if new > MAX_DRAFT_LEN + 1 or new > min(len(text) for text in texts):  # after backing off
            context.prefill([text[:-1] for text in texts])
            new = 1
        # All rows have the same number of tokens, some of which may be cached already.
        self.runner.launch([text[-new:] for text in texts], [len(text) - new for text in texts])
        for _ in range(count - 1):
            self.runner.launch_next()
        outputs = [self.runner.wait() for _ in range(count)]
        return [[max(each.tokens[i][-1], 0) for each in outputs] for i in range(len(texts))]

    def copy_row(self, source: int, target: int, seqlen: int) -> None:
        self.runner.copy_row(source, target, min(seqlen, len(self.runner.context.cached_tokens[source])))


class DraftLengthController:
    """Decides how many draft tokens the next step has, from the time and the tokens of the last steps.

    Where speculation is slower than plain steps it backs off, each time for twice as many steps until it gains again.
    Clocks differ between ranks, so the first rank's controller decides for all.
    """

    def __init__(self) -> None:
        self._draft_len = 4
        self._plain: deque[float] = deque(maxlen=9)  # seconds of a step
        self._speculative: deque[tuple[float, float]] = deque(maxlen=12)  # seconds of a step, mean tokens of a row
        self._steps = 0
        self._backoff = FIRST_BACKOFF
        self._steps_left = 0
        self.backs_off = False

    def next_draft_len(self) -> int:
        """Return the number of draft tokens in the next step; 0 is a plain step, also to measure the speed of these."""
        self._steps += 1
        self.backs_off = self._steps_left > 0
        if self.backs_off:
            self._steps_left -= 1
            return 0
        return 0 if len(self._plain) < 3 or self._steps % 16 == 0 else self._draft_len

    def record(self, seconds: float, bsz: int, proposed: int, accepted: int) -> None:
        """Add a step of bsz rows to the statistics; proposed, accepted: draft tokens of all rows together."""
        if proposed == 0:
            self._plain.append(seconds)
            return
        longer, shorter = min(self._draft_len + 2, MAX_DRAFT_LEN), max(self._draft_len - 1, 1)
        self._draft_len = longer if accepted == proposed else shorter
        self._speculative.append((seconds, 1 + accepted / bsz))
        if not self._plain or len(self._speculative) < 4:
            return
        if self._gain() < 1:
            self._steps_left, self._backoff = self._backoff, 2 * self._backoff
            self._speculative.clear()
        elif len(self._speculative) == self._speculative.maxlen:
            self._backoff = FIRST_BACKOFF

    def _gain(self) -> float:
        """Return the speed of the last speculative steps divided by that of plain steps."""
        seconds, tokens = (sum(values) for values in zip(*self._speculative, strict=True))
        return tokens * statistics.median(self._plain) / seconds


class Speculation:
    """Speculative steps of one batch, which verify draft tokens and accept those that the model samples, too."""

    def __init__(self, proposer: Proposer, runner: Runner, stop_tokens: Collection[int], metrics: Metrics) -> None:
        self.proposer, self._runner, self._stop_tokens, self._metrics = proposer, runner, stop_tokens, metrics
        self.controller = DraftLengthController()
        self._draft_len = 0  # of the next step
        self._began = 0.0

    def next_draft_len(self) -> int:
        """Return the draft_len to launch the next step with: the number of draft tokens in the step after it."""
        return self.controller.next_draft_len()

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, uniforms: Tensor, first: StepOutput
    ) -> None:
        """Begin a batch whose first tokens are sampled."""
        self._draft_len = first.draft_len
        self.proposer.begin(prompts, params, uniforms)

    def step(self, running: Sequence[SequenceState]) -> StepOutput:
        """Generate the next tokens of each sequence: one after its newest, and one after each accepted draft token."""
        start, backs_off = time.perf_counter(), self.controller.backs_off
        proposals = self._propose(running)
        newest = [[each.tokens[-1], *proposal] for each, proposal in zip(running, proposals, strict=True)]
        self._runner.launch(newest, [len(each.tokens) - 1 for each in running], self.next_draft_len())
        output = self._runner.wait()
        self._draft_len = output.draft_len
        tokens, logprobs = [], []
        for i, proposal in enumerate(proposals):
            n = accepted_len(proposal, output.tokens[i], self._stop_tokens) + 1
            tokens.append(output.tokens[i][:n])
            logprobs.append(output.logprobs[i][:n] if output.logprobs else [])
        proposed, generated = sum(map(len, proposals)), sum(map(len, tokens))
        accepted, seconds = generated - len(tokens), time.perf_counter() - start
        self.controller.record(seconds, len(tokens), proposed, accepted)
        self._metrics.add_speculative_step(seconds, generated, proposed, accepted, backs_off)
        return StepOutput(tokens, logprobs if output.logprobs else None, output.draft_len)

    def _propose(self, running: Sequence[SequenceState]) -> list[list[int]]:
        """Propose draft tokens for each sequence: none beyond its limit, nor where the cache has no room for all."""
        longest = max(len(each.tokens) for each in running)
        room = self._runner.context.cache.max_seq_len - longest
        count = min(self._draft_len, room, MAX_SPECULATIVE_POSITIONS // len(running) - 1)
        if count < 1:
            return [[] for _ in running]
        proposals = self.proposer.propose([each.tokens for each in running], count)
        return [
            proposal[: each.max_len - len(each.tokens) - 1] for each, proposal in zip(running, proposals, strict=True)
        ]


def accepted_len(proposal: Sequence[int], sampled: Sequence[int], stop_tokens: Collection[int]) -> int:
    """Count the first tokens of a proposal that were sampled, too, up to a stop token, which is not counted."""
    pairs = zip(proposal, sampled, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other or one in stop_tokens), len(proposal))
