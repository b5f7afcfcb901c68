"""Llama 3's tokenizer: tiktoken ranks from a file, the special tokens and the pattern from here."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL = 256
NAMED_SPECIAL = (  # in order after the ranks, names as of Llama 3.1 to 3.3
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
# Longer texts, and longer runs of (non-)whitespace, make tiktoken panic; Meta cuts at the same lengths.
MAX_CHARS = 400_000
MAX_RUN = 25_000
RUNS = re.compile(r"\s+|\S+")


class RanksVocab:
    def __init__(self, data: bytes, path: Path) -> None:
        import tiktoken

        ranks = _parse(data, path)
        reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(N_SPECIAL - len(NAMED_SPECIAL))]
        self.special_tokens = {text: len(ranks) + i for i, text in enumerate((*NAMED_SPECIAL, *reserved))}
        self._bpe = tiktoken.Encoding(
            path.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self.n_words = len(ranks) + N_SPECIAL
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = -1
        self.add_bos, self.restarts = True, False

    def encode(self, s: str, continues: bool) -> list[int]:
        return [token for part in _parts(s) for token in self._bpe.encode_ordinary(part)]

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        return self._bpe.decode_single_token_bytes(token)


def _parse(data: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    lines = [line for line in data.splitlines() if line]
    for line in lines:
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            shown = line[:40].decode("ascii", "replace")
            raise ValueError(f"{path} has the line {shown!r}: expected 'base64 rank' in each (truncated?)") from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{path} is damaged: expected {len(lines)} different tokens ranked from 0 without a gap")
    lacking = sum(bytes([byte]) not in ranks for byte in range(256))
    if lacking:
        raise ValueError(f"{path} is damaged: it lacks {lacking} of the 256 single bytes")
    return ranks


def _parts(s: str) -> Iterator[str]:
    """s in parts that tiktoken can take, cut where Meta's Llama 3 cuts."""
    if len(s) <= MAX_RUN:
        yield s
        return
    for i in range(0, len(s), MAX_CHARS):
        part, start = s[i : i + MAX_CHARS], 0
        for run in RUNS.finditer(part):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]
