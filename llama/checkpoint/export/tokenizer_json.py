"""Make Hugging Face's tokenizer.json and tokenizer_config.json of the tokenizer keys of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.checkpoint.export.tokenizer_model import merges_of
from llama.tokenizer import Tokenizer
from llama.tokenizer.gguf_bpe_vocab import choose_pre_rule
from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, GGUFTokens, TokenType
from llama.tokenizer.pre_rules import PRE_RULES
from llama.tokenizer.sentencepiece_vocab import SPACE


def tokenizer_json(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json, in words as transformers' own conversions choose them."""
    tokens = GGUFTokens.from_metadata(metadata)
    content = _sentencepiece_json(tokens, metadata) if tokens.model == "llama" else _byte_level_json(tokens, metadata)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, tokenizer),
        "post_processor": _post_processor(tokens, tokenizer),
        **content,
    }


def tokenizer_config(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json."""
    tokens = GGUFTokens.from_metadata(metadata)
    config: dict[str, Any] = {
        # The class that runs a tokenizer.json as it stands: LlamaTokenizer rebuilds it by rules of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": False,
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokens.unk_id}
    config |= {f"{name}_token": tokens.texts[number] for name, number in ids.items() if number >= 0}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _added_tokens(tokens: GGUFTokens, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """List tokens that are not pieces of text: control tokens, and those that stand for themselves in a text."""
    control = set(tokenizer.special_tokens.values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = (TokenType.NORMAL, TokenType.BYTE)
    return [
        {"id": i, "content": text, **flags, "special": i in control or kind != TokenType.USER_DEFINED}
        for i, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True))
        if i in control or kind not in pieces
    ]


def _post_processor(tokens: GGUFTokens, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not tokenizer.add_bos:
        return None
    text = tokens.texts[tokenizer.bos_id]
    bos = [{"SpecialToken": {"id": text, "type_id": n}} for n in (0, 1)]
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos[0], a],
        "pair": [bos[0], a, bos[1], b],
        "special_tokens": {text: {"id": text, "ids": [tokenizer.bos_id], "tokens": [text]}},
    }


def _bpe(tokens: GGUFTokens, merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": {text: i for i, text in enumerate(tokens.texts)},
        "merges": merges,
    }


def _byte_level_json(tokens: GGUFTokens, metadata: Mapping[str, Any]) -> dict[str, Any]:
    rule = PRE_RULES[choose_pre_rule(metadata)]
    merges = [list(merge.partition(" ")[::2]) for merge in metadata[TOKENIZER_KEY + "merges"]]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{**split, "pattern": {"Regex": pattern}} for pattern in rule.splits]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(tokens, merges, ignore_merges=rule.ignore_merges),
    }


def _sentencepiece_json(tokens: GGUFTokens, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Describe SentencePiece's BPE: a pair is merged when it makes a piece, the piece with the highest score first."""
    if tokens.unk_id < 0:
        raise ValueError("a SentencePiece vocabulary without an unknown token has no form as a tokenizer.json")
    scores = metadata[TOKENIZER_KEY + "scores"]
    order = sorted(range(len(tokens.texts)), key=lambda i: -scores[i])
    reached = (TokenType.NORMAL, TokenType.UNUSED)
    # UTF-8, so that one function serves; no piece is cut within a character, because no fragment of one is a piece.
    priorities = {tokens.texts[i].encode(): n for n, i in enumerate(order) if tokens.types[i] in reached}
    merges = [[a.decode(), b.decode()] for a, b in merges_of(priorities)]
    prefix = bool(metadata.get(TOKENIZER_KEY + "add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    text_spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] * prefix + [spaces]
    decoders = [text_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * prefix
    settings = {"unk_token": tokens.texts[tokens.unk_id], "fuse_unk": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, merges, **settings, byte_fallback=TokenType.BYTE in tokens.types),
    }
