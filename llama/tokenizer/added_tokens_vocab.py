"""A Hugging Face folder's `tokenizer.model`: SentencePiece and the tokens that the files beside it add."""

import re

from llama.tokenizer.hf_config import AddedToken, TokenizerConfig
from llama.tokenizer.sentencepiece_vocab import SentencePieceVocab

MAX_IN_TEXT = 5000  # all are tried at each place of a text; the most known are some 400


class AddedTokensVocab:
    """SentencePiece's own ids for plain text, as in transformers' LlamaTokenizer up to version 4, and added tokens.

    Added tokens that are not special are found in text. With legacy (where the files say nothing, as then) the text
    after one begins with the implicit space, else it does not. transformers 5 converts the model to a `tokenizers`
    pipeline instead, which takes the implicit space away from a text that begins with a space of its own.
    """

    def __init__(self, proto: bytes, name: str, config: TokenizerConfig) -> None:
        self._pieces = SentencePieceVocab(proto, name)
        ids, unk_id = self._pieces.ids(), self._pieces.unk_id
        # A text that is a piece already keeps the piece's id.
        added = {ids.get(token.content, number): token for number, token in config.added.items()}
        added.pop(unk_id, None)
        control = {
            n: token.content for n, token in added.items() if token.is_control or token.content in config.specials
        }
        control |= {ids[text]: text for text in config.specials if ids.get(text, unk_id) != unk_id}
        in_text = {number: token for number, token in added.items() if number not in control}
        self._added = {number: token.content for number, token in in_text.items() if token.content not in ids}
        hidden = {*control, *self._added} - {*self._pieces.special_tokens.values()}
        if any(number < self._pieces.n_words for number in hidden):
            self._pieces = SentencePieceVocab(proto, name, hidden)

        self.n_words = max([self._pieces.n_words, *(number + 1 for number in added)])
        own = {
            text: number for text, number in self._pieces.special_tokens.items() if number not in hidden | {*control}
        }
        self.special_tokens = own | {text: number for number, text in control.items()}
        ids |= {token.content: number for number, token in added.items()}

        def named(key: str, default: int) -> int:
            return ids.get(config.named[key] or "", -1) if key in config.named else default

        self.bos_id = named("bos_token", self._pieces.bos_id)
        self.eos_id = named("eos_token", self._pieces.eos_id)
        self.pad_id = named("pad_token", self._pieces.pad_id)
        self.add_bos = config.add_bos is not False and self.bos_id >= 0
        self._prefix = config.add_prefix_space is not False
        self.restarts = config.legacy is not False and self._prefix
        self._in_text = in_text
        if len(in_text) > MAX_IN_TEXT:
            raise ValueError(f"{name}: the files beside it add {len(in_text)} tokens, the limit is {MAX_IN_TEXT}")
        self._finder = _finder(in_text) if in_text else None

    def encode(self, s: str, continues: bool) -> list[int]:
        ids: list[int] = []
        at, continues = 0, continues or not self._prefix
        for found in self._finder.finditer(s) if self._finder else ():
            number = int((found.lastgroup or "")[1:])
            before = s[at : found.start()]
            ids += self._pieces.encode(before.rstrip() if self._in_text[number].lstrip else before, continues)
            ids.append(number)
            at, continues = found.end(), not self.restarts
        return ids + self._pieces.encode(s[at:], continues)

    def token_bytes(self, token: int, at_start: bool) -> bytes:
        """Control tokens are nothing, as for SentencePiece alone."""
        if token in self._added:
            return self._added[token].encode()
        if token >= self._pieces.n_words:
            return b""
        return self._pieces.token_bytes(token, at_start and self._prefix)


def _finder(tokens: dict[int, AddedToken]) -> re.Pattern[str]:
    """Finds the longest token at a place, as a group named by its id, with the spaces after it that it swallows."""
    alternatives = []
    for number, token in sorted(tokens.items(), key=lambda item: -len(item[1].content)):
        pattern = f"(?P<t{number}>{re.escape(token.content)})" + r"\s*" * token.rstrip
        alternatives.append(rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern)
    return re.compile("|".join(alternatives))
