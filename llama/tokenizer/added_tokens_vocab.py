"""A Hugging Face folder's `tokenizer.model`: SentencePiece and the tokens that the files beside it add."""

from llama.tokenizer.hf_config import NAMED_TOKENS, TokenizerConfig
from llama.tokenizer.sentencepiece_vocab import SentencePieceVocab
from llama.tokenizer.vocab import CONTROL_TOKENS


class AddedTokensVocab:
    """SentencePiece's own ids for text, as in transformers' LlamaTokenizer up to version 4, and added tokens.

    Added tokens that are not special are found in text. The text after one begins with a prefix space unless "legacy"
    is false. transformers 5 converts the model to a `tokenizers` pipeline instead, which puts no prefix space before a
    text that begins with a space of its own.
    """

    def __init__(self, proto: bytes, name: str, config: TokenizerConfig) -> None:
        """name: where proto, the content of tokenizer.model, comes from, for errors."""
        pieces = SentencePieceVocab(proto, name)
        ids, unk_id = pieces.ids, pieces.unk_id
        # A text that is a piece already keeps the piece's id.
        added = {ids.get(token.content, number): token for number, token in config.added.items()}
        added.pop(unk_id, None)
        special = CONTROL_TOKENS | config.specials
        control = {i: token.content for i, token in added.items() if token.content in special}
        control |= {ids[text]: text for text in config.specials if ids.get(text, unk_id) != unk_id}
        in_text = {i: t for i, t in added.items() if i not in control and t.content not in pieces.special_tokens}
        self._added = {i: token.content for i, token in in_text.items() if token.content not in ids}
        hidden = {*control, *self._added} - {*pieces.special_tokens.values()}
        own = {text: i for text, i in pieces.special_tokens.items() if i not in control}
        self.special_tokens = own | {text: i for i, text in control.items()}
        self._pieces = SentencePieceVocab(proto, name, hidden) if any(i < pieces.n_words for i in hidden) else pieces
        self.sp_model = self._pieces.sp_model

        self.n_trained = pieces.n_words
        self.n_words = max([pieces.n_words, *(i + 1 for i in added)])
        ids = ids | {token.content: i for i, token in added.items()}
        named = {"bos_token": pieces.bos_id, "eos_token": pieces.eos_id, "pad_token": pieces.pad_id}
        named |= {key: ids.get(text or "", -1) for key, text in config.named.items()}
        self.bos_id, self.eos_id, self.pad_id = (named[key] for key in NAMED_TOKENS[:3])
        self.add_bos = config.add_bos_token is not False and self.bos_id >= 0
        self._has_prefix_space = config.add_prefix_space is not False
        self.prefix_space_after_special = config.legacy is not False and self._has_prefix_space
        self._finder = None
        if in_text:
            import tokenizers

            # With an empty vocabulary, the library gives the added tokens of a text and nothing else.
            self._finder = tokenizers.Tokenizer(tokenizers.models.BPE())
            self._finder.add_tokens(list(in_text.values()))
            self._in_text = {self._finder.token_to_id(token.content): i for i, token in in_text.items()}

    def encode(self, s: str, add_prefix_space: bool) -> list[int]:
        ids: list[int] = []
        at, prefix_space = 0, add_prefix_space and self._has_prefix_space
        found = self._finder.encode(s) if self._finder else None
        for token, (start, end) in zip(found.ids, found.offsets, strict=True) if found else ():
            ids += self._pieces.encode(s[at:start], prefix_space)
            ids.append(self._in_text[token])
            at, prefix_space = end, self.prefix_space_after_special
        return ids + self._pieces.encode(s[at:], prefix_space)

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes:
        """Return a token's bytes; a control token has none, as for SentencePiece alone."""
        if token in self._added:
            return self._added[token].encode()
        if token >= self._pieces.n_words:
            return b""
        return self._pieces.token_bytes(token, strip_prefix_space and self._has_prefix_space)
