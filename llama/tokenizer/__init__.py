"""Turn text into token ids and back, whatever file the tokenizer comes in. Knows no model and no chat format."""

import importlib
from typing import Any

from llama.tokenizer.stream import CompletionText, StreamDecoder
from llama.tokenizer.tokenizer import Tokenizer, find_tokenizer

__all__ = ["CompletionText", "StreamDecoder", "Tokenizer", "find_tokenizer"]

# Names that Meta's Llama 3 keeps here, and the rooms above in which they are.
_ELSEWHERE = {
    "ChatFormat": ("llama.chat.formats", "Llama3Chat"),
    "Dialog": ("llama.chat.dialog", "Dialog"),
    "Message": ("llama.chat.dialog", "Message"),
    "Role": ("llama.chat.dialog", "Role"),
}


def __getattr__(name: str) -> Any:
    """Import one of those names when it is asked for, since no room imports one above it."""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'llama.tokenizer' has no attribute {name!r}")
    module, own_name = _ELSEWHERE[name]
    return getattr(importlib.import_module(module), own_name)
