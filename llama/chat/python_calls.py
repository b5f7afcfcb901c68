"""Calls that a model writes as Python: [f(a=1), g(b="x")], or code after a tag. They are parsed, and never run."""

from __future__ import annotations

import ast
import re
from typing import Any

# What models write in place of Python's own constants.
JSON_CONSTANTS = {"true": True, "false": False, "null": None}
CODE_TOOL = "code_interpreter"  # Llama's name of the tool that runs code

# The name of a function, and its arguments by name.
PythonCall = tuple[str, dict[str, Any]]


def read_list(text: str) -> list[PythonCall] | None:
    """Return the calls of a list, with arguments by name that are constants, lists or dictionaries; else None."""
    tree = _parsed(text)
    if not isinstance(tree, ast.List) or not tree.elts:
        return None
    try:
        return [_call(each) for each in tree.elts]
    except (ValueError, RecursionError):
        return None


def read_code(text: str) -> list[PythonCall] | None:
    """Return the one call that code is: name.call(a=1) of Llama's own tools, else of the tool that runs code."""
    tree = _parsed(text)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute) and tree.func.attr == "call":
        try:
            name, arguments = _call(tree)
            return [(name.removesuffix(".call"), arguments)]
        except (ValueError, RecursionError):
            pass
    return [(CODE_TOOL, {"code": text})] if text else None


def _parsed(text: str) -> ast.expr | None:
    # A backslash that begins no escape of Python is one, as it is there; Python would warn of it.
    text = re.sub(r"\\(.)", lambda match: match[0] if match[1] in "\\'\"nrtabfvxuU" else "\\" + match[0], text)
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _call(node: ast.expr) -> PythonCall:
    """Return the name and arguments of a call; raise ValueError for anything else."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise ValueError
    arguments = {}
    for each in node.keywords:
        if each.arg is None or each.arg in arguments:
            raise ValueError
        arguments[each.arg] = _value(each.value)
    return name, arguments


def _value(node: ast.expr) -> Any:
    """Return the JSON value of an expression; raise ValueError where it has none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in JSON_CONSTANTS:
        return JSON_CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number
    raise ValueError
