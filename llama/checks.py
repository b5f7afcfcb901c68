"""Checks of numbers that files and users give."""

from __future__ import annotations

from typing import Any

# Limits above those of any LLaMA model, so that a corrupt file cannot ask for terabytes.
MAX_INT = 1 << 24
_MAX_NUMBER = 1e15


def check_int(name: str, value: Any, most: int = MAX_INT) -> None:
    """Raise ValueError unless a value is an integer from 1 to `most`."""
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a positive number of at most _MAX_NUMBER."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
        raise ValueError(f"{name} must be a positive number of at most {_MAX_NUMBER:g}, got {value!r}")
