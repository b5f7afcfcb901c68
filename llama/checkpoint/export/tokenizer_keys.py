"""Turn Hugging Face's tokenizer.json into the tokenizer keys of a GGUF file's metadata, where these can say it."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from llama.tokenizer import Tokenizer
from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, TokenType
from llama.tokenizer.hf_config import TokenizerConfig, read_object
from llama.tokenizer.hf_decoder import Pipeline, parse_pipeline
from llama.tokenizer.hf_vocab import BYTE_PIECE, added_tokens, trained_pieces
from llama.tokenizer.pre_rules import GPT2, PRE_RULES, PreRule
from llama.tokenizer.vocab import parse_merges

log = logging.getLogger("llama")

# How a normalizer may change text that GGUF has no key for: texts in that form already are encoded alike.
UNICODE_FORMS: tuple[Literal["NFC", "NFKC", "NFD", "NFKD"], ...] = ("NFC", "NFKC", "NFD", "NFKD")


def keys_of_json(
    path: Path, tokenizer: Tokenizer, check: Callable[[Tokenizer, Callable[[str], str]], None]
) -> dict[str, Any]:
    """Return the keys of a tokenizer.json.

    check: adapts texts by what GGUF has no key for. Of the rules by which GGUF splits text, the one counts that has the
    file's own patterns, or else any that gives the same ids. Raise ValueError where none does.
    """
    content = read_object(path.read_bytes(), str(path))
    pipeline = parse_pipeline(content)
    form = next((step["type"] for step in pipeline["normalizer"] if step["type"] in UNICODE_FORMS), "")
    if form:
        log.info("GGUF has no key that says that text is put into Unicode's %s: programs do it, or leave it out", form)
    # SentencePiece puts a space before a text that begins with one, too.
    drops_space = any(step["type"] == "Metaspace" for step in pipeline["pre_tokenizer"])

    def adapt(text: str) -> str:
        text = next((unicodedata.normalize(each, text) for each in UNICODE_FORMS if each == form), text)
        return text.lstrip(" ") if drops_space else text

    said: ValueError | None = None
    for keys in _candidates(path, content, pipeline, tokenizer):
        try:
            check(Tokenizer.from_gguf(keys), adapt)
            return keys
        except ValueError as error:
            said = said or error
    raise ValueError(f"GGUF cannot express the tokenizer of {path}: {said}") from None


def _candidates(
    path: Path, content: dict[str, Any], pipeline: Pipeline, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yield keys that may say what a tokenizer.json does, the likeliest first."""
    model = content["model"]
    trained, unknown = trained_pieces(model)
    if model["type"] != "BPE":
        raise ValueError(f"{path} has a model of type {model['type']}, GGUF's keys say BPE alone: use --format hf")
    tokens = added_tokens(content, TokenizerConfig.read(path.parent), trained)
    added = {number: token.content for number, token in tokens.items()}
    texts = {number: text for text, number in trained.items()} | added
    is_bytes = any(step["type"] == "ByteLevel" for step in pipeline["pre_tokenizer"])
    control = set(tokenizer.special_tokens.values())

    def kind(i: int) -> TokenType:
        if i not in texts:
            return TokenType.UNUSED
        if i in control:
            return TokenType.CONTROL
        if i in added:
            return TokenType.USER_DEFINED if texts[i] != unknown else TokenType.UNKNOWN
        if texts[i] == unknown and not is_bytes:
            return TokenType.UNKNOWN
        return TokenType.BYTE if not is_bytes and BYTE_PIECE.fullmatch(texts[i]) else TokenType.NORMAL

    ids = range(tokenizer.n_words)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    named |= {"unknown": trained.get(unknown or "", -1)}
    keys: dict[str, Any] = {
        TOKENIZER_KEY + "tokens": [texts.get(i, f"[PAD{i}]") for i in ids],
        TOKENIZER_KEY + "token_type": [int(kind(i)) for i in ids],
        TOKENIZER_KEY + "add_bos_token": tokenizer.add_bos,
        **{f"{TOKENIZER_KEY}{name}_token_id": number for name, number in named.items() if number >= 0},
    }
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    merges = parse_merges(model["merges"], trained, "its merges have")
    if not is_bytes:
        yield keys | _sentencepiece_keys(keys[TOKENIZER_KEY + "tokens"], merges, pipeline)
        return
    keys |= {TOKENIZER_KEY + "model": "gpt2", TOKENIZER_KEY + "merges": [f"{a} {b}" for a, b in merges]}
    for name in _rules(pipeline, bool(model.get("ignore_merges")), tokenizer.add_bos):
        yield keys | {TOKENIZER_KEY + "pre": name}


def _sentencepiece_keys(texts: list[str], merges: list[tuple[str, str]], pipeline: Pipeline) -> dict[str, Any]:
    """Return the keys of SentencePiece's BPE: a piece's score is the higher the earlier the merge that makes it."""
    scores: dict[str, float] = {}
    for rank, (a, b) in enumerate(merges):
        scores.setdefault(a + b, -float(rank))
    steps = (*pipeline["normalizer"], *pipeline["pre_tokenizer"])
    prefix = any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)
    return {
        TOKENIZER_KEY + "model": "llama",
        TOKENIZER_KEY + "scores": [scores.get(text, -float(len(merges) + 1)) for text in texts],
        TOKENIZER_KEY + "add_space_prefix": prefix,
    }


def _rules(pipeline: Pipeline, ignore_merges: bool, add_bos: bool) -> Iterator[str]:
    """Yield the names of rules, one for each: those with the patterns of a pipeline first, then all others."""
    splits: list[str] = []
    for step in pipeline["pre_tokenizer"]:
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits":
            splits.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif step.get("use_regex"):
            splits.append(GPT2)
    names: dict[PreRule, str] = {}
    for name, rule in PRE_RULES.items():
        names.setdefault(rule, name)

    def unlike(name: str) -> tuple[bool, ...]:
        rule = PRE_RULES[name]
        return rule.splits != tuple(splits), rule.ignore_merges != ignore_merges, rule.add_bos != add_bos

    yield from sorted(names.values(), key=unlike)
