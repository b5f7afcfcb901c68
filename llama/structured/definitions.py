"""What the texts of a request's constraint mean: a JSON schema, a regular expression or a grammar, for llguidance."""

from __future__ import annotations

import json
import re
from typing import Any

from llama.sampling import SamplingParams
from llama.sampling.params import GRAMMARS
from llama.structured.gbnf import is_gbnf, parse_gbnf
from llama.structured.lexemes import to_lark

MAX_DEFINITION = 1 << 20  # characters of a schema or a grammar
# Where JSON may have whitespace: none, a space, or a new line and its indentation. Without a bound, small models go on
# in whitespace until the length ends them.
JSON_WHITESPACE = r"[ ]|\n[ \t]{0,20}"
NO_TEXT = "NoExtensionBias"  # llguidance's word for a grammar that no text is of
MAX_PARTS = 200  # of a wrong schema that are looked at, to find which of them is wrong
# llguidance's place of an error: "at 1(8): ..." is line 1, column 8; lines of source and a caret follow.
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")


def check_constraint(params: SamplingParams) -> None:
    """Raise ValueError, in one line, for a schema, an expression or a grammar that is wrong, before weights are read.

    Only what names tokens of the model, as <|name|> in a grammar does, is found wrong later.
    """
    if params.is_constrained:
        from llguidance import LLMatcher

        is_error, messages = LLMatcher.validate_grammar_with_warnings(definition(params))
        if is_error:
            raise ValueError(explained(params, messages[0]))


def definition(params: SamplingParams) -> str:
    """Return the constraint of a request in llguidance's own form; ValueError where its text cannot be read."""
    from llguidance import LLMatcher, regex_to_lark

    for name in GRAMMARS:
        if len(getattr(params, name) or "") > MAX_DEFINITION:
            raise ValueError(f"{name} has more than {MAX_DEFINITION} characters")
    if params.json_schema is not None:
        schema = _schema(params.json_schema)
        try:
            return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITESPACE})
        except ValueError as error:  # of what Python's JSON has alone: NaN, half of a surrogate pair
            raise ValueError(f"json_schema is no JSON: {error}") from None
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(regex_to_lark(params.regex, "d"))  # \d is 0 to 9, as in JSON schemas
    assert params.grammar is not None
    if not params.grammar.strip():
        raise ValueError("grammar is empty")
    if not is_gbnf(params.grammar):
        return LLMatcher.grammar_from_lark(params.grammar)
    try:
        return LLMatcher.grammar_from_lark(to_lark(parse_gbnf(params.grammar)))
    except ValueError as error:
        raise ValueError(f"grammar (GBNF): {error}") from None
    except RecursionError:
        raise ValueError("grammar (GBNF): it is nested too deep") from None


def explained(params: SamplingParams, error: str) -> str:
    """Return llguidance's words on a wrong constraint in one line, with the place in the text."""
    kind = next(name for name in GRAMMARS if getattr(params, name) is not None)
    lines = [line.strip() for line in error.strip().splitlines()]
    last = next((line for line in lines[1:] if line.startswith("error: ")), "")  # the regex parser's own conclusion
    words = "it allows no text" if lines[0] == NO_TEXT else f"{lines[0]} {last}".strip()
    if params.json_schema is not None:
        where = "/".join(_wrong_part(json.loads(_schema(params.json_schema)), error))
        kind += f" at #/{where}" if where else ""
    if kind == "grammar":
        kind = "grammar (GBNF)" if is_gbnf(params.grammar or "") else "grammar (Lark)"
        words = _PLACE.sub(lambda found: f"line {found[1]}, column {found[2]}: ", words, count=1)
    else:
        words = _PLACE.sub("", words, count=1)
    return f"{kind}: {words}"


def _wrong_part(schema: Any, error: str) -> list[str]:
    """Return the path, as JSON pointers have it, to the innermost part of a schema that is wrong in this way by itself.

    What `$ref` leads to goes along with each part. Only some parts are looked at, where there are very many.
    """
    from llguidance import LLMatcher

    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    innermost: list[str] = []
    left: list[tuple[list[str], Any]] = [([], schema)]
    for _ in range(MAX_PARTS):
        if not left:
            break
        path, part = left.pop()
        inside = part.items() if isinstance(part, dict) else enumerate(part)
        left += [([*path, str(key)], value) for key, value in inside if isinstance(value, dict | list)]
        is_wrong = isinstance(part, dict) and error == LLMatcher.validate_grammar(
            LLMatcher.grammar_from_json_schema(shared | part)
        )
        if is_wrong and len(path) > len(innermost):
            innermost = path
    return innermost


def _schema(text: str) -> str:
    """Return a JSON schema as an object that llguidance takes; `true` allows any JSON."""
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"json_schema is no JSON: {error.msg}, line {error.lineno}, column {error.colno}: {text[:40]!r}"
        ) from None
    except RecursionError:
        raise ValueError("json_schema is nested too deep") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema must be an object or true, got {text[:40]!r}")
    return json.dumps(schema)
