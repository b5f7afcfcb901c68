"""Byte-level BPE as GGUF stores it (model "gpt2"), run by the `tokenizers` library.

How text is split before BPE is not stored, only named (`tokenizer.ggml.pre`): the table below turns names into rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.tokenizer.gguf_tokens import PREFIX, GGUFTokens, TokenType, array
from llama.tokenizer.vocab import MARKERS, byte_alphabet


@dataclass(frozen=True)
class PreRule:
    """splits: patterns applied in turn, each match and each text between matches becoming a piece of its own."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SEED = QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|"
SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
TEKKEN = CASED.replace("%s", "") + r"\p{N}|" + SYMBOLS
GPT4O = CASED.replace("%s", CONTRACTION + "?") + r"\p{N}{1,3}|" + SYMBOLS
VIKING = " ?[^(\\s|.,!?…。，、।۔،)]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

# Names and rules as in llama.cpp's llama-vocab.cpp, patterns as in the models' own tokenizer.json. llama.cpp's
# "default" is left out: it means that the converter did not know.
RULES = (
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
        PreRule((LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (("smaug-bpe", "dbrx"), PreRule((LLAMA3,))),
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
    """Tokens are spelled in GPT-2's alphabet, a printable character for each byte; added tokens in plain text."""

    def __init__(self, tokens: GGUFTokens, metadata: Mapping[str, Any]) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

        pre = metadata.get(PREFIX + "pre")
        if not isinstance(pre, str) or pre not in PRE_RULES:
            raise ValueError(
                f"{PREFIX}pre is {pre!r}: supported are {', '.join(sorted(PRE_RULES))}"
                + (" (a newer llama.cpp converter writes it)" if pre in (None, "default") else "")
            )
        rule = PRE_RULES[pre]
        kinds = [
            TokenType.CONTROL if kind == TokenType.USER_DEFINED and text in MARKERS else kind
            for text, kind in zip(tokens.texts, tokens.types, strict=True)
        ]
        # Text can reach these alone: with ignore_merges a control token could be a piece of the text otherwise.
        reachable = (TokenType.NORMAL, TokenType.USER_DEFINED)
        vocab = {text: i for i, (text, kind) in enumerate(zip(tokens.texts, kinds, strict=True)) if kind in reachable}
        merges = [merge.partition(" ")[::2] for merge in array(metadata, "merges", (str,))]
        # Checked here, because the library panics on some of these.
        wrong = [f"{a} {b}" for a, b in merges if not (a in vocab and b in vocab and a + b in vocab)]
        if wrong:
            raise ValueError(f"{PREFIX}merges has {wrong[0]!r}: expected two tokens of the file that join to a third")
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
        self.restarts = False
        self.add_bos = rule.add_bos if tokens.add_bos is None else tokens.add_bos
        self.special_tokens = {tokens.texts[i]: i for i, kind in enumerate(kinds) if kind == TokenType.CONTROL}
        self._texts, self._kinds = tokens.texts, kinds
        self._byte_of = byte_alphabet()

    def encode(self, s: str, continues: bool) -> list[int]:
        return self._bpe.encode(s, add_special_tokens=False).ids

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        text = self._texts[token]
        if self._kinds[token] == TokenType.NORMAL and all(char in self._byte_of for char in text):
            return bytes(self._byte_of[char] for char in text)
        return text.encode()
