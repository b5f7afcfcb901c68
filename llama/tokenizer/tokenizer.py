"""`Tokenizer`: one interface for every kind of tokenizer file, which is told by its content."""

import copy
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llama.tokenizer.added_tokens_vocab import AddedTokensVocab
from llama.tokenizer.gguf_bpe_vocab import GGUFBytePairVocab
from llama.tokenizer.gguf_tokens import GGUFTokens
from llama.tokenizer.hf_config import TokenizerConfig, read_object
from llama.tokenizer.hf_vocab import HuggingFaceVocab
from llama.tokenizer.meta_names import MetaNames
from llama.tokenizer.sentencepiece_vocab import SentencePieceVocab, proto_from_gguf
from llama.tokenizer.stream import StreamDecoder
from llama.tokenizer.tekken import is_tekken, read_tekken
from llama.tokenizer.tiktoken_vocab import read_tiktoken
from llama.tokenizer.vocab import END_TOKENS, Vocab

log = logging.getLogger("llama")

EXPECTED = (
    "expected a SentencePiece model (Llama 1 and 2), a tiktoken file with lines of 'base64 id' (Llama 3), Hugging "
    "Face's tokenizer.json, or Mistral's tekken.json"
)
MAX_TOKENIZER_BYTES = 64 << 20  # The largest known file has 33 MB; weights given by mistake are not read.
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s")
NOT_TOKENIZERS = (  # the first bytes of other files, and what those are
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (git lfs pull fetches it)"),
    (b"GGUF", "a GGUF file, which holds its own tokenizer: give it as the checkpoint"),
    (b"PK\x03\x04", "a zip archive, perhaps weights"),
    (b"\x80", "a pickle, perhaps weights"),
    (b"<", "HTML or XML, perhaps a web page saved in place of the file"),
    (b"[", "a JSON list, and no object"),
)


class Tokenizer(MetaNames):
    """Text to token ids and back, by Meta's interface, for every kind of tokenizer.

    n_words: the largest id + 1, added tokens included.
    n_trained: the same without added tokens, for which weights may have no rows.
    bos_id, eos_id, pad_id: -1 when there is none.
    add_bos: whether a plain completion prompt begins with BOS.
    special_tokens: the ids of control tokens by text. Code Llama's are "▁<PRE>", "▁<SUF>", "▁<MID>" and "▁<EOT>".
    stop_tokens: every id that ends a generation; `with_stop_tokens` adds to them.
    prefix_space_after_special: whether the text after a control token begins with a prefix space, as a text of its own
        does (`legacy` in transformers). Where it is False, encode that text with add_prefix_space=False.
    chat_template: the jinja source stored with the tokenizer, None when there is none.
    mistral_version: what the name or the content of Mistral's own files says, such as 3; 0 for all others.
    """

    n_words: int
    n_trained: int
    bos_id: int
    eos_id: int
    pad_id: int
    add_bos: bool
    prefix_space_after_special: bool
    special_tokens: dict[str, int]
    stop_tokens: frozenset[int]
    chat_template: str | None
    mistral_version: int = 0

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        """Open a SentencePiece model, a tiktoken file, a `tokenizer.json` or `tekken.json`, or a folder's one of those.

        Hugging Face's smaller files beside it (tokenizer_config.json and the like) are read as well.
        Raises FileNotFoundError, which says what lies beside the path, and ValueError for any other content.
        """
        path = Path(os.path.expanduser(model_path))
        if path.is_dir():
            path = find_tokenizer(path)
        vocab, chat_template, self.mistral_version = _open(path)
        self._adopt(vocab, stops=(), chat_template=chat_template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Make the tokenizer that a GGUF file holds.

        metadata: the file's keys with plain values, arrays as lists.
        Raises ValueError, which names the key, its value and what is supported.
        """
        tokens = GGUFTokens.from_metadata(metadata)
        vocab: Vocab
        if tokens.model == "llama":
            vocab = SentencePieceVocab(proto_from_gguf(tokens, metadata), "the tokenizer inside the GGUF file")
            vocab.bos_id, vocab.eos_id, vocab.pad_id = tokens.bos_id, tokens.eos_id, tokens.pad_id
            vocab.add_bos = True if tokens.add_bos is None else tokens.add_bos
        else:
            vocab = GGUFBytePairVocab(tokens, metadata)
        if vocab.add_bos and vocab.bos_id < 0:
            raise ValueError("tokenizer.ggml.add_bos_token asks for a BOS, tokenizer.ggml.bos_token_id is missing")
        self = cls.__new__(cls)
        self._adopt(vocab, stops=tokens.stops, chat_template=tokens.chat_template)
        return self

    def _adopt(self, vocab: Vocab, stops: Iterable[int], chat_template: str | None) -> None:
        """Take over what a vocabulary says; stops: ids that end a generation, where they are not -1."""
        self._vocab = vocab
        self.n_words, self.n_trained, self.add_bos = vocab.n_words, vocab.n_trained, vocab.add_bos
        self.prefix_space_after_special = vocab.prefix_space_after_special
        self.bos_id, self.eos_id, self.pad_id = vocab.bos_id, vocab.eos_id, vocab.pad_id
        self.special_tokens = vocab.special_tokens
        named = (token for text, token in vocab.special_tokens.items() if text in END_TOKENS)
        self.stop_tokens = frozenset(token for token in (vocab.eos_id, *stops, *named) if token >= 0)
        self.chat_template = chat_template

    def with_stop_tokens(self, tokens: Collection[int], vocab_size: int) -> "Tokenizer":
        """Return this tokenizer with more ids that end a generation, such as those of generation_config.json.

        vocab_size: the rows of the weights; ids without one, which are never made, are left out with a warning.
        """
        made = {token for token in tokens if 0 <= token < vocab_size}
        if missing := sorted({*tokens} - made):
            log.warning("end token %d is out of range: it is left out, as ids are 0 to %d", missing[0], vocab_size - 1)
        other = copy.copy(self)
        other.stop_tokens = self.stop_tokens | made
        return other

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        add_prefix_space: bool = True,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Return the ids of s as plain text: a control token that s spells is no control id unless it is allowed.

        bos, eos: whether to put BOS before the ids and EOS after them.
        add_prefix_space: whether to put a space before the first word, as SentencePiece does, and a `tokenizer.json`
            that says so. False where s continues a text, as the suffix of Code Llama's infilling does. Other kinds
            put no such space in either case.
        allowed_special: control tokens that s may spell, by their texts, as in Meta's Llama 3.
        disallowed_special: those that raise ValueError where s spells them; "all" is all that are not allowed.
        A lone surrogate is encoded as U+FFFD. Bytes that a byte-level BPE vocabulary lacks are dropped, as by the
        `tokenizers` library (the demo model lacks some control characters).
        """
        for wanted, token, name in ((bos, self.bos_id, "BOS"), (eos, self.eos_id, "EOS")):
            if wanted and token < 0:
                raise ValueError(f"this tokenizer has no {name} token")
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        disallowed = self.special_tokens if disallowed_special == "all" else disallowed_special
        spelled = next((text for text in disallowed if text not in allowed and text in s), None)
        if spelled is not None:
            raise ValueError(f"the text spells the control token {spelled}, which disallowed_special forbids")
        ids: list[int] = []
        # By a pattern with a group, which gives the control tokens between the texts; the longest that matches wins.
        names = [re.escape(text) for text in sorted(allowed, key=len, reverse=True) if text in self.special_tokens]
        for i, part in enumerate(re.split(f"({'|'.join(names)})", s) if names else [s]):
            if i % 2:
                ids.append(self.special_tokens[part])
            elif part:
                prefix_space = add_prefix_space and (i == 0 or self.prefix_space_after_special)
                ids += self._vocab.encode(_valid_unicode(part), prefix_space)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int] | int) -> str:
        """Return the text of tokens, or of one token, with invalid UTF-8 as U+FFFD and without the prefix space.

        Control tokens are nothing for SentencePiece, and their own text for the other kinds, as in Meta's Llama 2 and
        Llama 3. Where bytes are no valid UTF-8, the sentencepiece library writes U+FFFD for each byte; here it is one
        for each broken character, as everywhere else.
        """
        stream = StreamDecoder(self)  # which tells ids that are out of range
        return "".join([stream.push(token) for token in ([t] if isinstance(t, int) else t)]) + stream.flush()

    def stream_decoder(self, add_prefix_space: bool = True) -> StreamDecoder:
        """Return a decoder of one text, token by token, whose ids must be in range; see `StreamDecoder`."""
        return StreamDecoder(self._vocab, add_prefix_space)

    def control_tokens(self, texts: Iterable[str]) -> list[int]:
        """Return the ids of those texts that are control tokens."""
        return [self.special_tokens[text] for text in texts if text in self.special_tokens]

    def has_tokens_of(self, other: "Tokenizer") -> bool:
        """Return whether every id means the same in both."""
        return (self.n_words, self.special_tokens) == (other.n_words, other.special_tokens) and all(
            self.token_bytes(token) == other.token_bytes(token) for token in range(self.n_words)
        )

    def token_bytes(self, token: int, strip_prefix_space: bool = False) -> bytes:
        """Return the bytes that a token adds to a text.

        strip_prefix_space: leave out the space that add_prefix_space put there, as for the first token of a text.
        """
        if not 0 <= token < self.n_words:
            raise ValueError(f"token id {token} is out of range: the tokenizer's n_words is {self.n_words}")
        return self._vocab.token_bytes(int(token), strip_prefix_space)


def find_tokenizer(folder: Path) -> Path:
    """Return the tokenizer file of a folder; FileNotFoundError says what lies there when there is none.

    That is `tokenizer.json` in a Hugging Face folder, which has a config.json too; else `tokenizer.model`, then
    `tokenizer.json`, then Mistral's `tokenizer.model.v3` (the newest of them) and `tekken.json`, then `tokenizer.model`
    in the folder above, where Meta put Llama 1's.
    """
    whole, model = folder / "tokenizer.json", folder / "tokenizer.model"
    hugging_face = [whole] if (folder / "config.json").is_file() else []
    mistral = *sorted(folder.glob("tokenizer.model.v*"), reverse=True), folder / "tekken.json"
    for candidate in (*hugging_face, model, whole, *mistral, folder.parent / "tokenizer.model"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no tokenizer.json or tokenizer.model in {folder}, no tokenizer.model in its parent: {_listing(folder)}; "
        "give one with --tokenizer_path"
    )


def _open(path: Path) -> tuple[Vocab, str | None, int]:
    """Open the vocabulary in a file; return it with the chat template beside it, and Mistral's version."""
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer file {path}: {_listing(path.parent)}")
    if not path.is_file():  # opening a pipe would wait for somebody to write to it
        raise ValueError(f"{path} is a pipe or a device: {EXPECTED}, in a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_TOKENIZER_BYTES + 1)
    is_tiktoken = TIKTOKEN_LINE.match(data) is not None
    is_sentencepiece = data.startswith(b"\n") and bool(data.strip())  # field 1 of a protobuf message: the first piece
    is_json = data.lstrip().startswith(b"{")
    if len(data) > MAX_TOKENIZER_BYTES or not (is_tiktoken or is_sentencepiece or is_json):
        raise ValueError(f"{path} is {_describe(data)}: {EXPECTED}")
    config = TokenizerConfig.read(path.parent)
    if is_tiktoken:
        return read_tiktoken(data, path), config.chat_template, 0
    if is_sentencepiece:
        version = re.search(r"\.model\.v(\d{1,3})", path.name)
        return AddedTokensVocab(data, str(path), config), config.chat_template, int(version[1]) if version else 0
    content = read_object(data, str(path))
    if is_tekken(content):
        vocab = read_tekken(content, str(path))
        version = re.fullmatch(r"v(\d{1,3})", str(content["config"].get("version")))
        return vocab, config.chat_template, int(version[1]) if version else 0
    return HuggingFaceVocab(content, str(path), config), config.chat_template, 0


def _describe(data: bytes) -> str:
    """Say what the content of a file is that is no tokenizer."""
    if not data.strip():
        return "empty"
    if len(data) > MAX_TOKENIZER_BYTES:
        return f"larger than {MAX_TOKENIZER_BYTES >> 20} MiB, perhaps weights"
    return next((what for start, what in NOT_TOKENIZERS if data.lstrip().startswith(start)), "no tokenizer")


def _listing(folder: Path, limit: int = 12) -> str:
    """Say what a folder holds."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds " + (", ".join(names[:limit]) + more or "nothing")


def _valid_unicode(s: str) -> str:
    """Return s with surrogate pairs joined and lone surrogates as U+FFFD: none of the libraries takes them."""
    try:
        s.encode()
    except UnicodeEncodeError:
        return s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return s
