"""Makes the sequence of a request: how long it may be, what ends it, its random numbers, its text and its controls."""

from __future__ import annotations

from collections import abc

from llama.config import ModelArgs
from llama.engine.controls import ControlsMaker
from llama.engine.prompts import check_token_ids
from llama.engine.sequence import Sequence
from llama.outputs import TokenEvent
from llama.sampling import SamplingParams
from llama.tokenizer import CompletionText, Tokenizer


class SequenceMaker:
    """Makes the sequences of one model's requests."""

    def __init__(self, args: ModelArgs, tokenizer: Tokenizer) -> None:
        self._args, self._tokenizer = args, tokenizer
        # Control tokens, and the ids of padding in an embedding, add nothing to a text.
        self._silent_tokens = {*tokenizer.special_tokens.values(), *range(tokenizer.n_words, args.vocab_size)}
        self._controls = ControlsMaker(tokenizer, args.vocab_size)

    def check(self, params: SamplingParams) -> None:
        """Raise ValueError for token ids that the vocabulary lacks, and for a wrong schema, expression or grammar."""
        check_token_ids(params, self._args)
        self._controls.compile(params)

    def make(
        self,
        id: int,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        seeds: tuple[int, int, int],
        events: list[TokenEvent],
        add_prefix_space: bool,
        interactive: bool,
    ) -> Sequence:
        """Return the sequence of a request with this id, whose prompt is right; the others as in `Sequence`.

        add_prefix_space: whether the new tokens begin a text.
        """
        limit, ends = self._args.max_seq_len - len(prompt), self._stop_tokens(params)
        return Sequence(
            id,
            prompt,
            params,
            limit if params.max_gen_len is None else min(limit, params.max_gen_len),
            ends,
            seeds,
            CompletionText(self._tokenizer.stream_decoder(add_prefix_space), self._silent_tokens, params.stop),
            events,
            interactive,
            self._controls.make(prompt, params, ends),
        )

    def _stop_tokens(self, params: SamplingParams) -> frozenset[int]:
        """Return the tokens that end a completion: a stop string that is a control token is one of them."""
        ends = {*params.stop_token_ids, *self._tokenizer.control_tokens(params.stop)}
        if params.stop_token is not None and not params.is_constrained:
            return frozenset({params.stop_token, *ends})
        return self._tokenizer.stop_tokens | ends if ends else self._tokenizer.stop_tokens
