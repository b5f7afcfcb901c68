"""Write a checkpoint's tokenizer into another format: files are copied where both formats have them, else made.

What is made goes through one form, the keys of a GGUF file's metadata, and must give the same ids on probe texts.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.export.streaming_writers import write_json
from llama.checkpoint.export.tokenizer_json import tokenizer_config, tokenizer_json
from llama.checkpoint.export.tokenizer_keys import keys_of_json
from llama.checkpoint.export.tokenizer_model import metadata_of, sentencepiece_model, tiktoken_model
from llama.tokenizer import Tokenizer, find_tokenizer
from llama.tokenizer.hf_config import read_object
from llama.tokenizer.tekken import is_tekken

log = logging.getLogger("llama")

FolderFormat = Literal["meta", "hf"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What a folder may have beside them.
TOKENIZER_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

PROBES = (
    "Hello world, it's the 2nd of May 2024; we'll pay $1,234.56 -- DON'T.\n\n\n   \tdef f(x):\r\n\treturn x ** 2 # ok ",
    "Zürich naïve e\u0301 İstanbul Привет Γειά שלום مرحبا नमस्ते สวัสดี 你好，世界！ こんにちは 안녕 👩‍👩‍👧 🇫🇷 \U00020bb7",
    "  leading spaces, aaaaaaaa bbbbbbb 111111111 ======== \x00\x01\x7f\x85\ufffd\u00a0\u3000",
    "",
    " ",
)


@dataclass(frozen=True)
class TokenizerSource:
    """Describe a tokenizer that is to be written: as the files it comes in, or as GGUF metadata, or both."""

    tokenizer: Tokenizer
    path: Path | None  # tokenizer.model or tokenizer.json
    metadata: Mapping[str, Any] | None  # None: the files can only be copied

    @property
    def is_sentencepiece(self) -> bool:
        return self.metadata is not None and self.metadata.get("tokenizer.ggml.model") == "llama"

    def gguf_metadata(self) -> Mapping[str, Any]:
        """Return the tokenizer as GGUF metadata; raise ValueError where that cannot express it."""
        if self.metadata is not None:
            return self.metadata
        assert self.path is not None

        def check(written: Tokenizer, adapt: Callable[[str], str]) -> None:
            _check_same(self.tokenizer, written, "GGUF form", adapt)

        return keys_of_json(self.path, self.tokenizer, check)


def tokenizer_source(checkpoint: Checkpoint, path: Path | None = None) -> TokenizerSource:
    """Return the tokenizer of a checkpoint, or of a file or folder; raise FileNotFoundError when there is none."""
    if path is None and checkpoint.tokenizer_metadata is not None:
        return TokenizerSource(checkpoint.tokenizer(), None, checkpoint.tokenizer_metadata)
    path = find_tokenizer(path or checkpoint.path) if path is None or path.is_dir() else path
    tokenizer = Tokenizer(path)
    if not _is_json(path):
        return TokenizerSource(tokenizer, path, metadata_of(path, tokenizer))
    if is_tekken(read_object(path.read_bytes(), str(path))):  # which neither of the other formats has
        return TokenizerSource(tokenizer, None, metadata_of(path, tokenizer))
    return TokenizerSource(tokenizer, path, None)


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16).lstrip().startswith(b"{")


def write_tokenizer(source: TokenizerSource, folder: Path, format: FolderFormat) -> None:
    """Write the files of a tokenizer to a folder; raise ValueError when its format has none with the same ids."""
    if source.path is not None:
        _copy(source.path, folder, format)
    if format == "hf" and source.metadata is not None and not (folder / "tokenizer.json").exists():
        _write_hf(source, folder)
    elif format == "meta" and not (folder / "tokenizer.model").exists():
        _write_meta(source, folder)


def _copy(path: Path, folder: Path, format: FolderFormat) -> None:
    """Copy the tokenizer's own files; for Meta's format, of the two main ones tokenizer.model alone if it is there."""
    if path.name not in TOKENIZER_FILES:
        shutil.copyfile(path, folder / TOKENIZER_FILES[not _is_json(path)])
        return
    model = path.with_name("tokenizer.model")
    main = (model.name,) if format == "meta" and model.is_file() else TOKENIZER_FILES
    for name in (*main, *TOKENIZER_SIDE_FILES):
        if path.with_name(name).is_file():
            shutil.copyfile(path.with_name(name), folder / name)


def _write_hf(source: TokenizerSource, folder: Path) -> None:
    """Write a tokenizer.json, and a tokenizer.model for SentencePiece, which suffices where no json is the same."""
    assert source.metadata is not None
    if source.is_sentencepiece and not (folder / "tokenizer.model").exists():
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(source.metadata))
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    had_config = config_path.exists()
    try:
        write_json(path, tokenizer_json(source.metadata, source.tokenizer), indent=1)
        if not had_config:
            write_json(config_path, tokenizer_config(source.metadata, source.tokenizer))
        _check_same(source.tokenizer, Tokenizer(path), path.name)
    except ValueError as error:
        if not (folder / "tokenizer.model").exists():
            raise
        log.warning("no tokenizer.json is written, tokenizer.model alone: %s", error)
        path.unlink(missing_ok=True)
        if not had_config:
            config_path.unlink(missing_ok=True)


def _write_meta(source: TokenizerSource, folder: Path) -> None:
    """Write a tokenizer.model where there can be one, else a tokenizer.json."""
    path, template = folder / "tokenizer.model", source.tokenizer.chat_template
    if source.is_sentencepiece:
        assert source.metadata is not None
        path.write_bytes(sentencepiece_model(source.metadata))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        _check_same(source.tokenizer, Tokenizer(path), path.name)
    elif not _write_tiktoken(source.tokenizer, path):
        log.info("this tokenizer has no form as a tokenizer.model: a tokenizer.json is written, for this package alone")
        if source.metadata is not None:
            _write_hf(source, folder)
    elif template is not None and source.path is None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_tiktoken(tokenizer: Tokenizer, path: Path) -> bool:
    """Write a tokenizer.model of Llama 3's kind; return False, and write none, when none has the same ids."""
    model = tiktoken_model(tokenizer)
    if model is None:
        return False
    path.write_bytes(model)
    try:
        _check_same(tokenizer, Tokenizer(path), path.name)
    except ValueError:
        path.unlink()
        return False
    path.with_name("tokenizer.json").unlink(missing_ok=True)
    return True


def _check_same(tokenizer: Tokenizer, written: Tokenizer, what: str, adapt: Callable[[str], str] = str) -> None:
    """Raise ValueError unless what was written gives the same ids on probe texts, which are adapted before."""
    for name in ("n_words", "bos_id", "eos_id", "add_bos"):
        found, expected = getattr(written, name), getattr(tokenizer, name)
        if found != expected:
            raise ValueError(f"a {what} of this tokenizer has {name} {found!r}, not {expected!r}")
    # SentencePiece's unknown piece is no control token, which some files of transformers make it.
    control, others = (set(each.special_tokens.values()) for each in (written, tokenizer))
    if (control ^ others) - {tokenizer.special_tokens.get("<unk>")}:
        raise ValueError(f"a {what} of this tokenizer has other control tokens")
    for text in (*map(adapt, PROBES), *tokenizer.special_tokens):
        if written.encode(text, bos=False, eos=False) != tokenizer.encode(text, bos=False, eos=False):
            raise ValueError(f"a {what} of this tokenizer gives other ids for {text[:40]!r}")
