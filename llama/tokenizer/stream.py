"""Turn token ids into text, one id at a time. Knows a token only as bytes."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What `StreamDecoder` asks of a vocabulary or of a `Tokenizer`."""

    def token_bytes(self, token: int, strip_prefix_space: bool) -> bytes: ...


class StreamDecoder:
    """Decode UTF-8 incrementally over the bytes of tokens; no piece of text ends inside a character.

    All pieces joined, that of `flush` included, are the bytes of all tokens decoded with errors="replace". With
    add_prefix_space, that is the text of `Tokenizer.decode`.

    add_prefix_space: the tokens were encoded with it, as a text of their own, so that the space that the tokenizer
    puts before the first word is stripped. False for the continuation of a prompt, where that space separates words.
    """

    def __init__(self, vocab: TokenBytes, add_prefix_space: bool = True) -> None:
        self._vocab = vocab
        self._add_prefix_space = self._strip_prefix_space = add_prefix_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def reset(self) -> None:
        """Begin again with the first token."""
        self._strip_prefix_space = self._add_prefix_space
        self._utf8.reset()

    def push(self, token: int) -> str:
        """Return the characters that a token completes."""
        data = self._vocab.token_bytes(token, self._strip_prefix_space)
        # A control token without bytes, such as BOS, leaves the next token at the start of the text.
        if self._strip_prefix_space and self._vocab.token_bytes(token, False):
            self._strip_prefix_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Return the end of the text: what is left of an unfinished character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)
