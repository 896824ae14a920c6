"""Help texts of the options, read from the docstrings below the dataclass fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing


def field_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Returns {dotted name: help text} for the documented fields of a dataclass and of the dataclasses nested in it."""
    hints, texts = typing.get_type_hints(cls), _texts_below_fields(cls)
    docs: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            docs |= field_docs(typing.cast(type, hints[field.name]), f"{name}.")
        elif field.name in texts:
            docs[name] = texts[field.name]
    return docs


def _texts_below_fields(cls: type) -> dict[str, str]:
    """Returns {field: docstring on one line}. Python does not keep these docstrings at run time, so they are read from the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, below in itertools.pairwise(definition.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[statement.target.id] = " ".join(below.value.value.split())
    return found
