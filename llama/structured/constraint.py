"""Which tokens may come next in a completion of a schema, an expression or a grammar, as masks of the vocabulary.

Knows no model: logits are an argument. Everything here runs on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama.sampling import SamplingParams
from llama.structured.definitions import definition, explained
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

BITS = 32  # of a mask's integers
MAX_KEPT = 64  # compiled constraints of which copies are made


class ConstraintCompiler:
    """Makes constraints for one tokenizer, which it shows to llguidance once: 0.2 s and 20 MB for 49,152 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the rows of logits; those beyond the tokenizer's are never allowed."""
        from llguidance import LLTokenizer, TokenizerWrapper

        if not tokenizer.stop_tokens:
            raise ValueError("this tokenizer has no token that ends a text, which a schema or a grammar needs")
        self.vocab_size, self._stop_tokens = vocab_size, tokenizer.stop_tokens
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(tokenizer, vocab_size)), eos_token=sorted(tokenizer.stop_tokens)
        )
        self._compiled: dict[tuple[str | None, ...], LLMatcher] = {}

    def compile(self, params: SamplingParams) -> Constraint:
        """Return the constraint of a request at its beginning; ValueError, in one line, for one that is wrong.

        Requests with the same constraint share what was compiled. Compiling lets other threads run.
        """
        from llguidance import LLMatcher

        key = params.json_schema, params.regex, params.grammar
        if key not in self._compiled:
            matcher = LLMatcher(self._tokenizer, definition(params), log_level=0)
            matcher.compute_bitmask()  # finds what allows nothing, and fills caches that copies share
            if matcher.is_error():
                raise ValueError(explained(params, matcher.get_error()))
            while len(self._compiled) >= MAX_KEPT:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = matcher
        return Constraint(self._compiled[key].deep_copy(), self.vocab_size, self._stop_tokens)


class Constraint:
    """Where one completion is in its schema, expression or grammar.

    Every rank that accepts the same tokens has the same masks. Two methods of one object must not run at once.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_tokens: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._stop_tokens = matcher, vocab_size, stop_tokens
        self._n_after_end = 0  # stop tokens accepted after the end, which llguidance does not count

    def mask(self) -> Tensor:
        """Return the tokens that may come next, packed: (ceil(vocab_size / 32),), int32, on the CPU; see `unpack`.

        Every stop token is among them where the text may end, and they alone where it must. Other threads run
        meanwhile. Raises ValueError where the grammar has become too complex to go on.
        """
        packed = torch.empty(-(-self._vocab_size // BITS), dtype=torch.int32, device="cpu")
        self._matcher.unsafe_compute_mask_ptr(packed.data_ptr(), packed.numel() * packed.element_size())
        self._check()
        return packed

    def nothing(self) -> Tensor:
        """Return the mask that allows no token."""
        return torch.zeros(-(-self._vocab_size // BITS), dtype=torch.int32, device="cpu")

    def accept(self, token: int) -> None:
        """Go on by a token; ValueError for one that the mask does not allow."""
        if self.must_end:
            if token not in self._stop_tokens:
                raise ValueError(f"token {token} comes after the end of the text that is asked for")
            self._n_after_end += 1
            return
        if self._matcher.try_consume_tokens([token]) != 1:
            self._check()
            raise ValueError(f"token {token} is not allowed at this place of the text that is asked for")

    def allows(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, may come next."""
        return self._matcher.validate_tokens(list(tokens))

    def rollback(self, n: int) -> None:
        """Take the last n accepted tokens back."""
        after_end = min(n, self._n_after_end)
        self._n_after_end -= after_end
        if n > after_end and not self._matcher.rollback(n - after_end):
            self._check()
            raise ValueError(f"{n} tokens cannot be taken back")

    def fork(self) -> Constraint:
        """Return a copy that goes on by itself."""
        other = Constraint(self._matcher.deep_copy(), self._vocab_size, self._stop_tokens)
        other._n_after_end = self._n_after_end
        return other

    @property
    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        return self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether nothing but a stop token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().splitlines()[0]
            raise ValueError(f"the schema or grammar that is asked for cannot be followed further: {said}")


class _Tokens:
    """A tokenizer as llguidance reads it: the attributes and the call have its names."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_tokens)
        names = {token: text for text, token in tokenizer.special_tokens.items()}
        control = {*names, *tokenizer.stop_tokens, tokenizer.bos_id, tokenizer.pad_id} - {-1}
        self.special_token_ids = sorted(token for token in control if token < vocab_size)
        # A token without bytes is never allowed, but for those that are special, which have names.
        self.tokens = [tokenizer.token_bytes(token) for token in range(min(tokenizer.n_words, vocab_size))]
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        for token in self.special_token_ids:
            self.tokens[token] = names.get(token, f"<[{token}]>").encode()

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=False, eos=False, add_prefix_space=False)


def unpack(masks: Tensor, vocab_size: int) -> Tensor:
    """Return packed masks as booleans: (..., ceil(vocab_size / 32)), int32, become (..., vocab_size)."""
    numbers = torch.arange(256, device=masks.device)
    # Eight booleans of each byte, looked up as one integer: for 32 rows a tenth of the time of shifting bits out.
    bits = (numbers[:, None] >> numbers[:8] & 1).bool().view(torch.int64)[:, 0]
    return bits[masks.contiguous().view(torch.uint8).long()].view(torch.bool)[..., :vocab_size]
