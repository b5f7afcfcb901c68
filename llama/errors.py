"""Make one line of an error, whatever it quotes from a file: no line breaks, no control characters, no end to it."""

from __future__ import annotations

MAX_MESSAGE_CHARS = 1000


def visible(text: str) -> str:
    """Return a line with escapes for what a terminal would obey or hide, as names in a stranger's files may hold it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def one_line(message: str) -> str:
    """Join a message's lines, make all of it visible, and leave out the middle of what is too long."""
    line = visible(" ".join(message.split()))
    half = MAX_MESSAGE_CHARS // 2
    return line if len(line) <= MAX_MESSAGE_CHARS else f"{line[: half - 3]} ... {line[len(line) - half + 2 :]}"


def in_one_line(error: Exception) -> Exception:
    """Return an error with its message in one line: itself, where it is so already.

    Another kind of ValueError becomes a plain one, as most are not made of a message alone.
    """
    line = one_line(str(error))
    if line == str(error):
        return error
    kind = ValueError if isinstance(error, ValueError) else type(error)
    return kind(line).with_traceback(error.__traceback__)
