"""What Meta's tokenizers offer beside `encode` and `decode`, under Meta's names, for scripts written for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama.tokenizer.stream import StreamDecoder
from llama.tokenizer.vocab import Vocab

PREFIX_TOKEN, MIDDLE_TOKEN, SUFFIX_TOKEN = "▁<PRE>", "▁<MID>", "▁<SUF>"


class MetaNames:
    """The names of the tokenizers in Meta's repositories; an id is None where the vocabulary lacks its token."""

    special_tokens: dict[str, int]
    _vocab: Vocab

    @property
    def sp_model(self) -> Any:
        """The sentencepiece library's SentencePieceProcessor, in which control tokens are out of reach for text."""
        return self._part("sp_model", "SentencePiece")

    @property
    def model(self) -> Any:
        """The tiktoken library's Encoding."""
        return self._part("model", "tiktoken")

    @property
    def prefix_id(self) -> int | None:
        """Code Llama's token before the text that comes before a gap."""
        return self.special_tokens.get(PREFIX_TOKEN)

    @property
    def middle_id(self) -> int | None:
        """Code Llama's token after which a gap is filled."""
        return self.special_tokens.get(MIDDLE_TOKEN)

    @property
    def suffix_id(self) -> int | None:
        """Code Llama's token before the text that comes after a gap."""
        return self.special_tokens.get(SUFFIX_TOKEN)

    @property
    def eot_id(self) -> int | None:
        """The end of a filled gap in Code Llama, of a turn in Llama 3."""
        return self.special_tokens.get("▁<EOT>", self.special_tokens.get("<|eot_id|>"))

    @property
    def step_id(self) -> int | None:
        """The end of a turn in Code Llama 70B Instruct."""
        return self.special_tokens.get("<step>")

    def encode_infilling(self, s: str) -> list[int]:
        """Return the ids of a text that continues another: without a prefix space."""
        return self._vocab.encode(s, False)

    def decode_infilling(self, t: Sequence[int]) -> str:
        """Return the text of tokens that continue another text: with the prefix space, where there is one."""
        stream = StreamDecoder(self._vocab, add_prefix_space=False)
        return "".join([stream.push(token) for token in t]) + stream.flush()

    def token_piece(self, t: int) -> str:
        """Return a token as it stands in the SentencePiece model, with "▁" for a space."""
        piece: str = self.sp_model.id_to_piece(t)
        return piece

    def _part(self, name: str, kind: str) -> Any:
        part = getattr(self._vocab, name, None)
        if part is None:
            raise AttributeError(f"{name} is for {kind} tokenizers alone: this is another kind")
        return part
