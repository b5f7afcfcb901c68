"""Run LLaMA weights from a command line or from Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.generation import Dialog, Llama
    from llama.model import ModelArgs, Transformer
    from llama.tokenizer import Tokenizer

__version__ = "0.2.0"
__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]

_MODULES = {"generation": ("Dialog", "Llama"), "model": ("ModelArgs", "Transformer"), "tokenizer": ("Tokenizer",)}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `llama --help` need not wait for torch."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"llama.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
