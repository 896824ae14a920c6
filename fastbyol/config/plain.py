"""Converts a config to plain values and back, as YAML, JSON and checkpoints store it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from typing import Any, TypeVar

from fastbyol.config.errors import UserError, shown

Config = TypeVar("Config")


def to_plain(config: Any) -> Any:
    """Converts dataclasses to dicts and tuples to lists, recursively."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_plain(v) for v in config]
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def from_plain(cls: type[Config], values: dict[str, Any], *, where: str = "") -> Config:
    """Builds, and so checks, the dataclass from plain values; missing fields take their defaults.

    Raises:
        UserError: not a group of options, an unknown name (the message names the nearest one), or a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the config'} is {shown(values)}: must be a group of options")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            text = name[:100] if isinstance(name, str) else shown(name)
            raise UserError(f"{where}{text}: no such option{nearest_name(text, known)}")
    converted = {name: _convert(value, hints[name], f"{where}{name}") for name, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:  # a ViewSpec does not know whether it is view1 or view2, so add it here
        raise UserError(str(error) if str(error).startswith(where) else f"{where}{error}") from error


def nearest_name(name: str, known: typing.Iterable[str], *, prefix: str = "") -> str:
    """Returns ' (did you mean x?)', or an empty string if no known name is similar. Upper and lower case count as equal.

    prefix: common beginning of the names, such as '--'; it is shown, but ignored in the comparison.
    """
    names = {each.removeprefix(prefix).lower(): each for each in known}
    match = difflib.get_close_matches(name.removeprefix(prefix).lower(), list(names), n=1, cutoff=0.5)
    return f" (did you mean {names[match[0]]}?)" if match else ""


def _convert(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, dict):
            raise UserError(f"{where} = {shown(value)}: must be a group of options")
        return from_plain(hint, value, where=f"{where}.")  # type: ignore[type-var]
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis and isinstance(value, list | tuple):  # of any length
            items = items[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise UserError(f"{where} = {shown(value)}: must be {len(items)} values")
        return tuple(_convert(v, t, where) for v, t in zip(value, items, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{where} = {shown(value)}: must be a number below 1e308") from error
    if hint is str and isinstance(value, bool):
        value = str(value).lower()  # earlier versions had true or false here; an option without such a past refuses the text
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} = {shown(value)}: must be of type {hint.__name__}")
    return value
