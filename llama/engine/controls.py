"""What one request's next token hangs on beside the model: penalties of its text, and what its grammar allows.

Both hang on every token before, so they are worked out on the host between two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from llama.sampling import SamplingParams, TokenAdjustments, TokenHistory
from llama.structured import Constraint, ConstraintCompiler
from llama.tokenizer import Tokenizer


class TokenControls:
    """The state of one request's penalties and constraint after some of its completion's tokens."""

    def __init__(self, begin: Callable[[], tuple[TokenHistory | None, Constraint | None]]) -> None:
        """Begin before the first token; begin: makes the state there."""
        self._begin = begin
        self.error: str | None = None  # why there can be no next token
        self._is_consistent = False  # whether all this is the state after some tokens
        self._restart()

    def _restart(self) -> None:
        self.history, self.constraint = self._begin()
        self._tokens: list[int] = []  # that were taken in
        self._n_accepted = 0  # of them by the constraint, which takes nothing after a token that it does not allow
        self._is_consistent = True

    def move_to(self, tokens: list[int]) -> None:
        """Go to the state after these tokens, from any other; draft tokens that were not sampled are taken back."""
        if not self._is_consistent:  # it was interrupted, or the constraint could not be followed
            self._restart()
        self._is_consistent = False
        try:
            self._move_to(tokens)
        except ValueError as error:
            self.error = str(error)
        else:
            self._is_consistent = True

    def _move_to(self, tokens: list[int]) -> None:
        known, constraint = self._tokens, self.constraint
        while known != tokens[: len(known)]:
            known.pop()
            if self.history is not None:
                self.history.pop()
        if constraint is not None and self._n_accepted > len(known):
            constraint.rollback(self._n_accepted - len(known))
            self._n_accepted = len(known)
        for token in tokens[len(known) :]:
            if self.history is not None:
                self.history.push(token)
            if constraint is not None and self._n_accepted == len(known) and constraint.allows([token]):
                constraint.accept(token)
                self._n_accepted += 1
            known.append(token)

    def adjustments(self) -> TokenAdjustments | None:
        """Return what penalties make of the logits at this place."""
        if self.history is None or not self._is_consistent:
            return None
        self._is_consistent = False  # DRY's tokens are new to the history's arrays
        found = self.history.adjustments()
        self._is_consistent = True
        return found

    def mask(self) -> Tensor | None:
        """Return the next tokens that the constraint allows, as bits; None behind a wrong draft, where none matters.

        Where it cannot be followed further, nothing is allowed, and `error` says why.
        """
        if self.constraint is None:
            return None
        if not self._is_consistent:
            return self.constraint.nothing()
        if self._n_accepted < len(self._tokens):
            return None
        try:
            return self.constraint.mask()
        except ValueError as error:
            self.error, self._is_consistent = str(error), False
            return self.constraint.nothing()


class ControlsMaker:
    """Makes the controls of requests, of which most need none."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiler: ConstraintCompiler | None = None

    def compile(self, params: SamplingParams) -> Constraint | None:
        """Return the constraint of a request at its beginning, None where it has none; ValueError for a wrong one."""
        if not params.is_constrained:
            return None
        if self._compiler is None:
            self._compiler = ConstraintCompiler(self._tokenizer, self._vocab_size)
        return self._compiler.compile(params)

    def make(self, prompt: Sequence[int], params: SamplingParams, end_tokens: Collection[int]) -> TokenControls | None:
        """Return a request's controls at its beginning; ValueError for a wrong constraint.

        end_tokens: those that end it. Where there is a constraint, it decides where a text may end.
        """
        has_history = TokenHistory.is_needed(params)
        if not has_history and not params.is_constrained:
            return None
        compiled = self.compile(params)
        if compiled is not None:
            end_tokens = ()

        def begin() -> tuple[TokenHistory | None, Constraint | None]:
            history = TokenHistory(prompt, params, end_tokens, self._bytes_of) if has_history else None
            return history, compiled and compiled.fork()

        return TokenControls(begin)

    def _bytes_of(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token) if token < self._tokenizer.n_words else b""
