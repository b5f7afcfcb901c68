"""Byte-level BPE as GGUF stores it (model "gpt2"), run by the `tokenizers` library.

A GGUF file does not store how text is split before BPE, but names it (`tokenizer.ggml.pre`).
"""

import logging
from collections.abc import Mapping
from typing import Any

from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, GGUFTokens, TokenType, array
from llama.tokenizer.pre_rules import PRE_RULES
from llama.tokenizer.vocab import CONTROL_TOKENS, byte_alphabet, parse_merges

log = logging.getLogger("llama")


class GGUFBytePairVocab:
    """A vocabulary spelled in GPT-2's alphabet, a printable character for each byte; added tokens are in plain text."""

    def __init__(self, tokens: GGUFTokens, metadata: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

        rule = PRE_RULES[choose_pre_rule(metadata)]
        kinds = [
            TokenType.CONTROL if kind == TokenType.USER_DEFINED and text in CONTROL_TOKENS else kind
            for text, kind in zip(tokens.texts, tokens.types, strict=True)
        ]
        # Text can reach these alone: with ignore_merges, a control token could be a whole split otherwise.
        reachable = (TokenType.NORMAL, TokenType.USER_DEFINED)
        vocab = {text: i for i, (text, kind) in enumerate(zip(tokens.texts, kinds, strict=True)) if kind in reachable}
        merges = parse_merges(array(metadata, "merges", (str,)), vocab, f"{TOKENIZER_KEY}merges has")
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges)
        self._bpe = Tokenizer(model)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        added = [text for text, kind in zip(tokens.texts, kinds, strict=True) if kind == TokenType.USER_DEFINED]
        self._bpe.add_tokens([AddedToken(text, normalized=False) for text in added])

        self.n_words = self.n_trained = len(tokens.texts)
        self.bos_id, self.eos_id, self.pad_id = tokens.bos_id, tokens.eos_id, tokens.pad_id
        self.prefix_space_after_special = False
        self.add_bos = rule.add_bos if tokens.add_bos is None else tokens.add_bos
        self.special_tokens = {tokens.texts[i]: i for i, kind in enumerate(kinds) if kind == TokenType.CONTROL}
        self._texts, self._kinds = tokens.texts, kinds
        self._byte_of = byte_alphabet()

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        """Return the ids of s; this kind puts no space before a text in either case."""
        return self._bpe.encode(s, add_special_tokens=False).ids

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return a token's bytes; a control token is its own text."""
        text = self._texts[token]
        if self._kinds[token] == TokenType.NORMAL and all(char in self._byte_of for char in text):
            return bytes(self._byte_of[char] for char in text)
        return text.encode()


def choose_pre_rule(metadata: Mapping[str, Any]) -> str:
    """Return the name of the rule by which text is split; ValueError for one that is not known.

    Converters before May 2024 wrote none. Llama 3's tokens then tell the rule, and all others get llama.cpp's default.
    """
    pre = metadata.get(TOKENIZER_KEY + "pre")
    if pre in (None, ""):
        pre = "llama-bpe" if "<|begin_of_text|>" in metadata[TOKENIZER_KEY + "tokens"] else "default"
        log.warning(
            "%spre is missing, so the file does not say how text is split before BPE: the rule %r is taken; if texts "
            "get worse, give the model's own tokenizer.json with --tokenizer_path",
            TOKENIZER_KEY,
            pre,
        )
    if not isinstance(pre, str) or pre not in PRE_RULES:
        raise ValueError(f"{TOKENIZER_KEY}pre is {pre!r}: supported are {', '.join(sorted(PRE_RULES))}")
    return pre
