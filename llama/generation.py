"""Llama: weights, tokenizer and one stream of token events; `generate` and the completions only fold over it.

Knows nothing of file formats, of process groups or of terminals.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from llama.chat.formats import UNSAFE_ERROR, ChatFormat, Dialog, Message, Role, check_messages, choose_chat_format
from llama.chat.infilling import infilling_tokens
from llama.engine.build import build_draft, build_model
from llama.engine.metrics import Metrics
from llama.engine.options import BuildOptions
from llama.engine.prompts import check_prompts, encode_texts
from llama.engine.runner_pool import RunnerPool
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import make_sequences
from llama.model import Transformer
from llama.outputs import ChatPrediction, CompletionPrediction, InfillingPrediction, TokenEvent, fold_events
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role", "TokenEvent"]


class Llama:
    """A model that completes text. Under several ranks, every rank makes the same calls and gets the same results."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        chat_format: str | None = None,
        speculate: str | None = None,
        draft: Transformer | None = None,
    ) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.chat_format: ChatFormat = choose_chat_format(tokenizer, chat_format)
        self.scheduler = Scheduler(RunnerPool(model, draft), tokenizer, speculate)
        self._sequences_seeded = 0

    @property
    def draft(self) -> Transformer | None:
        """The draft model of speculative decoding."""
        return self.scheduler.pool.draft

    @property
    def metrics(self) -> Metrics:
        """What the calls so far have cost."""
        return self.scheduler.metrics

    @staticmethod
    def build(
        ckpt_dir: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 32,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        chat_format: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
        speculate: str | None = None,
        draft_ckpt_dir: str | os.PathLike[str] | None = None,
        draft_quantize: str | None = None,
    ) -> Llama:
        """Load a checkpoint (Meta or Hugging Face folder, GGUF file) on this process, or split over torchrun's ranks.

        Left out: the tokenizer is looked for beside or inside the weights, model_parallel_size is the world size,
        device is CUDA, MPS or CPU, the first there is, and dtype is what the device computes well. quantize int8, int4
        or, on a GPU, fp8 holds weights in so many bits; compile lets torch compile the decode step; speculate "lookup"
        guesses tokens from those before, draft_ckpt_dir with a smaller model, or with the same and draft_quantize:
        texts stay the same. Whatever is wrong with the files or the choices raises ValueError or FileNotFoundError,
        on every rank if on one.
        """
        return Llama.from_options(
            BuildOptions(
                ckpt_dir,
                tokenizer_path,
                max_seq_len,
                max_batch_size,
                model_parallel_size,
                seed,
                device=device,
                dtype=dtype,
                chat_format=chat_format,
                quantize=quantize,
                compile=compile,
                speculate=speculate,
                draft_ckpt_dir=draft_ckpt_dir,
                draft_quantize=draft_quantize,
            )
        )

    @staticmethod
    def from_options(options: BuildOptions) -> Llama:
        """Load a checkpoint as `build` does, from choices that travel together."""
        model, tokenizer = build_model(options)
        draft = build_draft(options, model, tokenizer) if options.draft_ckpt_dir is not None else None
        return Llama(
            model,
            tokenizer,
            seed=options.seed,
            chat_format=options.chat_format,
            speculate=options.speculate,
            draft=draft,
        )

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
        at_start: bool = False,
        keep: bool = False,
    ) -> Iterator[TokenEvent]:
        """Complete prompts of any lengths, at most max_batch_size at a time, step by step as tokens come.

        With echo the prompt's tokens come first. A log-probability is that of a token under the raw logits; a
        prompt's first token has none, and 0.0 stands for it. at_start drops the space with which SentencePiece begins
        a text, as for an answer in a chat; otherwise the pieces continue the prompt. keep is for a chat's one prompt:
        its cache stays, and the next stream to be kept computes only what its prompt does not begin with alike.

        The arguments are checked before this returns: ValueError. NaN logits raise ValueError while iterating.
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, echo)
        return self._stream(prompt_tokens, params, at_start, keep)

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """New tokens of each prompt, without the end token, and their log-probabilities when asked for."""
        tokens: list[list[int]] = [[] for _ in prompt_tokens]
        scores: list[list[float]] = [[] for _ in prompt_tokens]
        for event in self.stream(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, seed=seed):
            if event.token is not None:
                tokens[event.index].append(event.token)
                scores[event.index].append(event.logprob or 0.0)
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
    ) -> list[CompletionPrediction]:
        """Continue each text. A generation keeps its leading space; `tokens` are the texts of single tokens."""
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs, echo)
        return self._complete(self.encode_prompts(prompts), params, at_start=echo)

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answer each dialog. One that spells out Llama 2's tags is answered with Meta's error text, unasked."""
        params = SamplingParams(temperature, top_p, max_gen_len, seed, logprobs)
        for dialog in dialogs:
            check_messages(dialog)
        safe = [dialog for dialog in dialogs if not self.chat_format.is_unsafe(dialog)]
        answers: Iterator[CompletionPrediction] = iter(())
        if safe or not dialogs:
            answers = iter(self._complete(self.encode_dialogs(safe), params, at_start=True))
        refusal = CompletionPrediction(generation=UNSAFE_ERROR, tokens=[], finish_reason="stop")
        if logprobs:
            refusal["logprobs"] = []
        replies = []
        for dialog in dialogs:
            answer = refusal if self.chat_format.is_unsafe(dialog) else next(answers)
            message = Message(role="assistant", content=answer["generation"])
            replies.append(ChatPrediction(**{**answer, "generation": message}))
        return replies

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
    ) -> list[InfillingPrediction]:
        """Fill the gap between each prefix and its suffix; `full_text` is all three together (Code Llama)."""
        if len(prefixes) != len(suffixes):
            raise ValueError(f"every prefix needs a suffix, got {len(prefixes)} and {len(suffixes)}")
        pairs = list(zip(prefixes, suffixes, strict=True))
        prompts = [infilling_tokens(self.tokenizer, prefix, suffix, suffix_first) for prefix, suffix in pairs]
        filled = self._complete(prompts, SamplingParams(temperature, top_p, max_gen_len, seed, logprobs))
        return [
            InfillingPrediction(**fill, full_text=prefix + fill["generation"] + suffix)
            for fill, (prefix, suffix) in zip(filled, pairs, strict=True)
        ]

    def encode_dialogs(self, dialogs: Sequence[Dialog]) -> list[list[int]]:
        """Token ids up to where each dialog's answer begins; ValueError when a dialog does not fit the format.

        The first of the ranks that share the model encodes for all: a template may look at the clock.
        """
        encoded: list[list[int]] | ValueError = []
        if self.model.parallel.rank == 0:
            try:
                encoded = [self.chat_format.encode(dialog) for dialog in dialogs]
            except ValueError as error:
                encoded = error
        encoded = self.model.parallel.share(encoded)
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts to continue; an empty text is the begin token, as nothing cannot be continued."""
        return encode_texts(self.tokenizer, prompts)

    def _complete(
        self, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams, at_start: bool = False
    ) -> list[CompletionPrediction]:
        events = self._stream(prompt_tokens, params, at_start)
        return fold_events(events, len(prompt_tokens), self.tokenizer, params.logprobs)

    def _stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        params: SamplingParams,
        at_start: bool = False,
        keep: bool = False,
    ) -> Iterator[TokenEvent]:
        """See `stream`. The scheduler's own events are returned, so that no token passes through here."""
        check_prompts(prompt_tokens, self.model.args, params.max_gen_len)
        if keep and len(prompt_tokens) > 1:
            raise ValueError(f"keep is for one prompt at a time, got {len(prompt_tokens)}")
        seed, first = params.seed, 0
        if seed is None:
            seed, first = self.seed, self._sequences_seeded
            self._sequences_seeded += len(prompt_tokens)
        max_seq_len = self.model.args.max_seq_len
        sequences = make_sequences(prompt_tokens, params, max_seq_len, seed, first, self.tokenizer, at_start)
        return self.scheduler.run(sequences, params, keep)
