"""argparse as every command uses it: a mistyped option raises UserError, dashes and underscores in a name are the same, paths may begin with
'~', and a repeated option is refused.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.config.urls import is_url, shown_url

_GIVEN = "_given"
"""Attribute of the argparse namespace that collects the options given so far."""


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that keeps line breaks in descriptions and refuses abbreviated options, and repeated ones unless they collect a list."""

    def __init__(self, *, later: Callable[[Self], None] | None = None, **options: object) -> None:
        """later: adds the options once the command is actually used, because importing their modules takes a moment."""
        self._later = later
        if isinstance(description := options.get("description"), str):  # often a docstring, whose later lines are indented
            options["description"] = inspect.cleandoc(description)
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})  # type: ignore[arg-type]
        for name, kind in ((None, _StoreOnce), ("store", _StoreOnce), ("store_true", _StoreTrueOnce)):
            self.register("action", name, kind)
        self.register("type", Path, _path)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        if self._later is not None:
            add_options, self._later = self._later, None
            add_options(self)
        typed = as_spelled(sys.argv[1:] if args is None else args, self._option_string_actions)
        found, rest = super().parse_known_args(typed, namespace)
        vars(found).pop(_GIVEN, None)
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def parser_of(self, arguments: Sequence[str]) -> OneLineParser:
        """Returns the parser of the sub-command that the arguments name first; this one if they name none."""
        commands = next((action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)), {})
        return next((commands[argument] for argument in arguments if argument in commands), self)

    def refuse(self, arguments: Sequence[str], *, others: Iterable[str] = ()) -> NoReturn:
        """Raises UserError for arguments that no option takes; its message suggests the option nearest to the first of them.

        others: options that the command takes beside those of this parser.
        """
        first = next((argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")), "")
        nearest = nearest_name(first, [*self._option_string_actions, *others], prefix="--") if first else ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{nearest}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{nearest_name(str(value), known)}; choose from {', '.join(known)}"
            )


def as_spelled(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Returns the arguments with each option spelled as it is among the known ones: dashes and underscores inside a name mean the same.

    An option that is not known stays as typed, and so do values and what follows a bare '--'.
    """
    spellings = {name.replace("_", "-"): name for name in known}
    typed = list(arguments)
    end = typed.index("--") if "--" in typed else len(typed)
    for place, argument in enumerate(typed[:end]):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            typed[place] = spellings.get(name.replace("_", "-"), name) + equals + value
    return typed


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
    """Raises the UserError for an option that is given twice; dropping one of the two silently could hide a mistake."""
    raise UserError(f"{option}: is given twice, and only one of them could count; leave one out")


def path_text(text: str) -> str:
    """Returns a path as typed with '~' expanded, for argparse's `type`; shells do not expand it in --out=~/runs."""
    if not text:  # usually an unset shell variable; Path("") would mean the current folder
        raise argparse.ArgumentTypeError("is empty; give a path")
    if is_url(text):
        where = "docs/data.md (Data in object stores) says what takes URLs"
        raise argparse.ArgumentTypeError(f"{shown_url(text)} is a URL, and a path on this machine is needed; {where}")
    try:
        return expand_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
    return Path(path_text(text))


def local_or_url(text: str) -> str:
    """Returns a path as typed with '~' expanded, or a URL, for argparse's `type`."""
    return text if is_url(text) else path_text(text)


def through_links(out: Path) -> Path:
    """Returns the target of a symlink, so that writing a new file does not replace the link; returns any other path unchanged."""
    if not out.is_symlink():
        return out
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise UserError(f"{out}: is a link that leads back to itself; remove it, or give another path")
    return target


def require_name(out: Path, *, option: str = "--out") -> None:
    """Raises UserError for a path such as '.', '..' or '/': what is written takes its name, and files beside it have names made of that."""
    if out.name in ("", ".."):
        raise UserError(f"{option} {out}: gives no name for the output; give one, for example {out / 'NAME'}")


def expand_home(path: str, *, name: str = "") -> str:
    """Returns the path with a leading '~' or '~user' expanded. A relative path whose first part is really named like that stays as it is.

    name: the option's name, for the error message.

    Raises:
        UserError: the home folder is unknown.
    """
    expanded = os.path.expanduser(path)
    first = path.partition("/")[0]
    if expanded.startswith("~") and (first == "~" or not os.path.lexists(first)):
        said = f"{name} = {path!r}" if name else path
        raise UserError(f"{said}: no home folder is known for {first} (is HOME set?); give the whole path, or ./{path} if that is a name")
    return expanded
