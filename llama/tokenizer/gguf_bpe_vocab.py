"""Byte-level BPE as GGUF stores it (model "gpt2"), run by the `tokenizers` library.

A GGUF file does not store how text is split before BPE, but names it (`tokenizer.ggml.pre`): a table here turns the
names into rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, GGUFTokens, TokenType, array
from llama.tokenizer.tiktoken_vocab import PATTERN
from llama.tokenizer.vocab import CONTROL_TOKENS, byte_alphabet, parse_merges


@dataclass(frozen=True)
class PreRule:
    """How text is prepared for BPE.

    splits: patterns that are applied in turn; each match, and each text between two, is then encoded by itself.
    ignore_merges: whether a split that is a token as a whole becomes that token, whatever the merges say.
    add_bos: whether a prompt begins with BOS where the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SEED = QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|"
SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = CASED.replace("%s", "") + r"\p{N}|" + SYMBOLS
GPT4O = CASED.replace("%s", CONTRACTION + "?") + r"\p{N}{1,3}|" + SYMBOLS
VIKING = " ?[^(\\s|.,!?…。，、।۔،)]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# Names and rules are those of llama.cpp's llama-vocab.cpp, patterns those of the models' own tokenizer.json. The name
# "default" is left out: it means that the converter did not know.
RULES = (
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
        PreRule((PATTERN,), ignore_merges=True, add_bos=True),
    ),
    (("smaug-bpe", "dbrx"), PreRule((PATTERN,))),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreRule((r"\p{N}", GPT2)),
    ),
    (
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"),
        PreRule((GPT2,)),
    ),
    (("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"), PreRule((QWEN2,))),
    (("tekken",), PreRule((TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2"), PreRule((GPT4O,))),
    (("seed-coder",), PreRule((SEED,))),
    (("viking",), PreRule((VIKING, r"\p{N}"))),
    (("deepseek-coder",), PreRule(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"))),
)
PRE_RULES = {name: rule for names, rule in RULES for name in names}


class GGUFBytePairVocab:
    """A vocabulary spelled in GPT-2's alphabet, a printable character for each byte; added tokens are in plain text."""

    def __init__(self, tokens: GGUFTokens, metadata: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

        pre = metadata.get(TOKENIZER_KEY + "pre")
        if not isinstance(pre, str) or pre not in PRE_RULES:
            raise ValueError(
                f"{TOKENIZER_KEY}pre is {pre!r}: supported are {', '.join(sorted(PRE_RULES))}"
                + (" (a newer llama.cpp converter writes it)" if pre in (None, "default") else "")
            )
        rule = PRE_RULES[pre]
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

        self.n_words = len(tokens.texts)
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
