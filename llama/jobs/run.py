"""One replica's part of a job: lines become requests of its engine, as many as it can run, and results are written.

Knows nothing of files or of other replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.chat.tools import Tools, check_echo
from llama.engine.prompts import prompt_ids
from llama.errors import one_line
from llama.generation import Llama
from llama.jobs.finished import Digest
from llama.jobs.line_forms import LineForm, LineRequest, LineResult, PlainForm
from llama.jobs.lines import BUNDLE_LINES, InputLine
from llama.jobs.openai_form import line_form
from llama.jobs.result_file import result_line
from llama.outputs import AnswerPrediction, TokenEvent, fold_answer, likeliest
from llama.sampling import SamplingParams

# In the order of the input a result waits for those before it: no more lines are begun when so many wait.
MOST_HELD = 10_000


class JobEngine(Protocol):
    """What a job asks of an engine: of `Engine`, or of what leads it on several ranks."""

    @property
    def unfinished(self) -> int: ...

    def add(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        *,
        index: int,
        sample: int,
        add_prefix_space: bool,
        interactive: bool,
    ) -> int: ...

    def cancel(self, request: int) -> None: ...

    def step(self) -> list[TokenEvent]: ...


@dataclass(frozen=True)
class JobOptions:
    """How lines are completed.

    Args:
        params: sampling parameters of lines that say nothing else.
        digest: what tells lines apart.
        model_name: what answers call the model, where their lines do not.
        ordered: whether results come in the order of the lines.
        strict: whether a line that cannot be completed is an error of the job.
        tools: what the model may call where a line with messages has no tools of its own.
    """

    params: SamplingParams
    digest: Digest
    model_name: str
    ordered: bool = False
    strict: bool = False
    tools: Tools | None = None


@dataclass
class _Running:
    """A line whose completions are under way."""

    line: InputLine
    form: LineForm
    prompt: list[int]
    request: LineRequest
    events: list[list[TokenEvent]] = field(default_factory=list)  # of each completion
    n_unfinished: int = 0


class LineRunner:
    """Completes lines, and hands out each result when it, or with `ordered` also those before it, are complete.

    Args:
        llm: the model.
        engine: its engine, or what leads it on several ranks.
        options: how.
        write: takes a line's number, and its line of results.
        done: is told of each result: how many new tokens it has, and whether it is an error.
    """

    def __init__(
        self,
        llm: Llama,
        engine: JobEngine,
        options: JobOptions,
        write: Callable[[int, bytes], None],
        done: Callable[[int, bool], None],
    ) -> None:
        self._llm, self._engine, self._options, self._write, self._done = llm, engine, options, write, done
        self._running: dict[int, tuple[_Running, int]] = {}  # by the id of the request, with the completion's number
        self._begun: deque[int] = deque()  # numbers of lines in order, from the first that is not written
        self._held: dict[int, bytes] = {}  # results that wait for those before them

    def run(self, next_line: Callable[[bool], InputLine | None], is_json: Callable[[], bool]) -> None:
        """Complete all lines.

        next_line: see `read_ahead`; is_json: whether lines are JSON, asked when there is one. ValueError for a line
        that cannot be completed, with `strict`.
        """
        # So many more than run that a place is taken at once, and so few that other replicas have theirs.
        most = self._llm.model.args.max_batch_size + BUNDLE_LINES
        ended = False
        while not ended or self._engine.unfinished:
            while not ended and self._engine.unfinished < most and len(self._begun) < MOST_HELD:
                try:
                    line = next_line(not self._engine.unfinished)
                except EOFError:
                    ended = True
                    break
                if line is None:
                    break
                self._begin(line, is_json())
            if self._engine.unfinished:
                for event in self._engine.step():
                    self._add(event)

    def _begin(self, line: InputLine, is_json: bool) -> None:
        if self._options.ordered:
            self._begun.append(line.number)
        form: LineForm = PlainForm({})
        begun: list[int] = []  # its requests
        try:
            form = line_form(line.content, is_json, line.number, self._options.model_name)
            request = form.request(self._options.params)
            if request.messages is not None and request.tools is None:
                request = replace(request, tools=self._options.tools)
            check_echo(request.params, request.tools)
            if request.messages is not None and self._llm.chat_format.is_unsafe(request.messages):
                refusal = AnswerPrediction(generation=UNSAFE_ERROR, tokens=[], finish_reason="stop")
                if request.params.logprobs:
                    refusal["logprobs"] = []
                self._finish(line, form.result(LineResult([refusal] * request.params.n, 0, 0)), 0)
                return
            prompt = self._prompt_tokens(request)
            running = _Running(line, form, prompt, request)
            # A text of its own, as in Llama.text_completion.
            is_text = request.tokens is None and not request.continue_final_message
            for sample in range(request.params.samples):
                request_id = self._engine.add(
                    prompt,
                    request.params,
                    index=line.number,
                    sample=sample,
                    add_prefix_space=is_text,
                    interactive=False,
                )
                begun.append(request_id)
                self._running[request_id] = running, sample
                running.events.append([])
                running.n_unfinished += 1
        except ValueError as error:
            for request_id in begun:
                self._engine.cancel(request_id)
                del self._running[request_id]
            self._fail(line, form, error)

    def _prompt_tokens(self, request: LineRequest) -> list[int]:
        """Return the tokens of a request; ValueError where there are none, or more than fit.

        Only the rank that leads comes here, so a dialog is encoded without asking the others.
        """
        if request.messages is not None:
            tokens = self._llm.chat_format.encode(request.messages, request.tools, request.continue_final_message)
        elif request.prompt is not None:
            [tokens] = self._llm.encode_prompts([request.prompt])
        else:
            tokens = request.tokens or []
        return prompt_ids(tokens, "the prompt", self._llm.model.args)

    def _add(self, event: TokenEvent) -> None:
        running, sample = self._running[event.index]
        running.events[sample].append(event)
        if event.finish_reason is None:
            return
        del self._running[event.index]
        running.n_unfinished -= 1
        if running.n_unfinished:
            return
        wrong = next((each[-1].text for each in running.events if each[-1].finish_reason == "error"), None)
        if wrong is not None:
            self._fail(running.line, running.form, ValueError(wrong))
            return
        params, n_prompt = running.request.params, len(running.prompt)
        n_echoed = n_prompt if params.echo else 0
        n_new = sum(len(each) - 1 - n_echoed for each in running.events)
        kept = running.events if params.best_of is None else likeliest(running.events, params.n, n_echoed)
        predictions = [self._prediction(running, each) for each in kept]
        self._finish(running.line, running.form.result(LineResult(predictions, n_prompt, n_new)), n_new)

    def _prediction(self, running: _Running, events: list[TokenEvent]) -> AnswerPrediction:
        request, stream = running.request, None
        if request.messages is not None and not request.params.echo:
            stream = self._llm.chat_format.call_stream(request.tools, running.prompt)
        return fold_answer(events, self._llm.tokenizer, request.params.logprobs, stream)

    def _fail(self, line: InputLine, form: LineForm, error: ValueError) -> None:
        message = one_line(str(error))
        if self._options.strict:
            raise ValueError(f"line {line.number + 1} of the input (index {line.number}): {message}")
        self._finish(line, form.error(message), 0, is_error=True)

    def _finish(self, line: InputLine, result: dict[str, object], n_new: int, is_error: bool = False) -> None:
        written = result_line(line.number, self._options.digest(line.content), result)
        if self._options.ordered:
            self._held[line.number] = written
            while self._begun and self._begun[0] in self._held:
                number = self._begun.popleft()
                self._write(number, self._held.pop(number))
        else:
            self._write(line.number, written)
        self._done(n_new, is_error)
