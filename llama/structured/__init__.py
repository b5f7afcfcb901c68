"""Completions of a JSON schema, a regular expression or a grammar: which tokens may come next, through llguidance."""

from __future__ import annotations

from llama.structured.constraint import Constraint, ConstraintCompiler, unpack
from llama.structured.definitions import check_constraint

__all__ = ["Constraint", "ConstraintCompiler", "check_constraint", "unpack"]
