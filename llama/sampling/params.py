"""What a request asks of the tokens that complete it. Knows nothing of tensors or of tokenizers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# Devices take fp32 and int64; from far below on, every token is as likely as any other.
MAX_TEMPERATURE = 1e15
MAX_BIAS = 1e30  # a penalty may multiply it
MAX_TOP_LOGPROBS = 100
MAX_SAMPLES = 1024

# Numbers with a lowest and a highest value: every other one is a mistake.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "dry_multiplier": (0, 100),
    "dry_base": (1, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
}
# Integers with a lowest value, and those that None stands for as well.
LEAST = {
    "top_k": 0, "dry_allowed_length": 1, "min_tokens": 0, "top_logprobs": 0, "n": 1,
    "max_gen_len": 0, "penalty_last_n": 0, "dry_last_n": 0, "best_of": 1,
}  # fmt: skip
NONE_ALLOWED = ("max_gen_len", "penalty_last_n", "dry_last_n", "best_of", "seed", "stop_token")
GRAMMARS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token; wrong values raise ValueError.

    The logits of the vocabulary are changed in this order, before a token is drawn:

    1. logit_bias is added. banned_tokens become impossible (minus infinity), as do the tokens that end a completion
       while it has fewer than min_tokens, or always with ignore_eos, and all that a constraint does not allow. Where
       there is a constraint, it alone decides where a text may end, whatever min_tokens and ignore_eos are.
    2. repetition_penalty r divides the logits above 0 of the tokens in the text, prompt included, and multiplies those
       below (arXiv:1909.05858). presence_penalty, and frequency_penalty times a token's count in the completion, are
       subtracted. penalty_last_n bounds how far back these three look.
    3. DRY: where a token would repeat n >= dry_allowed_length tokens that came before it in the text,
       dry_multiplier * dry_base ** (n - dry_allowed_length) is subtracted. No match reaches over a sequence breaker.
    4. The logits are divided by the temperature. Of the probabilities that this gives, each of these keeps a part, in
       this order: top_k, top_p (arXiv:1904.09751), min_p (arXiv:2407.01082), typical_p (arXiv:2202.00666), and XTC,
       which removes, with xtc_probability, all tokens of at least xtc_threshold but the least likely of them.

    Log-probabilities are those of the logits before all of this.

    Args:
        temperature: 0 is greedy; higher is more varied.
        top_p: probability mass of the nucleus that tokens are drawn from, in [0, 1]; 0 is greedy.
        max_gen_len: most tokens to generate for a prompt; None is as many as max_seq_len leaves room for.
        seed: the same seed gives the same texts; None goes on with the model's own sequence of seeds.
        logprobs: also return the log-probability of every token.
        echo: repeat the prompt in the completion.
        stop_token: the one token that ends a completion; None is each of the tokenizer's stop_tokens.
        top_k: draw from the k likeliest tokens; 0 is from all.
        min_p: leave out tokens less likely than this part of the likeliest one's probability; 0 is none.
        typical_p: mass of the tokens whose surprise is nearest to the expected one; 1 is all.
        repetition_penalty: above 1, tokens of the text so far are less likely to come again; 1 is off.
        presence_penalty: subtracted from logits of tokens that the completion has; below 0 is added.
        frequency_penalty: subtracted for each time that the completion has a token.
        penalty_last_n: how many of the last tokens the three penalties look at; None is all.
        dry_multiplier: strength of DRY, which works against repeated passages; 0 is off.
        dry_base: how much each further token of a repeated passage adds.
        dry_allowed_length: the longest passage that may be repeated.
        dry_last_n: how many of the last tokens are searched for passages; None is all.
        dry_breakers: texts that no repeated passage reaches over.
        xtc_probability: how often the likeliest tokens are left out; 0 is never.
        xtc_threshold: probability from which on a token counts as one of the likeliest.
        logit_bias: what to add to logits, by token id: {"504": -2.5}.
        banned_tokens: ids of tokens that never come.
        min_tokens: fewest tokens before a completion may end by itself; a stop string ends it before, too.
        ignore_eos: go on where the model would end, up to max_gen_len.
        stop: texts that end a completion, which leaves them out.
        stop_token_ids: ids of tokens that end a completion, beside the tokenizer's.
        n: completions of each prompt.
        best_of: make as many completions, and keep the n likeliest, by the mean log-probability of their tokens.
        top_logprobs: also return this many of the likeliest tokens at each place, with their log-probabilities.
        json_schema: completions are JSON that this JSON schema allows.
        regex: completions match this regular expression.
        grammar: completions are of this grammar, in Lark's or llama.cpp's GBNF form.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_gen_len: int | None = None
    seed: int | None = None
    logprobs: bool = False
    echo: bool = False
    stop_token: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int | None = None
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: Mapping[int, float] | None = None
    banned_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    best_of: int | None = None
    top_logprobs: int = 0
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, (lowest, highest) in LIMITS.items():
            value = getattr(self, name)
            if not _is_number(value) or not lowest <= value <= highest:
                raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}, got {value!r}")
            object.__setattr__(self, name, float(value))
        for name in (*LEAST, *NONE_ALLOWED):
            self._check_integer(name)
        for name, highest in (("top_logprobs", MAX_TOP_LOGPROBS), ("n", MAX_SAMPLES), ("best_of", MAX_SAMPLES)):
            if (getattr(self, name) or 0) > highest:
                raise ValueError(f"{name} must be at most {highest}, got {getattr(self, name)}")
        for name in ("banned_tokens", "stop_token_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        for name in ("stop", "dry_breakers"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} completions cannot give n {self.n}: best_of must be at least n")
        if isinstance(self.json_schema, Mapping | bool):
            object.__setattr__(self, "json_schema", _json(self.json_schema))
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be combined: give one of them")
        for name in given:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r:.80}")
            _check_unicode(name, getattr(self, name))

    @property
    def samples(self) -> int:
        """How many completions of each prompt are made."""
        return self.n if self.best_of is None else self.best_of

    @property
    def needs_logprobs(self) -> bool:
        """Whether the log-probabilities of its tokens have to be known."""
        return self.logprobs or self.top_logprobs > 0 or self.best_of is not None

    @property
    def is_constrained(self) -> bool:
        """Whether completions are those of a schema, an expression or a grammar."""
        return any(getattr(self, name) is not None for name in GRAMMARS)

    def _check_integer(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in NONE_ALLOWED:
            return
        if not isinstance(value, Integral) or isinstance(value, bool):  # numpy's integers are integers, too
            least = f" of at least {LEAST[name]}" if name in LEAST else ""
            raise ValueError(f"{name} must be an integer{least}, got {value!r}")
        object.__setattr__(self, name, int(value))
        if name in LEAST and value < LEAST[name]:
            raise ValueError(f"{name} must be an integer of at least {LEAST[name]}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else value
    try:
        found = tuple(ids)
    except TypeError:
        found = (None,)
    if not all(isinstance(each, Integral) and not isinstance(each, bool) for each in found):
        raise ValueError(f"{name} must be a list of token ids, got {value!r:.80}")
    return tuple(map(int, found))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(each, str) and each for each in texts):
        raise ValueError(f"{name} must be a text or a list of texts, none of them empty, got {value!r:.80}")
    for text in texts:
        _check_unicode(name, text)
    return texts


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half of a surrogate pair, {text[error.start]!r}: no token is of one") from None


def _biases(value: Any) -> dict[int, float]:
    try:
        found = {int(token): float(bias) for token, bias in dict(value).items()}
    except (TypeError, ValueError, OverflowError):
        found = {0: math.nan}
    if not all(bias <= MAX_BIAS for bias in found.values()):
        raise ValueError(
            f'logit_bias must give numbers up to {MAX_BIAS:g} for token ids, as {{"504": -2.5}} does, got {value!r:.80}'
        )
    return found


def _json(schema: Any) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is no JSON: {error}") from None
