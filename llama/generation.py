"""Llama: weights, tokenizer and one stream of token events; `generate` and the completions only fold over it.

Knows nothing of file formats, of process groups or of terminals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

from llama.chat.dialog import Dialog, Message, Role, check_messages
from llama.chat.formats import DialogFormat, Llama3Chat, choose_chat_format
from llama.chat.infilling import infilling_prompt_tokens
from llama.chat.llama2_tags import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS, UNSAFE_ERROR
from llama.chat.tools import Tools, check_echo
from llama.config import ModelArgs
from llama.distributed.job import mute_later_ranks
from llama.engine.build import build_draft, build_model, with_local_files
from llama.engine.engine import Engine
from llama.engine.metrics import Metrics
from llama.engine.options import BuildOptions
from llama.engine.prompts import as_token_ids, check_texts, encode_dialogs, encode_texts
from llama.model import Transformer
from llama.outputs import (
    AnswerPrediction,
    ChatPrediction,
    CompletionPrediction,
    InfillingPrediction,
    TokenEvent,
    chat_predictions,
    fold_answer,
    fold_events,
    fold_tokens,
    keep_best,
    split_events,
)
from llama.sampling import SamplingParams, sample_top_p
from llama.tokenizer import Tokenizer

# What scripts import from here: those written for Meta's code take all but TokenEvent.
__all__ = [
    "B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR", "ChatPrediction", "CompletionPrediction",
    "Dialog", "InfillingPrediction", "Llama", "Message", "Role", "TokenEvent", "infilling_prompt_tokens",
    "sample_top_p",
]  # fmt: skip


class Llama:
    """A model that completes text. Under several ranks, every rank makes the same calls and gets the same results.

    The examples below run on the demo model, with `llm` made by that of `build`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        chat_format: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        speculate: str | None = None,
        draft: Transformer | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chat_format: DialogFormat = choose_chat_format(tokenizer, chat_format, template_kwargs)
        self.engine = Engine(model, tokenizer, seed=seed, speculate=speculate, draft=draft)
        self._sequences_seeded = 0

    @property
    def seed(self) -> int:
        """What the sampling of all calls without a seed begins with."""
        return self.engine.seed

    @property
    def draft(self) -> Transformer | None:
        """The draft model of speculative decoding."""
        return self.engine.draft

    @property
    def metrics(self) -> Metrics:
        """What the calls so far have cost."""
        return self.engine.metrics

    @property
    def formatter(self) -> Llama3Chat:
        """Llama 3's format under the name that it has in Meta's code; `chat_format` is the one in use."""
        return Llama3Chat(self.tokenizer)

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 32,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        mute: bool = True,
        **options: Any,
    ) -> Llama:
        """Load a checkpoint on this process, or split over torchrun's ranks, of which only each host's first prints on.

        Args:
            ckpt_dir: a Meta or Hugging Face folder, a GGUF file, or a model's name (see docs/guides/checkpoints.md).
            tokenizer_path: the tokenizer's file; None looks for it beside or inside the weights.
            max_seq_len: the most tokens of a prompt and its completion together; None is the model's own context.
            max_batch_size: the most prompts to run at once; more are run in turn.
            model_parallel_size: how many ranks share one copy of the model; None is all.
            seed: what the sampling of all calls begins with.
            mute: whether sys.stdout of a host's other ranks leads nowhere after the build, as after Meta's.
            options: the other fields of `BuildOptions`, such as device, dtype, quantize, speculate and draft_ckpt_dir.

        Raises ValueError for wrong options at once, and ValueError or OSError, on every rank if on one, for whatever is
        wrong with the files.

        >>> llm = Llama.build("models/SmolLM2-135M-Instruct.Q4_1.gguf", max_seq_len=256)
        """
        limits = max_seq_len, max_batch_size, model_parallel_size
        llm = Llama.from_options(BuildOptions(ckpt_dir, tokenizer_path, *limits, seed, **options))
        if mute:
            mute_later_ranks()
        return llm

    @staticmethod
    def from_options(options: BuildOptions, *, check: Callable[[Tokenizer, ModelArgs], None] | None = None) -> Llama:
        """Load a checkpoint as `build` does, from choices that travel together.

        check: called before weights are read; a ValueError of it, as for a prompt that does not fit, is one on every
        rank.

        >>> llm = Llama.from_options(BuildOptions("models/SmolLM2-135M-Instruct.Q4_1.gguf", quantize="int8"))
        """
        options = with_local_files(options)
        model, tokenizer, chat_format = build_model(options, check)
        draft = build_draft(options, model, tokenizer) if options.draft_ckpt_dir is not None else None
        return Llama(
            model,
            tokenizer,
            seed=options.seed,
            chat_format=chat_format,
            template_kwargs=options.template_arguments,
            speculate=options.speculate,
            draft=draft,
        )

    def stream(
        self,
        prompt_tokens: Iterable[Iterable[SupportsIndex]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
        add_prefix_space: bool = False,
        **sampling: Any,
    ) -> Iterator[TokenEvent]:
        """Complete prompts of any lengths, at most max_batch_size at a time, event by event as tokens come.

        Args:
            prompt_tokens: token ids of each prompt, at least one; a list, array or tensor of integers each.
            max_gen_len: the most tokens to generate for a prompt; None is as many as max_seq_len leaves room for.
            temperature: 0 is greedy; higher is more varied.
            top_p: the probability mass of the nucleus that tokens are drawn from, in [0, 1]; 0 is greedy.
            logprobs: whether events have log-probabilities, under the raw logits; a prompt's first token has none.
            echo: whether the tokens of the prompts come first.
            seed: the same seed gives the same tokens; None goes on with the model's own sequence of seeds.
            add_prefix_space: whether the new tokens begin a text, as an answer in a chat does, so that the space which
                SentencePiece puts before a first word is stripped; else they continue the prompt.
            sampling: the other fields of `SamplingParams`, such as top_k, stop and n. With n above 1 the completions
                of a prompt follow each other: the second prompt's first one has the index n.

        Raises ValueError for wrong arguments at once, and while iterating where logits are NaN.

        >>> for event in llm.stream(llm.encode_prompts(["The capital of France is"]), max_gen_len=2, temperature=0):
        ...     print(event.index, event.token, repr(event.text), event.finish_reason)
        0 7042 ' Paris' None
        0 30 '.' None
        0 None '' length
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, echo, **sampling)
        return self.run(as_token_ids(prompt_tokens, self.model.args), params, add_prefix_space)

    def generate(
        self,
        prompt_tokens: Iterable[Iterable[SupportsIndex]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generate the new tokens of each prompt, without the end token, and their log-probabilities when asked for.

        Args: as for `stream`; with echo the prompts' tokens come first, and 0.0 stands for the score of the first.
        stop_token is the one token that ends a generation, in place of the tokenizer's stop_tokens.

        >>> llm.generate(llm.encode_prompts(["The capital of France is"]), max_gen_len=2, temperature=0)
        ([[7042, 30]], None)
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, echo, stop_token, **sampling)
        prompts = as_token_ids(prompt_tokens, self.model.args)
        tokens, scores = fold_tokens(self.run(prompts, params), len(prompts) * params.n)
        return tokens, scores if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> list[CompletionPrediction]:
        """Continue each text; `tokens` are the texts of single tokens.

        Args: texts to continue; the others as for `stream`. A generation is a text of its own, as in Meta's code: it
        begins without the space that SentencePiece puts before a word, which `stream` keeps.

        >>> llm.text_completion(["The capital of France is"], temperature=0, max_gen_len=2)
        [{'generation': ' Paris.', 'tokens': [' Paris', '.'], 'finish_reason': 'length'}]
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, echo, **sampling)
        return self._complete(self.encode_prompts(prompts), params, add_prefix_space=True)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        **sampling: Any,
    ) -> list[ChatPrediction]:
        """Answer each dialog. One that spells out Llama 2's tags is answered with Meta's error text, unasked.

        Args:
            dialogs: each a list of messages with a role and a content, the last the user's.
            tools: what the model may call, by JSON schemas, as transformers takes them. The answers' messages have
                tool_calls where it does, whose arguments are dictionaries, as chat templates take them back.
            continue_final_message: whether answers go on where the last messages, the assistant's, end. They do not
                repeat these.
            temperature, top_p, max_gen_len, logprobs, seed, sampling: as for `stream`.

        >>> [answer] = llm.chat_completion([[{"role": "user", "content": "What is the capital of France?"}]], 0)
        >>> answer["generation"]
        {'role': 'assistant', 'content': 'The capital of France is Paris.'}
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, **sampling)
        check_echo(params, tools)
        for dialog in dialogs:
            check_messages(dialog)
        refused = [self.chat_format.is_unsafe(dialog) for dialog in dialogs]
        safe = [dialog for dialog, is_refused in zip(dialogs, refused, strict=True) if not is_refused]
        answers: list[AnswerPrediction] = []
        if safe or not dialogs:
            encoded = self.encode_dialogs(safe, tools, continue_final_message)
            prompts = as_token_ids(encoded, self.model.args)
            events = self.run(prompts, params, add_prefix_space=not continue_final_message)
            streams = [self.chat_format.call_stream(tools, each) for each in prompts for _ in range(params.n)]
            told = zip(split_events(events, len(streams)), streams, strict=True)
            answers = [fold_answer(each, self.tokenizer, params.logprobs, stream) for each, stream in told]
        return chat_predictions(answers, [each for each in refused for _ in range(params.n)], logprobs)

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        seed: int | None = None,
        **sampling: Any,
    ) -> list[InfillingPrediction]:
        """Fill the gap between each prefix and its suffix; `full_text` is all three together (arXiv:2308.12950).

        Args: texts before and after the gaps, as many; suffix_first: whether the model reads the suffix first; the
        others as for `stream`.

        Raises ValueError where the tokenizer has no tokens for it, as only Code Llama's has.

        >>> llm.text_infilling(["def add(a, b):"], ["return c"])
        Traceback (most recent call last):
        ValueError: infilling needs the tokens ▁<PRE>, ▁<SUF> and ▁<MID>, which this tokenizer lacks
        """
        check_texts("prefixes", prefixes)
        check_texts("suffixes", suffixes)
        if len(prefixes) != len(suffixes):
            raise ValueError(f"every prefix needs a suffix, got {len(prefixes)} and {len(suffixes)}")
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompts = [infilling_prompt_tokens(self.tokenizer, prefix, suffix, suffix_first) for prefix, suffix in pairs]
        filled = self._complete(prompts, SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, **sampling))
        return [
            InfillingPrediction(**fill, full_text=prefix + fill["generation"] + suffix)
            for fill, (prefix, suffix) in zip(filled, pairs, strict=True)
        ]

    def encode_dialogs(
        self, dialogs: Sequence[Dialog], tools: Tools | None = None, continue_final_message: bool = False
    ) -> list[list[int]]:
        """Encode dialogs up to where each answer begins; raise ValueError where one does not fit the format.

        Args: as for `chat_completion`.

        >>> [tokens] = llm.encode_dialogs([[{"role": "user", "content": "Hi"}]])
        >>> llm.tokenizer.decode(tokens[-7:])
        'Hi<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return encode_dialogs(self.chat_format, self.model.parallel, dialogs, tools, continue_final_message)

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Encode texts to continue; an empty text is the begin token, as nothing cannot be continued.

        >>> llm.encode_prompts(["The capital of France is"])
        [[504, 3575, 282, 4649, 314]]
        """
        return encode_texts(self.tokenizer, prompts)

    def _complete(
        self, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams, add_prefix_space: bool = False
    ) -> list[CompletionPrediction]:
        prompts = as_token_ids(prompt_tokens, self.model.args)
        events = self.run(prompts, params, add_prefix_space)
        return fold_events(events, len(prompts) * params.n, self.tokenizer, params.logprobs)

    def run(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, add_prefix_space: bool = False
    ) -> Iterator[TokenEvent]:
        """Complete prompts as `stream` does, from sampling parameters that travel together; the ids are right.

        The engine's own events are returned, so that no token passes through here.
        """
        self.engine.check(params)
        first = 0
        if params.seed is None:
            first = self._sequences_seeded
            self._sequences_seeded += len(prompts)
        events = self.engine.run(prompts, params, first, add_prefix_space, interactive=len(prompts) == 1)
        return events if params.best_of is None else keep_best(events, prompts, params)
