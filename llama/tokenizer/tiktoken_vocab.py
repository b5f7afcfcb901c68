"""Vocabularies for the `tiktoken` library, and Llama 3's `tokenizer.model`, a file of tiktoken's with BPE tokens alone.

Its special tokens and its split pattern are written here.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# How Llama 3 splits a text before BPE.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Special tokens in the order of their ids, which follow those of the file; names as of Llama 3.1 to 3.3.
NAMED_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
N_SPECIAL = 256
SPECIAL_TOKENS = (*NAMED_SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(2, N_SPECIAL - 10)))
# Longer texts, and longer runs of (non-)whitespace, make tiktoken panic; Meta cuts at the same lengths.
MAX_PART_CHARS = 400_000
MAX_RUN = 25_000
RUNS = re.compile(r"\s+|\S+")


class TiktokenVocab:
    """A vocabulary of byte strings and of special tokens, encoded by the `tiktoken` library."""

    def __init__(
        self, ids: Mapping[bytes, int], pattern: str, special_tokens: dict[str, int], named: tuple[str, ...]
    ) -> None:
        """ids: those of the byte strings, lower ones merged first. named: BOS, EOS and, where there is one, PAD."""
        import tiktoken

        self.special_tokens = special_tokens
        # tiktoken calls a token's id its rank, because BPE merges the pair first that makes the lowest one.
        self.model = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=dict(ids), special_tokens=special_tokens)
        self.n_words = self.n_trained = len(ids) + len(special_tokens)
        self.bos_id, self.eos_id, self.pad_id = [*(special_tokens[text] for text in named), -1][:3]
        self.add_bos, self.prefix_space_after_special = True, False

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        """Return the ids of s; this kind puts no space before a text in either case."""
        return [token for part in _parts(s) for token in self.model.encode_ordinary(part)]

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return a token's bytes; a control token is its own text."""
        return self.model.decode_single_token_bytes(token)


def read_tiktoken(data: bytes, path: Path) -> TiktokenVocab:
    """Return Llama 3's vocabulary; data: the content of the file at path, lines of a token in base64 and its id."""
    ids = _parse(data, path)
    special_tokens = {text: len(ids) + i for i, text in enumerate(SPECIAL_TOKENS)}
    return TiktokenVocab(ids, PATTERN, special_tokens, ("<|begin_of_text|>", "<|end_of_text|>"))


def _parse(data: bytes, path: Path) -> dict[bytes, int]:
    """Return the id of each token by its bytes; ValueError names a line or a fault that keeps BPE from working."""
    ids: dict[bytes, int] = {}
    lines = [line for line in data.splitlines() if line]
    for line in lines:
        try:
            token, number = line.split()
            ids[base64.b64decode(token, validate=True)] = int(number)
        except ValueError:
            shown = line[:40].decode("ascii", "replace")
            raise ValueError(f"{path} has the line {shown!r}: expected 'base64 id' in each (truncated?)") from None
    if sorted(ids.values()) != list(range(len(lines))):
        raise ValueError(f"{path} is damaged: expected {len(lines)} different tokens with ids from 0 without a gap")
    lacking = sum(bytes([byte]) not in ids for byte in range(256))
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {lacking} of the 256 single bytes")
    return ids


def _parts(s: str) -> Iterator[str]:
    """Yield s in parts that tiktoken can take, cut where Meta's Llama 3 cuts."""
    if len(s) <= MAX_RUN:
        yield s
        return
    for i in range(0, len(s), MAX_PART_CHARS):
        part, start = s[i : i + MAX_PART_CHARS], 0
        for run in RUNS.finditer(part):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]
