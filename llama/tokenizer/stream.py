"""Turn token ids into text, one id at a time, up to where a stop string begins. Knows a token only as bytes."""

import codecs
from collections.abc import Collection, Iterable, Sequence
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


class CompletionText:
    """Decodes the tokens of a request. Text that may be the beginning of a stop string is held back until it is not.

    Args:
        decoder: of the tokens.
        silent_tokens: those that add nothing: control tokens, and ids of padding in an embedding.
        stops: texts that end the completion, which leaves them out.
    """

    def __init__(self, decoder: StreamDecoder, silent_tokens: Collection[int], stops: Sequence[str] = ()) -> None:
        self._decoder, self._silent_tokens, self._stops = decoder, silent_tokens, stops
        self._held = ""

    def echo(self, token: int) -> str:
        """Return the text that a token of the prompt adds, in which no stop string is looked for."""
        return "" if token in self._silent_tokens else self._decoder.push(token)

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text to show after a token of the completion, and whether a stop string has ended it."""
        text = "" if token in self._silent_tokens else self._decoder.push(token)
        return self._look(text) if self._stops else (text, False)

    def end(self) -> str:
        """Return the text that was held back, as no more tokens will come."""
        text, is_stopped = self._look(self._decoder.flush())
        rest, self._held = self._held, ""
        return text if is_stopped else text + rest

    def restart(self, prompt: Iterable[int], completion: Iterable[int]) -> None:
        """Begin again, after these tokens: of the prompt as far as it is echoed, and of the completion."""
        self._decoder.reset()
        self._held = ""
        for token in prompt:
            self.echo(token)
        for token in completion:
            self.push(token)

    def _look(self, text: str) -> tuple[str, bool]:
        """Return the text before the first stop string and True, or what cannot belong to one and False."""
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a stop string, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
