"""Our tokenizers and those of transformers, with the same tokens and the same chat template."""

from __future__ import annotations

import functools
import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama.tokenizer import Tokenizer

Pair = tuple[Tokenizer, PreTrainedTokenizerFast]

TEXTS = [
    "What is the capital of France? It's Paris, isn't it?",
    "def f(x):\n    return x ** 2  # {{ ok }} {% raw %} &lt;b&gt; \"quoted\" 'single' \\ back\\slash",
    "Zürich 北京 Привет 👋🏽 e\u0301 İstanbul ﬁle \u2028 12345",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def base_model() -> dict[str, Any]:
    """Vocabulary and merges of a small byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def tokenizer_pair(template: str | dict[str, str] | None, specials: list[str]) -> Pair:
    """Our tokenizer, through GGUF metadata, and transformers', with the same tokens and template."""
    texts = sorted(base_model()["vocab"], key=base_model()["vocab"].__getitem__)
    merges = [tuple(merge) for merge in base_model()["merges"]]
    theirs = tokenizers.Tokenizer(models.BPE(vocab=dict(base_model()["vocab"]), merges=merges))
    theirs.pre_tokenizer = _pre_tokenizer()
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token=specials[0], eos_token=specials[1])
    fast.chat_template = template
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.tokens": [*texts, *specials],
        "tokenizer.ggml.token_type": [1] * len(texts) + [3] * len(specials),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(texts),
        "tokenizer.ggml.eos_token_id": len(texts) + 1,
    }
    if isinstance(template, dict):
        metadata |= {f"tokenizer.chat_template.{name}": text for name, text in template.items()}
    elif template is not None:
        metadata["tokenizer.chat_template"] = template
    return Tokenizer.from_gguf(metadata), fast


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.special_tokens.values()]
