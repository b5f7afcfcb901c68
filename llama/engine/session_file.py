"""Pages of a cache in a file: those of one text on this rank, and back into an engine as if it had computed them.

Knows what identifies a model whose keys they are; nothing of dialogs or of terminals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from llama.cache import pages_for
from llama.checkpoint import StoredCheckpoint
from llama.checkpoint.base import dtype_name
from llama.engine.build import open_source
from llama.engine.engine import Engine
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams

PAGES_FORMAT = "llama pages 1"
MOST_HEADER = 1 << 26  # bytes; a million tokens have 8 MB
PAGES_READ_AT_ONCE = 1 << 22

# Options that say how a model is run and not which one it is, or that are looked at in what they lead to.
NO_IDENTITY = (
    "ckpt_dir", "tokenizer_path", "max_seq_len", "max_batch_size", "model_parallel_size", "seed", "device", "dtype",
    "chat_format", "chat_template", "template_kwargs", "compile", "speculate", "draft_ckpt_dir",
    "draft_quantize", "timeout",
)  # fmt: skip


def model_identity(options: BuildOptions) -> dict[str, str]:
    """Return what two models must have in common so that the keys of one are those of the other, in words.

    Opens the files and reads a row of each tensor. Raises ValueError or OSError for wrong files, as a build does.
    """
    source = open_source(options)
    args = dataclasses.replace(source.args, max_seq_len=1, max_batch_size=1)
    tokenizer = source.tokenizer
    identity = {
        "architecture": str(args),
        "weights": weights_fingerprint(source.checkpoint),
        "tokenizer": f"{tokenizer.n_words} tokens, ending at {sorted(tokenizer.stop_tokens)}",
        "dtype": dtype_name(source.weight_format.dtype),
    }
    for field in dataclasses.fields(options):
        if field.name not in NO_IDENTITY and getattr(options, field.name) != field.default:
            identity[field.name] = str(getattr(options, field.name))
    return identity


def weights_fingerprint(checkpoint: StoredCheckpoint) -> str:
    """Return a hash of the names, shapes and storage of all tensors, and of the middle row of each as it is stored."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        shape = checkpoint.shape(name)
        middle = shape[0] // 2 if len(shape) > 1 else 0
        part = (0, middle, middle + 1 if len(shape) > 1 else shape[0])
        is_block = checkpoint.block_type(name) is not None
        row = checkpoint.read_blocks(name, *part) if is_block else checkpoint.read(name, *part)
        digest.update(f"{name} {shape} {checkpoint.stored_as(name)}\n".encode())
        digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
        checkpoint.release(name)
    return digest.hexdigest()[:32]


def digest_of(identity: Mapping[str, str]) -> str:
    """Return a hash of a model's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that only its owner reads, and that takes the place of the one at the path when it is complete."""
    path = path.resolve()  # what a link names is replaced, not the link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it, or name another file")
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def write_pages(path: Path, engine: Engine, tokens: Sequence[int], mark: str) -> tuple[int, int]:
    """Write the pages that hold the beginning of a text on this rank; return how many tokens, and the file's bytes.

    mark: whose they are, as `StoredPages.mark` says later. No step may be in flight. Writes nothing where the
    engine has computed nothing yet.
    """
    if not engine.scheduler.caches:
        return 0, 0
    match = engine.scheduler.pool.find(tokens)
    pages = [*match.pages, *([match.partial] if match.partial is not None and match.partial_len else [])]
    cache = engine.scheduler.caches[0]
    n_layers, _, *shape = cache.keys.shape
    header = {
        "format": PAGES_FORMAT,
        "mark": mark,
        "part": _part(engine),
        "tokens": list(tokens[: match.n_tokens]),
        "dtype": dtype_name(cache.keys.dtype),
        "shape": [n_layers, len(pages), *shape],
    }
    line = json.dumps(header).encode() + b"\n"
    index = torch.tensor(pages, dtype=torch.int64, device=cache.keys.device)
    with new_file(path) as file:
        file.write(line)
        checksum = zlib.crc32(line)
        for layer in range(n_layers):
            for half in (cache.keys, cache.values):
                data = half[layer][index].cpu().view(torch.uint8).numpy().data
                checksum = zlib.crc32(data, checksum)
                file.write(data)
        file.write(checksum.to_bytes(4, "little"))
        return match.n_tokens, file.tell()


@dataclass(frozen=True)
class StoredPages:
    """The pages of a text in a file whose content was checked: see `write_pages`.

    part: the rank's number among those that shared the model, and theirs. shape: (n_layers, n_pages, PAGE_SIZE,
    n_local_kv_heads, head_dim) of keys, and of values.
    """

    path: Path
    mark: str
    part: list[int]
    tokens: list[int]
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of the first layer's keys, which its values follow

    @staticmethod
    def open(path: Path) -> StoredPages:
        """Read the header and check the whole; ValueError where the file is torn, or something else."""
        with path.open("rb") as file:
            line = file.readline(MOST_HEADER)
            header = _header(line)
            if header is None:
                raise ValueError(f"{path} holds no pages of a cache: give another file, or move it away")
            dtype, shape = getattr(torch, header["dtype"]), tuple(header["shape"])
            size = len(line) + 2 * math.prod(shape) * dtype.itemsize + 4
            checksum, left = zlib.crc32(line), size - len(line) - 4
            while left and (data := file.read(min(left, PAGES_READ_AT_ONCE))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
            if left or file.read() != checksum.to_bytes(4, "little"):
                raise ValueError(
                    f"{path} is torn ({path.stat().st_size} bytes, its header says {size}): remove it, and the "
                    "conversation is read again"
                )
        return StoredPages(path, header["mark"], header["part"], header["tokens"], dtype, shape, len(line))

    def fits(self, engine: Engine) -> bool:
        """Tell whether they are this rank's part of the keys: not where other ranks, or more, shared the model."""
        return self.part == _part(engine)

    def restore(self, engine: Engine) -> int:
        """Have an engine that runs nothing find these pages, as many as its max_seq_len has; return their tokens.

        Raises ValueError, on every rank, where there is no memory for them.
        """
        tokens = self.tokens[: engine.model.args.max_seq_len]
        if not tokens:
            return 0
        request = engine.add(tokens, SamplingParams(max_gen_len=0))  # so that there is room for as many
        scheduler = engine.scheduler
        with torch.inference_mode():
            scheduler.is_consistent = False
            engine.room.open()
            self._fill(engine, scheduler.adopt(engine.requests[request]))
            scheduler.is_consistent = True
        engine.cancel(request)  # whose pages are kept
        return len(tokens)

    def _fill(self, engine: Engine, pages: Sequence[int]) -> None:
        cache = engine.scheduler.caches[0]
        index = torch.tensor(pages, dtype=torch.int64, device=cache.keys.device)
        layer_shape = self.shape[1:]
        n_bytes = math.prod(layer_shape) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start)
            for layer in range(self.shape[0]):
                for half in (cache.keys, cache.values):
                    stored = torch.frombuffer(bytearray(file.read(n_bytes)), dtype=self.dtype).view(layer_shape)
                    half[layer].index_copy_(0, index, stored[: len(pages)].to(half.device))


def _part(engine: Engine) -> list[int]:
    return [engine.model.parallel.rank, engine.model.parallel.size]


def _header(line: bytes) -> dict[str, Any] | None:
    """Return what the first line of a file of pages says, None where it is no such line."""
    try:
        header = json.loads(line)
        is_right = (
            header["format"] == PAGES_FORMAT
            and isinstance(header["mark"], str)
            and isinstance(header["part"], list)
            and isinstance(getattr(torch, header["dtype"]), torch.dtype)
            and len(header["shape"]) == 5
            and all(isinstance(each, int) and each >= 0 for each in [*header["shape"], *header["tokens"]])
            and header["shape"][1] == pages_for(len(header["tokens"]))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return header if is_right else None
