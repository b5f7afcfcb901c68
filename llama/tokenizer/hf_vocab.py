"""Hugging Face's `tokenizer.json`, run by the `tokenizers` library.

The library is given the vocabulary with its control tokens taken out of reach, so that no text can become one.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llama.tokenizer.hf_config import AddedToken, TokenizerConfig, parse_id, read_object
from llama.tokenizer.hf_decoder import PieceDecoder, bos_of_template, check_patterns, restarts, without_prefix
from llama.tokenizer.vocab import MARKERS

# What a file without a tokenizer_config.json beside it calls them.
CONVENTIONAL = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<|startoftext|>"),
    "eos_token": ("<|end_of_text|>", "</s>", "<|endoftext|>"),
    "pad_token": (),
}


class HuggingFaceVocab:
    """Ids as in transformers with split_special_tokens=True, decoded as transformers decodes without skipping.

    add_bos is what the file's post-processor says, as in transformers, where add_bos_token of tokenizer_config.json
    counts for a tokenizer.model alone. An EOS that it puts after a text is left out: a completion could not go on.
    A tokenizer_class LlamaTokenizer makes transformers 5 rebuild the pipeline from the vocabulary; here the file's own
    runs, which encodes a text that begins with a space as Meta's SentencePiece does.
    """

    def __init__(self, data: bytes, name: str, config: TokenizerConfig) -> None:
        """name: where data comes from, for errors."""
        content = read_object(data, name)
        self._name = name
        try:
            with _library_errors():
                self._load(content, config)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is JSON, but no tokenizer that works here: {error}") from None

    def _load(self, content: dict[str, Any], config: TokenizerConfig) -> None:
        model = content.get("model")
        if not isinstance(model, dict):
            raise ValueError(f"its model is {model!r:.60}: expected an object")
        trained = _trained(model)
        added = _added(content, config, trained)
        ids = trained | {token.content: number for number, token in added.items()}
        self._pieces = {number: text for text, number in trained.items()}
        self._added = {number: token.content for number, token in added.items()}
        self.n_words = max(ids.values()) + 1

        post_processor = content.get("post_processor")
        begin = bos_of_template(post_processor)
        if begin is not None and begin not in ids:
            raise ValueError(f"its post_processor begins a text with {begin!r}, which is no token")
        control = {text for text in (*MARKERS, *config.specials) if text in ids}
        control |= {token.content for token in added.values() if token.is_control}
        self.add_bos = begin is not None
        self.bos_id, self.eos_id, self.pad_id = (_named(key, config, control, ids) for key in CONVENTIONAL)
        if begin is not None:
            self.bos_id = ids[begin]
            control.add(begin)
        unknown = _unknown(model)
        if unknown is not None and unknown not in trained:
            raise ValueError(f"its unk_token {unknown!r} is no piece of its vocabulary")
        # What text that no piece fits becomes is no control token. Where it has another use as well, as in GPT-2's
        # files, such text is dropped; Unigram cannot do that.
        if unknown in control and (_kind(model) == "BPE" and (ids[unknown] in (self.bos_id, self.eos_id))):
            unknown = None
        control -= {unknown}
        self.special_tokens = {text: ids[text] for text in sorted(control, key=ids.__getitem__)}

        in_text = [token for token in added.values() if token.content not in control and token.content != unknown]
        hidden = control if unknown is None else control | {unknown}
        normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
        check_patterns(normalizer, pre_tokenizer)
        self._decoder = PieceDecoder.parse(content.get("decoder"), normalizer, pre_tokenizer)
        self.restarts, self._keeps_start = restarts(normalizer, pre_tokenizer), False
        pieces = _model(model, trained, hidden, unknown)
        plain = without_prefix(normalizer), without_prefix(pre_tokenizer)
        self._middle = _pipeline(pieces, in_text, *plain)
        self._begin = self._middle
        if config.is_llama and config.add_prefix_space is False:
            self.restarts, self._keeps_start = False, True
        elif plain != (normalizer, pre_tokenizer):
            self._begin = _pipeline(pieces, in_text, normalizer, pre_tokenizer)
        # The library numbers what it adds from the size of the vocabulary on.
        self._number = {self._middle.token_to_id(token.content): ids[token.content] for token in in_text}
        taken = [number for number, own in self._number.items() if number != own and number in self._pieces]
        if taken:
            raise ValueError(f"its vocabulary has gaps, so that an added token takes the id {taken[0]} of a piece")

    def encode(self, s: str, continues: bool) -> list[int]:
        pipeline = self._middle if continues else self._begin
        try:
            with _library_errors():
                ids = pipeline.encode(s, add_special_tokens=False).ids
        except ValueError as error:
            raise ValueError(f"{self._name} cannot encode this text: {error}") from None
        return [self._number.get(token, token) for token in ids] if self._number else ids

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        """Control tokens are their own text; an id without a token, in a gap, is nothing."""
        at_start = at_start and not self._keeps_start
        if token in self._added:
            return self._decoder.decode(self._added[token], at_start, added=True)
        return self._decoder.decode(self._pieces.get(token, ""), at_start, added=False)


@contextmanager
def _library_errors() -> Iterator[None]:
    """The library's plain exceptions and panics, which are no Exception in Python, as ValueError."""
    try:
        yield
    except (ValueError, RecursionError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(str(error).partition("\n")[0][:300] or type(error).__name__) from None
        raise


def _kind(model: dict[str, Any]) -> str:
    """Older files leave out the type."""
    return model.get("type") or ("BPE" if "merges" in model else "Unigram")


def _trained(model: dict[str, Any]) -> dict[str, int]:
    """Ids of the vocabulary's pieces by text; ValueError unless both are unique."""
    kind, vocab = _kind(model), model.get("vocab")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"its model has the type {kind!r:.60}: supported are BPE and Unigram")
    if not isinstance(vocab, dict if kind == "BPE" else list) or not vocab:
        raise ValueError(f"the vocab of its {kind} model is {vocab!r:.60}")
    if isinstance(vocab, list):
        wrong = [entry for entry in vocab if not (isinstance(entry, list) and len(entry) == 2 and _scored(*entry))]
        if wrong:
            raise ValueError(f"its vocab has {wrong[0]!r:.60}: expected a text and a score")
        pairs = [(text, number) for number, (text, _) in enumerate(vocab)]
    else:
        pairs = [(text, parse_id(number, f"the id of {text!r:.60} in its vocab")) for text, number in vocab.items()]
    trained = dict(pairs)
    if len(trained) < len(pairs):
        raise ValueError("its vocab has a text twice")
    if len(set(trained.values())) < len(trained):
        raise ValueError("its vocab has an id twice")
    try:
        "".join(trained).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its vocab is no valid Unicode: {error.reason}") from None
    return trained


def _scored(text: Any, score: Any) -> bool:
    return isinstance(text, str) and isinstance(score, (int, float)) and abs(score) < 1e30


def _added(content: dict[str, Any], config: TokenizerConfig, trained: Mapping[str, int]) -> dict[int, AddedToken]:
    """Added tokens by id: the file's, then those that only the files beside it have.

    The library goes by their order and ignores the ids it reads; a file where the two differ is refused.
    """
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("its added_tokens are no list of objects")
    stated = [
        (parse_id(entry.get("id"), "the id of an added token"), AddedToken.parse(entry, "an added token"))
        for entry in entries
    ]
    known = {token.content for _, token in stated}
    stated += [
        (trained.get(token.content, number), token)
        for number, token in sorted(config.added.items())
        if token.content not in known
    ]
    special = {token.content for token in config.added.values() if token.special} | config.specials
    added: dict[int, AddedToken] = {}
    numbers: dict[str, int] = {}
    following = len(trained)
    for number, token in stated:
        token.content.encode()
        expected = trained.get(token.content, numbers.get(token.content, following))
        if number != expected:
            raise ValueError(f"added token {token.content!r:.60} has the id {number}: expected {expected}")
        numbers[token.content] = number
        following = max(following, number + 1)
        control = token.special or token.content in special
        added[number] = AddedToken(
            token.content, control, token.normalized, token.single_word, token.lstrip, token.rstrip
        )
    return added


def _named(key: str, config: TokenizerConfig, control: set[str], ids: Mapping[str, int]) -> int:
    if key in config.named:
        return ids.get(config.named[key] or "", -1)
    return next((ids[text] for text in CONVENTIONAL[key] if text in control), -1)


def _unknown(model: dict[str, Any]) -> str | None:
    """The piece that stands for text that no piece fits."""
    if _kind(model) == "BPE":
        unknown = model.get("unk_token")
        if unknown is not None and not isinstance(unknown, str):
            raise ValueError(f"its unk_token is {unknown!r:.60}: expected text")
        return unknown or None
    number = model.get("unk_id")
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(model["vocab"]):
        raise ValueError(f"its unk_id is {number!r:.60}: it has {len(model['vocab'])} pieces")
    return model["vocab"][number][0]


def _model(model: dict[str, Any], trained: dict[str, int], hidden: set[str], unknown: str | None) -> Any:
    """The library's model, in which no text reaches the hidden pieces, under names that nobody can guess."""
    from tokenizers import models

    secret = secrets.token_hex(16)
    names = {text: f"{secret}{number}" if text in hidden else text for text, number in trained.items()}
    flags = {key: model.get(key) or False for key in ("fuse_unk", "byte_fallback", "ignore_merges")}
    wrong = [key for key, value in flags.items() if not isinstance(value, bool)]
    if wrong:
        raise ValueError(f"its {wrong[0]} is {flags[wrong[0]]!r:.60}: expected true or false")
    if _kind(model) == "Unigram":
        vocab = [(names[text], float(score)) for text, score in model["vocab"]]
        return models.Unigram(vocab, model.get("unk_id"), flags["byte_fallback"])
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its {key} is {model[key]!r:.60}: supported is none")
    merges = [(a, b) for a, b in _merges(model, trained) if not (a in hidden or b in hidden or a + b in hidden)]
    return models.BPE(
        vocab={names[text]: number for text, number in trained.items()},
        merges=merges,
        unk_token=names[unknown] if unknown is not None else None,
        **flags,
    )


def _pipeline(pieces: Any, in_text: list[AddedToken], normalizer: Any, pre_tokenizer: Any) -> Any:
    """The library's tokenizer of text; pieces, its model, is shared and not copied."""
    import tokenizers

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    frame = {"version": "1.0", "model": empty, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    frame |= {"added_tokens": [], "post_processor": None, "decoder": None}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(frame))
    tokenizer.model = pieces
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(
                token.content,
                normalized=token.normalized,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
            )
            for token in in_text
        ]
    )
    return tokenizer


def _merges(model: dict[str, Any], trained: Mapping[str, int]) -> list[tuple[str, str]]:
    """Checked here, because the library panics on some of these."""
    entries = model.get("merges")
    if not isinstance(entries, list):
        raise ValueError(f"its merges are {entries!r:.60}: expected a list")
    merges = []
    for entry in entries:
        pair = entry.split(" ") if isinstance(entry, str) else entry  # text in older files
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise ValueError(f"its merges have {entry!r:.60}: expected two pieces")
        a, b = pair
        if not (a in trained and b in trained and a + b in trained):
            raise ValueError(f"its merges have {entry!r:.60}: expected two pieces that join to a third")
        merges.append((a, b))
    return merges
