"""Tools that a model may call, as callers describe them: lists of JSON schemas, as transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama.chat.dialog import plain_json
from llama.sampling import SamplingParams

# {"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}, or what is in it.
Tools = Sequence[Mapping[str, Any]]


def plain_tools(tools: Tools | None) -> list[dict[str, Any]] | None:
    """Return a copy of descriptions as JSON holds it, None where there are none; raise ValueError for anything else."""
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of descriptions, got {tools!r:.80}")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                'a tool is described by {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": a JSON schema}}}}; tool {i} is {tool!r:.80}'
            )
    return [plain_json(tool, f"tool {i} holds") for i, tool in enumerate(tools)]


def no_place_for_tools(chat_format: str) -> ValueError:
    """Return the error of a format that leaves tools out of a prompt."""
    return ValueError(
        f"{chat_format} has no place for tools: use a model whose chat template has one, or give such a template by "
        "chat_template"
    )


def check_echo(params: SamplingParams, tools: Tools | None) -> None:
    """Raise ValueError where prompts are to be echoed, and calls of tools told from the text."""
    if tools and params.echo:
        raise ValueError("echo repeats a prompt, in which calls of tools cannot be told: leave out echo, or tools")
