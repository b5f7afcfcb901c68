"""Mistral's `tekken.json`: byte strings with their ranks, and special tokens, whose ids come first."""

import base64
from typing import Any

from llama.tokenizer.hf_config import expect, parse_id
from llama.tokenizer.pre_rules import TEKKEN
from llama.tokenizer.tiktoken_vocab import TiktokenVocab

# The special tokens of files that list none, in the order of their ids; all later ones are SPARE_TOKEN.
TEKKEN_SPECIAL_TOKENS = (
    ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    + ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
    + ("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
)
SPARE_TOKEN = "<SPECIAL_%d>"


def is_tekken(content: dict[str, Any]) -> bool:
    """Tell whether a JSON object is a tekken.json, and no tokenizer.json."""
    return "vocab" in content and "config" in content and "model" not in content


def read_tekken(content: dict[str, Any], name: str) -> TiktokenVocab:
    """Return the vocabulary of a parsed tekken.json; ValueError begins with name, and says what does not fit.

    A file has more byte strings than the model has ids for: the first count, as many as config says.
    """
    try:
        return _vocab(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is no tekken.json that works here: {type(error).__name__}: {error!s:.200}") from None


def _vocab(content: dict[str, Any]) -> TiktokenVocab:
    config = expect(dict, content["config"], "its config")
    n_words, n_special = (
        parse_id(config.get(key), f"its {key}") for key in ("default_vocab_size", "default_num_special_tokens")
    )
    if config.get("pattern") != TEKKEN:
        raise ValueError(f"its pattern is {config.get('pattern')!r:.60}, which no released file has")
    listed = content.get("special_tokens")
    named = dict(enumerate(TEKKEN_SPECIAL_TOKENS))
    if listed is not None:
        named = {parse_id(token["rank"], "a rank"): expect(str, token["token_str"], "a token") for token in listed}
    special_tokens = {named.get(i, SPARE_TOKEN % i): i for i in range(n_special)}
    if len(special_tokens) != n_special or max(named) >= n_special or not {"<s>", "</s>"} <= special_tokens.keys():
        raise ValueError(f"its special tokens are not {n_special} different ones, <s> and </s> among them")
    vocab = expect(list, content["vocab"], "its vocab")[: n_words - n_special]
    ids = {base64.b64decode(token["token_bytes"], validate=True): n_special + i for i, token in enumerate(vocab)}
    if len(ids) != n_words - n_special or any(token["rank"] != i for i, token in enumerate(vocab)):
        raise ValueError(f"its vocab has not {n_words - n_special} different tokens in the order of their ranks")
    if any(bytes([byte]) not in ids for byte in range(256)):
        raise ValueError("its vocab lacks some of the 256 single bytes")
    pad = ("<pad>",) if "<pad>" in special_tokens else ()
    return TiktokenVocab(ids, TEKKEN, special_tokens, ("<s>", "</s>", *pad))
