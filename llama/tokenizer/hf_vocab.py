"""Hugging Face's `tokenizer.json`, run by the `tokenizers` library.

The library is given the vocabulary with its control tokens under secret names, so that no text can become one.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llama.tokenizer.hf_config import NAMED_TOKENS, TokenizerConfig, expect, given, parse_added, parse_id
from llama.tokenizer.hf_decoder import (
    bos_of,
    decoder_steps,
    has_prefix_space_after_special,
    library_tokenizer,
    parse_pipeline,
    without_prefix_space,
)
from llama.tokenizer.hf_limits import MAX_PIECES, check_pieces
from llama.tokenizer.vocab import CONTROL_TOKENS, byte_alphabet, parse_merges

# What BOS and EOS are called in a file without a tokenizer_config.json beside it; the last that it has counts.
USUAL_NAMES = [(text, "bos_token") for text in ("<|startoftext|>", "<s>", "<|begin_of_text|>")]
USUAL_NAMES += [(text, "eos_token") for text in ("<|endoftext|>", "</s>", "<|end_of_text|>")]
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceVocab:
    """Encode as transformers does with split_special_tokens=True, and decode as it does without skipping tokens.

    As in transformers, the file's post-processor decides whether a text begins with BOS; an EOS that it puts after a
    text is left out, because a completion could not go on. For LlamaTokenizer, transformers 5 builds a pipeline of its
    own. Here the file's pipeline runs, which encodes a text that begins with a space as Meta's SentencePiece does.
    """

    def __init__(self, content: dict[str, Any], name: str, config: TokenizerConfig) -> None:
        """content: the file, parsed; name: where it comes from, for errors."""
        self._name = name
        with _library_errors(f"{name} is JSON, but no tokenizer that works here"):
            self._load(content, config)

    def _load(self, content: dict[str, Any], config: TokenizerConfig) -> None:
        model = expect(dict, content.get("model"), "its model")
        trained, unknown = trained_pieces(model)
        added = added_tokens(content, config, trained)
        ids = trained | {token.content: number for number, token in added.items()}
        self._texts = {number: text for text, number in ids.items()}
        self._added = added.keys()
        if len(self._texts) < len(ids):
            raise ValueError("its vocab has an id twice")
        self.n_words, self.n_trained = max(self._texts) + 1, max(trained.values()) + 1

        pipeline = parse_pipeline(content)
        bos = bos_of(pipeline)
        if bos is not None and bos not in self._texts:
            raise ValueError(f"its post_processor begins a text with the id {bos}, which is no token")
        special = {*CONTROL_TOKENS, *config.specials, *(token.content for token in added.values() if token.special)}
        control = {*special, self._texts.get(bos)} & ids.keys()
        named = {key: text for text, key in USUAL_NAMES if text in control} | dict(config.named)
        named |= {} if bos is None else {"bos_token": self._texts[bos]}
        self.bos_id, self.eos_id, self.pad_id = (ids.get(named.get(key), -1) for key in NAMED_TOKENS[:3])
        self.add_bos = bos is not None
        hidden = {*control, unknown}
        # What text that no piece fits becomes is no control token. Where it has another use as well, as in GPT-2's
        # files, such text is dropped; Unigram cannot do that.
        if unknown in control and model["type"] == "BPE" and ids[unknown] in (self.bos_id, self.eos_id):
            unknown = None
        self.special_tokens = {text: ids[text] for text in sorted(control - {unknown}, key=ids.__getitem__)}

        names = {text: secrets.token_hex(16) if text in hidden else text for text in ids}
        tokens = [names[token.content] if token.content in hidden else token for token in added.values()]
        library_model = _library_model(model, names, unknown)
        # transformers' own Llama class goes by tokenizer_config.json here, also for the space that decoding strips.
        self._has_prefix_space = not (config.is_llama and config.add_prefix_space is False)
        pipeline["decoder"] = decoder_steps(pipeline)
        self._decoder_kinds = {step["type"] for step in pipeline["decoder"]}
        plain = without_prefix_space(pipeline)
        pipeline = pipeline if self._has_prefix_space else plain
        self.prefix_space_after_special = has_prefix_space_after_special(pipeline)
        self._with_prefix_space = library_tokenizer(pipeline, library_model, tokens)
        self._without_prefix_space = library_tokenizer(plain, library_model, tokens)
        for number, token in added.items():  # The library numbers them by their order, whatever the file says.
            found = self._with_prefix_space.token_to_id(names[token.content])
            if found != number:
                raise ValueError(f"added token {token.content!r:.60} has the id {number}: expected {found}")

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        tokenizer = self._with_prefix_space if add_prefix_space else self._without_prefix_space
        with _library_errors(f"{self._name} cannot encode this text"):
            return list(tokenizer.encode(s, add_special_tokens=False).ids)

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return a token's bytes. A control token is its own text, and an id without a token, in a gap, is nothing.

        The library decodes to text, with U+FFFD for bytes that are no valid UTF-8. Here those bytes are kept, because
        the next token may complete the character.
        """
        piece, kinds, decode = self._texts.get(token, ""), self._decoder_kinds, self._with_prefix_space.decoder.decode
        if token in self._added and "ByteLevel" in kinds:
            return piece.encode()  # which the library takes for a spelling of bytes
        first = strip_prefix_space and self._has_prefix_space
        text: str = decode([piece]) if first else decode(["a", piece])[len(decode(["a"])) :]
        if "\ufffd" in text and "ByteFallback" in kinds and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if "\ufffd" in text and "ByteLevel" in kinds and all(char in byte_alphabet() for char in piece):
            return bytes(byte_alphabet()[char] for char in piece)
        return text.encode()


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Raise any error as a ValueError of one line, also the library's panics, which are no Exception in Python."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ValueError(f"{what}: {said}") from None


def trained_pieces(model: dict[str, Any]) -> tuple[dict[str, int], str | None]:
    """Return the ids of the vocabulary's pieces by text, and the piece for text that no other piece fits."""
    kind = model["type"] = model.get("type") or ("BPE" if "merges" in model else "Unigram")  # Older files have none.
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"its model has the type {kind!r:.60}: supported are BPE and Unigram")
    vocab: Any = expect(dict if kind == "BPE" else list, model.get("vocab"), "its vocab")
    pairs = vocab.items() if kind == "BPE" else ((text, number) for number, text in enumerate(map(_scored_text, vocab)))
    trained = {expect(str, text, "a piece"): parse_id(i, f"the id of {text!r:.60} in its vocab") for text, i in pairs}
    if len(trained) < len(vocab) or not vocab:
        raise ValueError("its vocab is empty or has a text twice")
    "".join(trained).encode()  # UnicodeEncodeError for half a surrogate pair
    check_pieces(trained, "its vocab has")
    unknown = model.get("unk_token") or None
    if kind == "Unigram" and model.get("unk_id") is not None:
        unknown = {i: text for text, i in trained.items()}.get(model["unk_id"], model["unk_id"])
    if unknown is not None and unknown not in trained:
        raise ValueError(f"its unknown piece {unknown!r:.60} is not in its vocab")
    return trained, unknown


def _scored_text(entry: Any) -> str:
    """Return the text of an entry of a Unigram vocabulary; ValueError unless it is a list of a text and its score."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        raise ValueError(f"its vocab has {entry!r:.60}: expected a list of a text and its score")
    return entry[0]


def added_tokens(content: dict[str, Any], config: TokenizerConfig, trained: Mapping[str, int]) -> dict[int, Any]:
    """Return added tokens by id: the file's, then those that only the files beside it have."""
    where = "an added token"
    entries = expect(list, given(content, "added_tokens", []), "its added_tokens")
    added = parse_added(((expect(dict, entry, where).get("id"), entry) for entry in entries), where)
    known = {token.content for token in added.values()}
    others = {number: token for number, token in sorted(config.added.items()) if token.content not in known}
    return added | {trained.get(token.content, number): token for number, token in others.items()}


def _library_model(model: dict[str, Any], names: Mapping[str, str], unknown: str | None) -> Any:
    """Return the library's model, in which each piece has the name given."""
    from tokenizers import models

    keys = ("byte_fallback", "fuse_unk", "ignore_merges")
    flags = {key: expect(bool, given(model, key, False), f"its {key}") for key in keys}
    if model["type"] == "Unigram":
        pieces = [(names[text], score) for text, score in model["vocab"]]
        return models.Unigram(pieces, model.get("unk_id"), flags["byte_fallback"])
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r:.60}: supported is none")
    merges = expect(list, model.get("merges"), "its merges")
    if len(merges) > MAX_PIECES:
        raise ValueError(f"its merges have {len(merges)} entries: the limit is {MAX_PIECES}")
    merges = parse_merges(merges, model["vocab"], "its merges have")
    return models.BPE(
        vocab={names[text]: number for text, number in model["vocab"].items()},
        merges=[(a, b) for a, b in merges if names[a] == a and names[b] == b and names[a + b] == a + b],
        unk_token=names.get(unknown or ""),
        **flags,
    )
