"""Token ids to text, one id at a time. Knows tokens only as bytes."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    def token_bytes(self, token: int, at_start: bool = False) -> bytes: ...


class StreamDecoder:
    """Incremental UTF-8 over the bytes of tokens.

    All pieces joined, flush() included, are the bytes of all tokens decoded with errors="replace": the same text as
    `Tokenizer.decode` when at_start is true. No piece ends inside a character.

    at_start: these tokens begin a text, so that the space SentencePiece puts before its first word is dropped. False
    for the continuation of a prompt, where that space separates words.
    """

    def __init__(self, tokenizer: TokenBytes, at_start: bool = True) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token, self._at_start)
        # A control token without bytes, such as BOS, leaves the next one at the start.
        if self._at_start and self._tokenizer.token_bytes(token):
            self._at_start = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end of the text: what is left of an unfinished character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)
