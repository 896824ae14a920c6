"""argparse as every command uses it: a mistyped option is a UserError, a path may begin with '~', and no option is dropped for a later one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastbyol.config.errors import UserError

_GIVEN = "_given"
"""Of a namespace while it is filled: the options that were there."""


class OneLineParser(argparse.ArgumentParser):
    """Descriptions keep their line breaks; options may not be abbreviated, nor given twice unless they collect a list."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})  # type: ignore[arg-type]
        for name, kind in ((None, _StoreOnce), ("store", _StoreOnce), ("store_true", _StoreTrueOnce)):
            self.register("action", name, kind)
        self.register("type", Path, _path)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        found, rest = super().parse_known_args(args, namespace)
        vars(found).pop(_GIVEN, None)
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


class _StoreOnce(argparse._StoreAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_again(self, namespace, option_string)
        super().__call__(parser, namespace, values, option_string)


class _StoreTrueOnce(argparse._StoreTrueAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        _refuse_again(self, namespace, option_string)
        super().__call__(parser, namespace, values, option_string)


def _refuse_again(action: argparse.Action, namespace: Any, option: str | None) -> None:
    given = vars(namespace).setdefault(_GIVEN, set())
    if option and action.dest in given:
        refuse_repeated(option)
    given.add(action.dest)


def refuse_repeated(option: str) -> NoReturn:
    """Raises the UserError of an option that was given twice: whichever one were dropped, nobody would notice."""
    raise UserError(f"{option}: is given twice, and only one of them could count; leave one out")


def path_text(text: str) -> str:
    """A path as typed, for argparse's `type`, with its '~' replaced: no shell does that in --out=~/runs."""
    try:
        return expand_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
    if not text:  # an unset variable of the shell; Path would take it for the folder we are in
        raise argparse.ArgumentTypeError("is empty; give a path")
    return Path(path_text(text))


def through_links(out: Path) -> Path:
    """Returns where a link points, so that a new file goes there and does not take the link's place; any other path as it is."""
    if not out.is_symlink():
        return out
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise UserError(f"{out}: is a link that leads back to itself; remove it, or give another path")
    return target


def expand_home(path: str, *, name: str = "") -> str:
    """The path with a leading '~' or '~user' replaced by that home folder; a file that really has such a name stays what it is.

    name: of the option, for the error.

    Raises:
        UserError: nobody knows the home folder.
    """
    expanded = os.path.expanduser(path)
    first = path.partition("/")[0]
    if expanded.startswith("~") and (first == "~" or not os.path.lexists(first)):
        said = f"{name} = {path!r}" if name else path
        raise UserError(f"{said}: no home folder is known for {first} (is HOME set?); give the whole path, or ./{path} if that is a name")
    return expanded
