"""The engine: requests become tokens. Requests join and leave while others run; every way of running stands on it.

All results leave as `TokenEvent`s. Knows nothing of file formats, of dialogs or of terminals.
"""

from __future__ import annotations

import itertools
import time
from collections import abc

import torch

from llama.cache import PAGE_SIZE
from llama.engine.metrics import Metrics
from llama.engine.options import check_speculation
from llama.engine.prompts import prompt_ids
from llama.engine.room import Room
from llama.engine.sequence import Chunk, Sequence
from llama.engine.sequence_maker import SequenceMaker
from llama.engine.speculative import Speculation
from llama.engine.step_budget import StepBudget
from llama.engine.step_data import StepOutput
from llama.model import Transformer
from llama.outputs import FinishReason, TokenEvent, TopTokens
from llama.sampling import INVALID, SamplingParams
from llama.tokenizer import Tokenizer

# In what the first rank announces: the bits below are the draft_len, those above the budget of prompt tokens.
NEWS = 4


class Engine:
    """Runs requests together, each with sampling parameters of its own, a step at a time.

    Under several ranks every rank makes the same calls and gets the same results, or the first rank leads (leader.py).

    >>> engine = llm.engine
    >>> [prompt] = llm.encode_prompts(["The capital of France is"])
    >>> request = engine.add(prompt, SamplingParams(temperature=0, max_gen_len=2))
    >>> while engine.unfinished:
    ...     for event in engine.step():
    ...         print(repr(event.text), event.finish_reason)
    ' Paris' None
    '.' None
    '' length
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        speculate: str | None = None,
        draft: Transformer | None = None,
    ) -> None:
        """Make an engine; seed: of requests whose sampling parameters have none."""
        check_speculation(speculate, draft is not None)
        self.model, self.tokenizer, self.draft, self.seed = model, tokenizer, draft, seed
        self.metrics = Metrics()
        self._device_type = model.device.type
        self.room = Room(model, draft, self.metrics)
        self.scheduler = self.room.scheduler
        self._speculation = Speculation.of(speculate, self.room, self.metrics)
        self._budget = StepBudget()
        self._prompt_tokens = self._budget.tokens  # the first rank's, which all keep to
        self._sequences = SequenceMaker(model.args, tokenizer)
        self.requests = self.scheduler.requests
        self.last_id = -1  # of the newest request
        self._events: list[TokenEvent] = []
        self._in_flight: list[Chunk] = []  # of a step that is launched and not yet waited for
        # Whether the next step is the last one's again, each of its sequences a token further; and these.
        self._is_steady = False
        self._steady: list[Sequence] = []
        self._steady_steps, self._steady_seconds = 0, 0.0  # since the last step that was another one
        self._began = 0.0  # when the step that is waited for began
        self._is_stepping = False
        self._late_cancels: list[int] = []  # those that came within a step
        # Of the step that is taken over: its chunks, with the events of each before it, and how many they were.
        self._begun: list[tuple[Chunk, list[TokenEvent], int]] = []
        self.has_news = False  # whether the first rank tells the others something after the next step: see leader.py
        self.news_follow = False  # whether it does after the last step

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        return len(self.requests)

    def check(self, params: SamplingParams) -> None:
        """Raise ValueError for token ids that the vocabulary lacks, and for a wrong schema, expression or grammar."""
        self._sequences.check(params)

    def add(
        self,
        prompt_tokens: abc.Sequence[int],
        params: SamplingParams | None = None,
        *,
        index: int = 0,
        sample: int = 0,
        add_prefix_space: bool = False,
        interactive: bool = True,
    ) -> int:
        """Have a prompt completed together with the others, and return the id of the request.

        Args:
            prompt_tokens: ids of the vocabulary, at least one.
            params: how tokens are chosen, and how many at most; None is the defaults.
            index: the place in the caller's input, from which its random numbers follow together with the seed.
            sample: the number of this completion among those of the prompt; params.n is the caller's to follow.
            add_prefix_space: whether the new tokens begin a text, as in `Llama.stream`.
            interactive: whether somebody reads along, so that steps stay short while it generates.

        Raises ValueError, on every rank, where ids are wrong, and where it can never have the pages that it needs.
        """
        self.last_id += 1
        params = params or SamplingParams()
        prompt = prompt_ids(prompt_tokens, "the prompt", self.model.args)
        self.check(params)
        return self._wait(prompt, params, (index, sample), add_prefix_space, interactive).id

    def cancel(self, request: int) -> None:
        """End a request without another event; one that has ended already is left as it is."""
        if self._is_stepping or not self.scheduler.is_consistent:  # the garbage collector ends a stream at any time
            self._late_cancels.append(request)
        elif request in self.requests:
            self._leave(self.requests[request])

    def step(self) -> list[TokenEvent]:
        """Compute one step, and return the events of the requests that were added, whose index is their id.

        The last event of a request has a finish_reason: "error" where logits are NaN or infinite, and its text is why.
        """
        self._step_or_recover()
        if not self._events:
            return []
        events = self._events.copy()
        self._events.clear()
        return events

    def run(
        self,
        prompts: abc.Iterable[abc.Sequence[int]],
        params: SamplingParams,
        first: int = 0,
        add_prefix_space: bool = False,
        interactive: bool = True,
    ) -> abc.Generator[TokenEvent]:
        """Complete prompts, whose ids are right, and yield their events, with params.echo those of their prompts first.

        An event's index is that of its prompt or, where each has several completions, those of the first prompt come
        first, then the next one's. `first` is added to the prompt's for the random numbers. Raise ValueError where
        logits are NaN or infinite.
        """
        waiting = enumerate(itertools.product(enumerate(prompts, first), range(params.samples)))
        events: list[TokenEvent] = []
        mine: dict[int, int] = {}  # ids of unfinished requests, by index
        max_waiting = self.model.args.max_batch_size
        try:
            while True:
                room = max_waiting - len(self.scheduler.waiting)
                for index, ((place, prompt), sample) in itertools.islice(waiting, max(int(not mine), room)):
                    self.last_id += 1
                    sequence = self._wait(prompt, params, (place, sample), add_prefix_space, interactive)
                    sequence.index, sequence.events = index, events
                    mine[index] = sequence.id
                if not mine:
                    return
                if not events:  # a step for others may have had some for these
                    self._step_or_recover()
                ready, events[:] = events.copy(), ()
                for event in ready:
                    if event.finish_reason is not None:
                        del mine[event.index]
                        if event.finish_reason == "error":
                            raise ValueError(f"prompt {event.index // params.samples}: {event.text}")
                yield from ready
        finally:
            for request in mine.values():
                self.cancel(request)

    def _wait(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        place: tuple[int, int],
        add_prefix_space: bool,
        interactive: bool,
    ) -> Sequence:
        """Have a prompt of right ids wait for its turn, as the newest request; place: index and sample, as in `add`."""
        seeds = (self.seed if params.seed is None else params.seed, *place)
        sequence = self._sequences.make(
            self.last_id, prompt, params, seeds, self._events, add_prefix_space, interactive
        )
        self.room.check(sequence, len(self.requests), self._speculation is not None)
        self._is_steady = False
        self.scheduler.add(sequence)
        return sequence

    def _step_or_recover(self) -> None:
        """Compute one step, and give its events to its sequences; after an interrupt the next one computes it."""
        self._is_stepping = True
        try:
            if not self.scheduler.is_consistent:  # an interrupt came outside of a step, or while it was recovered from
                self._recover()
            with torch.inference_mode(), torch.autocast(self._device_type, enabled=False):
                self._step()
        except BaseException:
            self._recover()
            raise
        finally:
            self._is_stepping = False
            while self._late_cancels:
                self.cancel(self._late_cancels.pop())

    def _step(self) -> None:
        """Launch a step, unless one is in flight, and one ahead if that pays; then wait for the older one."""
        chunks = self._in_flight or self._continue() or self._launch()
        if not chunks:
            return
        runner = self.room.runners[0]
        self._in_flight = self._launch_ahead(chunks) if runner.runs_ahead else []
        output = runner.wait()
        self.scheduler.is_consistent = False
        for chunk in chunks:
            if not chunk.sequence.finished:
                self._begun.append((chunk, chunk.sequence.events, len(chunk.sequence.events)))
        if output.announced is not None:
            self.news_follow = bool(output.announced >> NEWS & 1)
            self._prompt_tokens = output.announced >> NEWS + 1
        if not self._is_steady:
            self._settle(chunks, output)
        self._count(chunks)
        if self._speculation is not None:
            output = self._speculation.accept(chunks, output)
        for i, chunk in enumerate(chunks):
            if not chunk.sequence.finished:
                self._advance(chunk, output, i)
        self._begun = []
        self.scheduler.is_consistent = True

    def _continue(self) -> list[Chunk]:
        """Launch the last step again, each sequence a token further, if nothing has changed; return its chunks."""
        if not self._is_steady:
            return []
        for sequence in self._steady:
            if len(sequence.tokens) > len(sequence.pages) * PAGE_SIZE:  # it needs a page
                return []
        self._began = time.perf_counter()
        chunks = [Chunk(sequence, sequence.n_cached, sequence.tokens[-1:], 1) for sequence in self._steady]
        self.room.runners[0].launch_next(chunks, self._announced())
        return chunks

    def _launch(self) -> list[Chunk]:
        """Launch the next step of all that runs, and of what waits and has room; return its chunks."""
        if not self.requests:
            return []
        self.scheduler.is_consistent = self._is_steady = False
        self._device_type = self.model.device.type
        self.room.open()
        self._began = time.perf_counter()
        budget = self.room.max_step_tokens
        if any(each.interactive and not each.is_reading for each in self.scheduler.running):
            budget = min(budget, self._prompt_tokens)
        chunks = self.scheduler.schedule(budget)
        self.scheduler.is_consistent = True
        if not chunks:
            return []
        if self._speculation is not None and not any(chunk.is_of_prompt for chunk in chunks):
            chunks = self._speculation.with_drafts(chunks, self.scheduler)
        self.room.runners[0].launch(chunks, self._announced())
        return chunks

    def _launch_ahead(self, chunks: abc.Sequence[Chunk]) -> list[Chunk]:
        """Launch the step after these chunks, where every sequence is sure to need it and nothing else can run."""
        if self._speculation is not None or self.scheduler.can_admit:
            return []
        if any(chunk.is_of_prompt or chunk.sequence.finished or chunk.sequence.controls for chunk in chunks):
            return []
        # The newest token of each is not known yet, and the one after it is about to be computed.
        lengths = [chunk.stop + 1 for chunk in chunks]
        for chunk, length in zip(chunks, lengths, strict=True):
            if length >= chunk.sequence.max_len or not self.scheduler.try_grow(chunk.sequence, length):
                return []
        ahead = [Chunk(chunk.sequence, chunk.stop, [0], 1) for chunk in chunks]
        self.room.runners[0].launch_next(ahead, self._announced())
        return ahead

    def _settle(self, chunks: abc.Sequence[Chunk], output: StepOutput) -> None:
        """Take over what a step has written, and how many draft tokens the first rank wants in the next one."""
        self.scheduler.pool.written()
        if output.announced is not None and self._speculation is not None:
            self._speculation.draft_len = output.announced & (1 << NEWS) - 1
        self._is_steady = not (
            self._speculation is not None
            or self.scheduler.can_admit
            or any(chunk.is_of_prompt or chunk.sequence.finished for chunk in chunks)
        )
        self._steady = [chunk.sequence for chunk in chunks]

    def _announced(self) -> int:
        """Return what the first rank tells the others with the tokens of a step."""
        draft_len = self._speculation.next_draft_len() if self._speculation is not None else 0
        return draft_len | self.has_news << NEWS | self._budget.tokens << NEWS + 1

    def _advance(self, chunk: Chunk, output: StepOutput, number: int) -> None:
        """Add what a step has sampled for a sequence, its chunk with this number, and end it where it ends."""
        sequence, tokens = chunk.sequence, output.tokens[number]
        sequence.n_cached = chunk.start + len(chunk.tokens) - chunk.n_drafts + max(0, len(tokens) - 1)
        if sequence.in_prompt:
            if sequence.n_cached < len(sequence.prompt):
                return
            sequence.in_prompt = False
            self._echo(sequence)
        reason: FinishReason | None = None
        for i, token in enumerate(tokens):
            if token == INVALID:
                self._end(sequence, "error", sequence.no_next_token())
                return
            if token in sequence.stop_tokens:
                reason = "stop"
                break
            sequence.tokens.append(token)
            text, is_end = sequence.text.push(token)
            params = sequence.params
            top: TopTokens = ()
            score = output.logprobs[number][i] if output.logprobs and params.needs_logprobs else None
            if output.top_logprobs and params.top_logprobs:
                top = output.top_logprobs[number][i][: params.top_logprobs]
            sequence.events.append(TokenEvent(sequence.index, token, text, score, None, top))
            if is_end:
                self._end(sequence, "stop", "")
                return
        if reason is None and len(sequence.tokens) >= sequence.max_len:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason, sequence.text.end())

    def _echo(self, sequence: Sequence) -> None:
        """Add the events of a prompt, if they are asked for."""
        if sequence.params.echo:
            for i, token in enumerate(sequence.prompt):
                score = sequence.scores[i] if sequence.is_scored else None
                sequence.events.append(TokenEvent(sequence.index, token, sequence.text.echo(token), score))

    def _end(self, sequence: Sequence, reason: FinishReason, text: str) -> None:
        self._leave(sequence)
        sequence.events.append(TokenEvent(sequence.index, None, text, finish_reason=reason))

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._is_steady = False
        if not self.requests:
            self.room.rest()

    def _count(self, chunks: abc.Sequence[Chunk]) -> None:
        """Add the step that was waited for to the metrics, and to what the budget knows."""
        now, metrics = time.perf_counter(), self.metrics
        seconds, self._began = now - self._began, now
        if self._is_steady:
            metrics.decode_seconds += seconds
            metrics.decode_steps += 1
            metrics.decoded_tokens += len(chunks)
            self._steady_steps += 1
            self._steady_seconds += seconds
            return
        if self._steady_steps:
            self._budget.record(self._steady_seconds / self._steady_steps, 0)
            self._steady_steps, self._steady_seconds = 0, 0.0
        n_prompt_tokens = sum(len(chunk.tokens) for chunk in chunks if chunk.is_of_prompt)
        # A step that was launched ahead still has the rows of sequences that have ended.
        n_decoded = sum(not chunk.is_of_prompt and not chunk.sequence.finished for chunk in chunks)
        metrics.add_step(seconds, n_prompt_tokens, n_decoded)
        if n_decoded:
            self._budget.record(seconds, n_prompt_tokens)

    def _recover(self) -> None:
        """After an error or an interrupt in a step: have what it was about computed again by the next one."""
        self._in_flight, self._is_steady = [], False
        self._take_back()
        self.room.reset()

    def _take_back(self) -> None:
        """Remove what an interrupted step has added to texts, so that they have it once when it is computed again."""
        for chunk, events, n_events in self._begun:
            del events[n_events:]
            chunk.sequence.take_back(chunk.stop if chunk.n_sampled else len(chunk.sequence.tokens))
            self.requests[chunk.sequence.id] = chunk.sequence
        self._begun = []
