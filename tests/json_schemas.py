"""Random JSON schemas, and a validator of the keywords that they use: written from the specification, for tests."""

from __future__ import annotations

import random
import re
from typing import Any

PATTERNS = ("^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "x+y", "^(red|green|blue)$", "^[^\\s]{1,3}$", "[0-9]$")
NAMES = ("name", "age", "tags", "a b", 'quo"te', "größe", "x", "$ref", "id")
KINDS = ("object", "object", "array", "string", "integer", "number", "enum", "anyOf", "ref", "boolean", "null")


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema with definitions; nothing in it is without a bound but numbers."""
    definitions = {"point": _schema(rng, 1, refs=False), "leaf": _schema(rng, 0, refs=False)}
    tree = {
        "type": "object",
        "properties": {
            "value": {"$ref": "#/$defs/leaf"},
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$defs": definitions | {"tree": tree}, **_schema(rng, 3, refs=True)}


def _schema(rng: random.Random, depth: int, refs: bool) -> dict[str, Any]:
    kind = rng.choice(KINDS if depth else KINDS[3:7])
    if kind == "ref":
        return (
            {"$ref": f"#/$defs/{rng.choice(('point', 'leaf', 'tree'))}"} if refs else {"const": rng.choice(("é", 1.5))}
        )
    if kind == "anyOf":
        return {"anyOf": [_schema(rng, depth - 1, refs) for _ in range(rng.randint(2, 3))]}
    if kind == "enum":
        return {"enum": rng.sample(["yes", "no", "maybe so", 1, -2.5, None, True, {"a": [1]}], rng.randint(1, 4))}
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 4))
        schema = {"type": kind, "properties": {name: _schema(rng, depth - 1, refs) for name in names}}
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
        return schema | {"additionalProperties": False}
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": kind,
            "items": _schema(rng, depth - 1, refs),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "string":
        least = rng.randint(0, 5)
        bounds = {"minLength": least, "maxLength": least + rng.randint(0, 10)}
        return {"type": kind} | rng.choice((bounds, {"pattern": rng.choice(PATTERNS), "maxLength": 12}))
    if kind in ("integer", "number"):
        lowest = rng.choice((-1000, -3, 0, 7, 99, -0.5 if kind == "number" else -1))
        limits = {"minimum": lowest, "maximum": lowest + rng.choice((0, 1, 25, 1234))}
        above = {"exclusiveMinimum": lowest, "exclusiveMaximum": lowest + 40}
        return {"type": kind} | rng.choice((limits, above, {"minimum": lowest}, {}))
    return {"type": kind}


def is_valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is one that a schema allows; root: where its $ref look."""
    unknown = schema.keys() - CHECKS.keys() - {"$defs", "$ref", "anyOf", "required", "additionalProperties"}
    assert not unknown, unknown
    if "$ref" in schema and not is_valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "anyOf" in schema and not any(is_valid(value, each, root) for each in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if not set(schema.get("required", ())) <= value.keys():
            return False
        if schema.get("additionalProperties") is False and value.keys() - properties.keys():
            return False
        if not all(is_valid(value[name], each, root) for name, each in properties.items() if name in value):
            return False
    if isinstance(value, list) and "items" in schema and not all(is_valid(i, schema["items"], root) for i in value):
        return False
    return all(CHECKS[key](value, wanted) for key, wanted in schema.items() if key in CHECKS)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": _is_number,
    "integer": lambda v: _is_number(v) and (isinstance(v, int) or v.is_integer()),
}
CHECKS = {
    "type": lambda v, kind: TYPES[kind](v),
    "enum": lambda v, values: any(_same(v, each) for each in values),
    "const": _same,
    "properties": lambda v, _: True,
    "items": lambda v, _: True,
    "minItems": lambda v, n: not isinstance(v, list) or len(v) >= n,
    "maxItems": lambda v, n: not isinstance(v, list) or len(v) <= n,
    "minLength": lambda v, n: not isinstance(v, str) or len(v) >= n,
    "maxLength": lambda v, n: not isinstance(v, str) or len(v) <= n,
    "pattern": lambda v, p: not isinstance(v, str) or re.search(p, v) is not None,
    "minimum": lambda v, n: not _is_number(v) or v >= n,
    "maximum": lambda v, n: not _is_number(v) or v <= n,
    "exclusiveMinimum": lambda v, n: not _is_number(v) or v > n,
    "exclusiveMaximum": lambda v, n: not _is_number(v) or v < n,
}
