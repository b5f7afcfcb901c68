"""Offer a checkpoint of any architecture that is in no file: random weights, and a tokenizer that works.

The same seed gives the same weights, in whatever format, dtype or number of shards they are written.
"""

from __future__ import annotations

import itertools
import math
import string
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import dtype_name
from llama.checkpoint.export.tokenizer_model import merges_of
from llama.checkpoint.families import FAMILIES
from llama.checkpoint.names import NamingScheme, module_name
from llama.checkpoint.shapes import global_shapes
from llama.quantization.gguf_blocks import BlockType
from llama.testing.model_presets import Preset, TokenizerKind
from llama.tokenizer import Tokenizer
from llama.tokenizer.gguf_tokens import TOKENIZER_KEY, TokenType
from llama.tokenizer.sentencepiece_vocab import SPACE
from llama.tokenizer.tiktoken_vocab import SPECIAL_TOKENS
from llama.tokenizer.vocab import byte_alphabet

# Values drawn at once by a thread; each such run of a tensor has a generator of its own.
DRAWN_AT_ONCE = 1 << 20

SMOLLM_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<reserved_{i}>" for i in range(14)))
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INFILLING_TOKENS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
STANDARD_PIECES = ("<unk>", "<s>", "</s>")


class ByteLevel(NamedTuple):
    """Describe a tokenizer of byte-level BPE: how it splits text, its special tokens, and those that it begins with."""

    pre: str
    bos: str
    eos: str
    first: tuple[str, ...] = ()  # before its other tokens
    last: tuple[str, ...] = ()  # behind them
    add_bos: bool = False


BYTE_LEVEL = {
    "llama3": ByteLevel("llama-bpe", SPECIAL_TOKENS[0], SPECIAL_TOKENS[1], last=SPECIAL_TOKENS, add_bos=True),
    "smollm": ByteLevel("smollm", "<|im_start|>", "<|im_end|>", first=SMOLLM_SPECIAL_TOKENS),
    "qwen2": ByteLevel("qwen2", "<|endoftext|>", "<|im_end|>", last=CHAT_TOKENS),
    "olmo2": ByteLevel("dbrx", "<|endoftext|>", "<|endoftext|>", last=CHAT_TOKENS),
}


class RandomCheckpoint:
    """Draw weights of a size that keeps activations near 1 after any number of layers, so that fp16 holds them."""

    dtype = torch.bfloat16
    stop_tokens: frozenset[int] = frozenset()
    pads_vocab = False
    naming: NamingScheme = "meta"
    family = FAMILIES["llama"]
    is_quantized = False

    def __init__(self, name: str, preset: Preset, seed: int) -> None:
        """Name the checkpoint, for errors, and draw what `seed` gives for that architecture."""
        self.path = Path(f"{name} (random weights)")
        self.args, self.context_len, self.seed = preset.args, preset.context_len, seed
        self.tokenizer_metadata = random_tokenizer(preset.tokenizer, preset.args.vocab_size)
        self._shapes = global_shapes(preset.args)

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        shape = self._shapes[name]
        mean, std = (1.0, 0.1) if len(shape) == 1 else (0.0, self._std(name))
        whole = self._normal(name, math.prod(shape), mean, std).view(shape)
        return whole.narrow(dim, start, (shape[dim] if stop is None else stop) - start)

    def stored_as(self, name: str) -> str:
        return dtype_name(self.dtype)

    def block_type(self, name: str) -> BlockType | None:
        return None

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        raise AssertionError(f"{name} is not in blocks")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.tokenizer_metadata)

    def _std(self, name: str) -> float:
        """Return the standard deviation of a matrix's values."""
        if module_name(name) == "tok_embeddings" and not self.args.tied_embeddings:
            return 1.0
        std = self._shapes[name][1] ** -0.5
        return std / math.sqrt(2 * self.args.n_layers) if module_name(name) in ("wo", "w2") else std

    def _normal(self, name: str, count: int, mean: float, std: float) -> Tensor:
        """Draw `count` normal values, in runs of a fixed length so that several threads draw the same as one."""
        values = torch.empty(count, dtype=self.dtype, device="cpu")

        def draw(first: int) -> None:
            seeds = [self.seed, zlib.crc32(name.encode()), first // DRAWN_AT_ONCE]
            generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seeds)))
            run = values[first : first + DRAWN_AT_ONCE]
            run.copy_(torch.from_numpy(generator.standard_normal(len(run), np.float32)).mul_(std).add_(mean))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, range(0, count, DRAWN_AT_ONCE)))
        return values


def random_tokenizer(kind: TokenizerKind, vocab_size: int) -> dict[str, Any]:
    """Return GGUF metadata of a vocabulary of that size: every byte, and words that merge letter by letter."""
    if kind in ("sentencepiece", "code_llama"):
        return _sentencepiece_metadata(vocab_size, INFILLING_TOKENS if kind == "code_llama" else ())
    return _byte_level_metadata(vocab_size, BYTE_LEVEL[kind])


def _sentencepiece_metadata(vocab_size: int, last: tuple[str, ...]) -> dict[str, Any]:
    singles = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    n_words = vocab_size - len(STANDARD_PIECES) - 256 - len(singles) - len(last)
    words = list(itertools.islice(_letter_words(SPACE), n_words))
    tokens = [*STANDARD_PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *words, *singles, *last]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.NORMAL] * (len(words) + len(singles)) + [TokenType.CONTROL] * len(last)
    assert len(tokens) == len(kinds) == vocab_size, (len(tokens), vocab_size)
    return {
        TOKENIZER_KEY + "model": "llama",
        TOKENIZER_KEY + "tokens": tokens,
        TOKENIZER_KEY + "scores": [0.0] * (len(STANDARD_PIECES) + 256)
        + [-float(i) for i in range(vocab_size - len(STANDARD_PIECES) - 256)],
        TOKENIZER_KEY + "token_type": [int(kind) for kind in kinds],
        TOKENIZER_KEY + "bos_token_id": 1,
        TOKENIZER_KEY + "eos_token_id": 2,
        TOKENIZER_KEY + "unknown_token_id": 0,
        TOKENIZER_KEY + "add_bos_token": True,
        TOKENIZER_KEY + "add_space_prefix": True,
    }


def _byte_level_metadata(vocab_size: int, tokenizer: ByteLevel) -> dict[str, Any]:
    first, last = tokenizer.first, tokenizer.last
    alphabet = byte_alphabet()
    space = next(char for char, byte in alphabet.items() if byte == ord(" "))
    n_words = vocab_size - len(first) - len(alphabet) - len(last)
    pieces = [*alphabet, *itertools.islice(_letter_words(space), n_words)]
    priorities = {piece.encode(): i for i, piece in enumerate(pieces)}
    control = TokenType.CONTROL
    tokens = [*first, *pieces, *last]
    kinds = [control] * len(first) + [TokenType.NORMAL] * len(pieces) + [control] * len(last)
    return {
        TOKENIZER_KEY + "model": "gpt2",
        TOKENIZER_KEY + "pre": tokenizer.pre,
        TOKENIZER_KEY + "tokens": tokens,
        TOKENIZER_KEY + "token_type": [int(kind) for kind in kinds],
        TOKENIZER_KEY + "merges": [f"{a.decode()} {b.decode()}" for a, b in merges_of(priorities)],
        TOKENIZER_KEY + "bos_token_id": tokens.index(tokenizer.bos),
        TOKENIZER_KEY + "eos_token_id": tokens.index(tokenizer.eos),
        TOKENIZER_KEY + "add_bos_token": tokenizer.add_bos,
    }


def _letter_words(space: str) -> Iterator[str]:
    """Yield all words of 2 letters, of 3 and so on, with and without a space before: each extends an earlier one."""
    yield from (space + letter for letter in string.ascii_lowercase)
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            word = "".join(letters)
            yield word
            yield space + word
