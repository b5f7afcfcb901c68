"""Which errors a user can cause, and one line of each: no line breaks, no control characters, no end to it.

Imports no torch, as the command line may meet an error before it is needed.
"""

from __future__ import annotations

import errno
import os
import re

MAX_MESSAGE_CHARS = 1000
# What the system may refuse, and what helps; torch raises RuntimeError there, with the system's words in its own.
FIXES_OF_SYSTEM = {
    os.strerror(errno.ENOMEM): "give a smaller --max_seq_len or --max_batch_size, or --quantize int8; see llama plan",
    os.strerror(errno.EMFILE): "raise the limit of this shell, as by ulimit -n 1024",
    os.strerror(errno.ENFILE): "close other programs",
    os.strerror(errno.ENOSPC): "make room on the disk",
}


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
    try:
        plain = kind(line)
    except TypeError:  # it is made of more than a message
        plain = OSError(line) if isinstance(error, OSError) else RuntimeError(line)
    return plain.with_traceback(error.__traceback__)


def is_caused_by_user(error: BaseException) -> bool:
    """Tell whether a user can have caused an error: by a wrong value or file, or a lack of memory, files or disk."""
    if isinstance(error, ValueError | OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FIXES_OF_SYSTEM)


def error_line(error: BaseException) -> str:
    """Return what to tell a user of an error that `is_caused_by_user`, in one line."""
    text = one_line(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        fix = FIXES_OF_SYSTEM.get(os.strerror(error.errno))
        return f"{text}: {fix}" if fix is not None else text
    refused = os.strerror(errno.ENOMEM) if isinstance(error, MemoryError) else ""
    if type(error) is RuntimeError:
        refused = max((words for words in FIXES_OF_SYSTEM if words in text), key=len, default="")
    if refused:
        size = re.search(r"allocate (\d+) bytes", text)
        return f"{refused}{f' ({int(size[1]) / 1e9:.2f} GB)' if size else ''}: {FIXES_OF_SYSTEM[refused]}"
    return text or type(error).__name__
