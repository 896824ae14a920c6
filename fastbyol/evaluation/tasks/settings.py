"""The settings of a task as a frozen dataclass: its fields are options of the command, its versions 'paper' and 'quick' their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.evaluation.tasks.job import INITS
from fastbyol.run.command_line import field_docs

VERSIONS = ("quick", "paper")
PREFIX = "setting_"


class Settings(Protocol):
    """A frozen dataclass of int, float, str, bool and tuples of them, which checks itself when it is built."""

    __dataclass_fields__: typing.ClassVar[dict[str, Any]]


Chosen = TypeVar("Chosen", bound=Settings)


def add_settings(parser: argparse.ArgumentParser, versions: Mapping[str, Settings]) -> None:
    """Adds --settings, and an option for each field of the settings; its help is the text below the field."""
    cls = type(next(iter(versions.values())))
    names = tuple(dict.fromkeys((*VERSIONS, *versions)))
    parser.add_argument("--settings", choices=names, default="quick", help="the paper's protocol, or one for small sets (%(default)s)")
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        defaults = " | ".join(f"{name} {_text(getattr(versions[name], field.name))}" for name in names if name in versions)
        text = f"{docs.get(field.name, '')} ({defaults})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", dest=f"{PREFIX}{field.name}", metavar="VALUE", help=text)


def settings_from(options: argparse.Namespace, versions: Mapping[str, Chosen]) -> Chosen:
    """Returns the chosen version with the values that were typed. Raises UserError for a value of the wrong type or out of range, and for an
    option that has no effect beside the others (`without_effect(encoders)` of the settings: why, by name).
    """
    base = versions[options.settings]
    hints = typing.get_type_hints(type(base))
    typed = {name.removeprefix(PREFIX): value for name, value in vars(options).items() if name.startswith(PREFIX) and value is not None}
    values = {name: _parsed(name, value, hints[name]) for name, value in typed.items()}
    found = from_plain(type(base), to_plain(base) | values, where="--")
    encoders = (*(options.init or INITS), *options.compare)
    unused = getattr(found, "without_effect", lambda _: {})(encoders)
    for name in typed:
        if name in unused:
            raise UserError(f"--{name}: has no effect {unused[name]}; leave it out")
    return found


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parsed(name: str, text: str, hint: Any) -> Any:
    """Returns the value that a text stands for: items of a tuple are separated by commas, yes and no are a bool's."""
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return [_parsed(name, part, item) for part in text.split(",") if part]
    if hint is bool:
        if text.lower() not in ("yes", "no", "true", "false"):
            raise UserError(f"--{name} {text}: must be yes or no")
        return text.lower() in ("yes", "true")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"--{name} {text}: must be {kind}") from error
    return text
