"""Llama: weights, tokenizer and one streaming loop; `generate` and the completions only fold over it.

Knows nothing of file formats, of process groups or of terminals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.build import build_model, check_room
from llama.cache import KVCache
from llama.chat import UNSAFE_ERROR, ChatFormat, Dialog, Message, Role, check_messages, choose_chat_format
from llama.footprint import SCORED_AT_ONCE, Job
from llama.infilling import infilling_tokens
from llama.model import Transformer
from llama.predictions import ChatPrediction, CompletionPrediction, FinishReason, InfillingPrediction
from llama.sampling import INVALID, SamplingParams, log_probs, sample, uniforms
from llama.statistics import Statistics
from llama.tokenizer import StreamDecoder, Tokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message", "Role", "Step"]


@dataclass(frozen=True)
class Step:
    """One token of one row, or its end: the last step of a row has no token, and says why it is the last."""

    row: int  # the prompt's place in the input
    token: int | None
    text: str  # what the token adds; a character comes when it is complete, a control token adds nothing
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@dataclass
class _Row:
    """A prompt and what has been generated for it so far."""

    place: int
    prompt: Sequence[int]
    limit: int  # most tokens to generate
    uniforms: Tensor  # (limit,), one random number a token
    decoder: StreamDecoder
    newest: int = -1
    generated: int = 0

    @property
    def length(self) -> int:
        """Tokens in all. The newest is not in the cache yet: the model reads it to say what follows."""
        return len(self.prompt) + self.generated


class Llama:
    """A model that completes text. Under several ranks, every rank makes the same calls and gets the same results."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, chat_format: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.seed = seed
        self.chat_format: ChatFormat = choose_chat_format(tokenizer, chat_format)
        self.statistics = Statistics()
        # Control tokens, and the rows of an embedding that only pad it: they add nothing to a text.
        self._silent_tokens = frozenset(tokenizer.special_tokens.values()).union(
            range(tokenizer.n_words, model.args.vocab_size)
        )
        self._rows_seeded = 0

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
    ) -> Llama:
        """Load a checkpoint (Meta or Hugging Face folder, GGUF file) on this process, or split over torchrun's ranks.

        Left out: the tokenizer is looked for beside or inside the weights, model_parallel_size is the world size,
        device is CUDA, MPS or CPU, the first there is, and dtype is what the device computes well. Whatever is wrong
        with the files or the choices raises ValueError or FileNotFoundError, on every rank if on one.
        """
        model, tokenizer = build_model(
            ckpt_dir,
            tokenizer_path,
            max_seq_len,
            max_batch_size,
            model_parallel_size,
            device=device,
            dtype=dtype,
            chat_format=chat_format,
            quantize=quantize,
        )
        return Llama(model, tokenizer, seed=seed, chat_format=chat_format)

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
    ) -> Iterator[Step]:
        """Complete prompts of any lengths, at most max_batch_size at a time, step by step as tokens come.

        With echo the prompt's tokens come first. A log-probability is that of a token under the raw logits; a
        prompt's first token has none, and 0.0 stands for it. at_start drops the space with which SentencePiece begins
        a text, as for an answer in a chat; otherwise the pieces continue the prompt.

        The arguments are checked before this returns: ValueError. NaN logits raise ValueError while iterating.
        """
        params = SamplingParams(temperature, top_p, max_gen_len, seed)
        self._check_prompts(prompt_tokens, params)
        first = 0
        if params.seed is None:
            first = self._rows_seeded
            self._rows_seeded += len(prompt_tokens)
        return self._stream(prompt_tokens, params, first, logprobs, echo, at_start)

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
        for step in self.stream(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, seed=seed):
            if step.token is not None:
                tokens[step.row].append(step.token)
                scores[step.row].append(step.logprob or 0.0)
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
        steps = self.stream(
            self.encode_prompts(prompts), max_gen_len, temperature, top_p, logprobs, echo, seed=seed, at_start=echo
        )
        return [self._prediction(steps, logprobs) for steps in _by_row(steps, len(prompts))]

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
        SamplingParams(temperature, top_p, max_gen_len, seed)  # checks them, also where every dialog is unsafe
        for dialog in dialogs:
            check_messages(dialog)
        safe = [dialog for dialog in dialogs if not self.chat_format.is_unsafe(dialog)]
        answers: Iterator[CompletionPrediction] = iter(())
        if safe or not dialogs:
            steps = self.stream(
                self.encode_dialogs(safe), max_gen_len, temperature, top_p, logprobs, seed=seed, at_start=True
            )
            answers = iter([self._prediction(steps, logprobs) for steps in _by_row(steps, len(safe))])
        refusal = CompletionPrediction(generation=UNSAFE_ERROR, tokens=[], finish_reason="stop")
        if logprobs:
            refusal["logprobs"] = []
        predictions = []
        for dialog in dialogs:
            answer = refusal if self.chat_format.is_unsafe(dialog) else next(answers)
            message = Message(role="assistant", content=answer["generation"])
            predictions.append(ChatPrediction(**{**answer, "generation": message}))
        return predictions

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
        steps = self.stream(prompts, max_gen_len, temperature, top_p, logprobs, seed=seed)
        filled = [self._prediction(steps, logprobs) for steps in _by_row(steps, len(prompts))]
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
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, got a single text: put it in a list")
        for place, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {place} must be a text, got {prompt!r}")
        tokenizer = self.tokenizer
        return [
            tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False) or tokenizer.encode("", bos=True, eos=False)
            for prompt in prompts
        ]

    def _check_prompts(self, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams) -> None:
        args = self.model.args
        if not prompt_tokens:
            raise ValueError("the list of prompts is empty: give at least one")
        for place, prompt in enumerate(prompt_tokens):
            if isinstance(prompt, str | int):
                raise ValueError(f"prompt {place} must be a list of token ids, got {prompt!r}")
            if not prompt:
                raise ValueError(f"prompt {place} has no tokens: begin it with the tokenizer's bos_id")
            for token in prompt:
                if type(token) is not int or not 0 <= token < args.vocab_size:
                    raise ValueError(f"prompt {place} has token {token!r}: ids are 0 to {args.vocab_size - 1}")
            room = args.max_seq_len - (params.max_gen_len != 0)
            if len(prompt) > room:
                raise ValueError(
                    f"prompt {place} has {len(prompt)} tokens, max_seq_len is {args.max_seq_len}: raise it or shorten "
                    "the prompt"
                )

    def _stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        params: SamplingParams,
        first: int,
        logprobs: bool,
        echo: bool,
        at_start: bool,
    ) -> Iterator[Step]:
        args = self.model.args
        seed = self.seed if params.seed is None else params.seed
        places = range(len(prompt_tokens))
        for i in range(0, len(places), args.max_batch_size):
            rows = []
            for place in places[i : i + args.max_batch_size]:
                limit = args.max_seq_len - len(prompt_tokens[place])
                if params.max_gen_len is not None:
                    limit = min(limit, params.max_gen_len)
                decoder = StreamDecoder(self.tokenizer, at_start)
                rows.append(_Row(place, prompt_tokens[place], limit, uniforms(seed, first + place, limit), decoder))
            yield from self._run(rows, params, logprobs, echo)

    @torch.inference_mode()
    def _run(self, rows: list[_Row], params: SamplingParams, logprobs: bool, echo: bool) -> Iterator[Step]:
        """Complete one batch: the prompts at once, then one token of every running row at a time.

        The running rows are the first rows of the cache, in order; the last takes the place of one that ends.
        """
        start = time.perf_counter()
        length = max(len(row.prompt) + row.limit for row in rows)
        check_room(self.model, Job(len(rows), max(len(row.prompt) for row in rows), length, echo and logprobs))
        cache = self.model.new_cache(len(rows), length)
        hidden = self._prefill(rows, cache)  # (bsz, seqlen, dim)
        prompt_scores = [self._score(row, hidden[i]) for i, row in enumerate(rows)] if echo and logprobs else []
        ends = torch.tensor([len(row.prompt) - 1 for row in rows], device=hidden.device)
        last = hidden[torch.arange(len(rows), device=hidden.device), ends]  # (bsz, dim)
        del hidden  # gigabytes for a large batch of long prompts
        running = rows if params.max_gen_len != 0 else []
        tokens, scores = self._choose(running, last, params, logprobs) if running else ([], [])
        self.statistics.prefill_seconds += time.perf_counter() - start
        self.statistics.prompt_tokens += sum(len(row.prompt) for row in rows)

        if echo:
            for i, row in enumerate(rows):
                row_scores = prompt_scores[i] if prompt_scores else [None] * len(row.prompt)
                for token, score in zip(row.prompt, row_scores, strict=True):
                    yield self._say(row, token, score)
        if not running:
            for row in rows:
                yield Step(row.place, None, row.decoder.flush(), finish_reason="length")
        while running:
            ended = []
            for i, (row, token, score) in enumerate(zip(running, tokens, scores, strict=True)):
                reason: FinishReason | None = "stop" if token in self.tokenizer.stop_tokens else None
                if reason is None:
                    row.newest = token
                    row.generated += 1
                    yield self._say(row, token, score)
                    reason = "length" if row.generated == row.limit else None
                if reason is not None:
                    yield Step(row.place, None, row.decoder.flush(), finish_reason=reason)
                    ended.append(i)
            for i in reversed(ended):
                moved = running.pop()
                if i < len(running):
                    cache.move_row(len(running), i, moved.length - 1)
                    running[i] = moved
            if not running:
                return
            start = time.perf_counter()
            tokens, scores = self._choose(running, self._decode(running, cache), params, logprobs)
            self.statistics.decode_seconds += time.perf_counter() - start
            self.statistics.decode_steps += 1
            self.statistics.decoded_tokens += len(running)

    def _prefill(self, rows: list[_Row], cache: KVCache) -> Tensor:
        """Final states of all prompts, (bsz, seqlen, dim), short ones padded on the right."""
        seqlen = max(len(row.prompt) for row in rows)
        tokens = torch.zeros(len(rows), seqlen, dtype=torch.long)  # any token pads: lengths say what counts
        for i, row in enumerate(rows):
            tokens[i, : len(row.prompt)] = torch.tensor(row.prompt)
        device = self.model.device
        start_pos = torch.zeros(len(rows), dtype=torch.long, device=device)
        lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
        return self.model.hidden(tokens.to(device), start_pos, cache, seqlen, lengths)

    def _decode(self, rows: list[_Row], cache: KVCache) -> Tensor:
        """Final states after the newest token of each row, (bsz, dim)."""
        tokens = torch.tensor([[row.newest] for row in rows], device=self.model.device)
        start_pos = torch.tensor([row.length - 1 for row in rows], device=self.model.device)
        return self.model.hidden(tokens, start_pos, cache, kv_len=max(row.length for row in rows))[:, 0]

    def _choose(
        self, rows: list[_Row], hidden: Tensor, params: SamplingParams, logprobs: bool
    ) -> tuple[list[int], list[float] | list[None]]:
        """The next token of each row from its final state, hidden (bsz, dim), and its log-probability if asked for."""
        logits = self.model.logits(hidden)
        uniform = torch.stack([row.uniforms[row.generated] for row in rows])
        tokens = sample(logits, params.temperature, params.top_p, uniform.to(logits.device))
        tokens = self.model.parallel.broadcast(tokens)  # rounding may differ between ranks, their texts may not
        chosen = tokens.tolist()
        if INVALID in chosen:
            row = rows[chosen.index(INVALID)]
            raise ValueError(
                f"the logits of prompt {row.place} are NaN or infinite after {row.length} tokens: the weights are "
                "damaged, or too large for this dtype (try --dtype float32)"
            )
        return chosen, log_probs(logits, tokens).tolist() if logprobs else [None] * len(rows)

    def _score(self, row: _Row, hidden: Tensor) -> list[float]:
        """Log-probability of each prompt token, given those before it, from hidden (seqlen, dim); 0.0 for the first."""
        scores = [0.0]
        targets = torch.tensor(row.prompt[1:], dtype=torch.long, device=hidden.device)
        for i in range(0, len(targets), SCORED_AT_ONCE):
            chunk = targets[i : i + SCORED_AT_ONCE]
            scores += log_probs(self.model.logits(hidden[i : i + len(chunk)]), chunk).tolist()
        return scores

    def _say(self, row: _Row, token: int, logprob: float | None) -> Step:
        text = "" if token in self._silent_tokens else row.decoder.push(token)
        return Step(row.place, token, text, logprob)

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token]) if token < self.tokenizer.n_words else ""

    def _prediction(self, steps: list[Step], logprobs: bool) -> CompletionPrediction:
        tokens = [step for step in steps if step.token is not None]
        prediction = CompletionPrediction(
            generation="".join(step.text for step in steps),
            tokens=[self._token_text(step.token) for step in tokens if step.token is not None],
        )
        if logprobs:
            prediction["logprobs"] = [step.logprob or 0.0 for step in tokens]
        if steps[-1].finish_reason is not None:
            prediction["finish_reason"] = steps[-1].finish_reason
        return prediction


def _by_row(steps: Iterator[Step], n_rows: int) -> list[list[Step]]:
    rows: list[list[Step]] = [[] for _ in range(n_rows)]
    for step in steps:
        rows[step.row].append(step)
    return rows
