"""Turns the command line into a checked `TrainConfig`: a preset, then a YAML file, then dotted options; later ones win."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import logging
import os
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import as_spelled, expand_home, refuse_repeated
from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import flatten, from_plain, nearest_name, to_plain
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import RUN_DEFAULTS, RUN_GROUPS, RUN_OPTIONS, TrainConfig
from fastbyol.run.plain_yaml import StandsForTooMuch, read_yaml, repeated_key

log = logging.getLogger("fastbyol")
DEFAULT_PRESET = "r50_300ep"
PRINT_CONFIG = "--print_config"


def parse_train_config(arguments: Sequence[str] | None, *, usage: str) -> TrainConfig:
    """Returns the config of the run that the arguments (None: those of sys.argv) describe; --help shows the usage.

    Raises UserError for an unknown option (naming the nearest one), or a value of the wrong type or out of range.
    """
    import jsonargparse

    arguments = as_spelled(sys.argv[1:] if arguments is None else arguments, RUN_OPTIONS)
    if PRINT_CONFIG in {argument.split("=", 1)[0] for argument in arguments}:  # it prints the config before checking it, so check first
        parse_train_config([argument for argument in arguments if argument.split("=", 1)[0] != PRINT_CONFIG], usage=usage)
    parser = jsonargparse.ArgumentParser(
        prog="fastbyol train", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    parser.add_argument("--preset", default=DEFAULT_PRESET, help="a named run to start from (python -m fastbyol presets lists them)")
    parser.add_argument("--config", action="config", help="a YAML file of options, for example the config.yaml of a run folder")
    parser.add_class_arguments(TrainConfig, as_group=False)
    if {"-h", "--help"} & set(arguments):
        _write_help(parser)
    _refuse_unknown(arguments)
    _refuse_too_much(arguments)
    repeated = _repeated(arguments)
    named, typed = _presets_and_files_apart(arguments)
    files = [_read_file(expand_home(path, name="config")) for path in named.config]
    # The preset supplies the defaults of the real parser, so it has to be known first.
    in_files = [file["preset"] for file in files if "preset" in file]
    preset = str([DEFAULT_PRESET, *in_files][-1] if named.preset is None else named.preset)
    parser.set_defaults({"preset": preset, **flatten(to_plain(preset_config(preset)))})
    try:
        # Files first: the later argument wins, and the command line must win over a file.
        namespace = parser.parse_args([*_as_typed(files), *typed])
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(_in_plain_words(_first_cause(str(error))) + _minus_hint(str(error), arguments)) from error
    values = namespace.as_dict()
    _settle_budgets(values, [*(set(flatten(file)) for file in files), names_given(typed)])
    config = from_plain(TrainConfig, {name: value for name, value in values.items() if name not in ("preset", "config")})
    if repeated and (os.environ.get("RANK") or "0") == "0":
        log.warning("%s: given more than once, the last one counts", ", ".join(repeated))
    return config


def names_given(typed: Sequence[str]) -> set[str]:
    """Returns the dotted names of the options in these arguments, those in a group's value included: --optim '{"warmup_steps": 5}'."""
    names: set[str] = set()
    for argument, following in itertools.pairwise([*typed, ""]):
        if argument.startswith("--"):
            name, has_value, value = argument.removeprefix("--").partition("=")
            group = read_yaml(value if has_value else following) if name in RUN_GROUPS else None
            names |= {f"{name}.{inner}" for inner in flatten(group)} if isinstance(group, dict) else {name}
    return names


_BUDGETS = (("epochs", "steps"), ("optim.warmup_epochs", "optim.warmup_steps"))
"""Two options each for one thing: where one of them is set, the other must be 0."""


def _settle_budgets(values: dict[str, Any], layers: list[set[str]]) -> None:
    """Sets to 0, in place, a number of epochs for which a later layer gives steps, and the other way round.

    So `--steps 1000` suffices where the preset has epochs. layers: names of the options that each file and the command line give, the
    later ones win. Two that one layer gives are left to the config's own check.
    """
    for pair in _BUDGETS:
        given = next((layer & set(pair) for layer in reversed(layers) if layer & set(pair)), set())
        if len(given) == 1:
            (name,) = given
            (other,) = set(pair) - given
            if _option(values, name)[name.rpartition(".")[2]]:
                _option(values, other)[other.rpartition(".")[2]] = 0


def _option(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the group of options, a part of `values`, that holds the one of this dotted name."""
    *groups, _ = name.split(".")
    for group in groups:
        values = values[group]
    return values


def _presets_and_files_apart(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the arguments into the values of --preset and --config and all other arguments."""
    needs = {"--preset": f"preset: needs a name, for example --preset {DEFAULT_PRESET}", "--config": "config: needs a YAML file of options"}
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", action="append", default=[])
    try:
        return early.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(needs[str(error.argument_name)]) from error


def _as_typed(files: list[dict[str, Any]]) -> list[str]:
    """Returns the options of the config files as arguments. Raises UserError for a plain value where a group of options is expected."""
    # jsonargparse could read the files itself, but it rejects text that is not UTF-8, which a path may contain.
    values = [item for file in files for item in flatten(file).items() if item[0] != "preset"]
    for name, value in values:
        if name not in RUN_DEFAULTS:
            raise UserError(f"{name} = {value!r}: must be a group of options")
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values]


def _read_file(path: str) -> dict[str, Any]:
    """Returns the options in a YAML file."""
    where = f"config = {path!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, repeated = read_yaml(text), repeated_key(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{where}: is not YAML of options ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold options, for example epochs: 100")
    if repeated:
        raise UserError(f"{where}: {repeated}: is given twice, and only one of them could count; leave one out")
    known = RUN_DEFAULTS
    # Names are checked here, because jsonargparse's errors name neither the file nor the nearest option.
    for name in flatten(values):
        if name != "preset" and name not in known and not any(option.startswith(f"{name}.") for option in known):
            raise UserError(f"{where}: {name}: no such option{nearest_name(name, known)}")
    return values


def _refuse_unknown(arguments: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name.startswith("--") and name not in RUN_OPTIONS:
            raise UserError(
                f"{name}: no such option{nearest_name(name, RUN_OPTIONS, prefix='--')}; python -m fastbyol train --help lists them"
            )


def _refuse_too_much(arguments: Sequence[str]) -> None:
    """Raises UserError for a value that expands beyond the limits of `read_yaml`, as a file would."""
    # jsonargparse reads every value as YAML and expands its aliases without a limit.
    option = ""
    for argument in arguments:
        value = argument
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
        try:
            read_yaml(value)
        except StandsForTooMuch as error:
            raise UserError(f"{option} = {shown(value)}: {error}") from error
        except ValueError:  # a text that is no YAML may be a path
            continue


def _repeated(arguments: Sequence[str]) -> list[str]:
    """Returns the options that are given more than once. Raises UserError for a second --preset or --config."""
    # Those two are whole sets of options. Of others the last one wins, so a launch script's options can be overridden by appending to them.
    given = [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    repeated = [name for name in dict.fromkeys(given) if given.count(name) > 1]
    for name in repeated:
        if name in ("--preset", "--config"):
            refuse_repeated(name)
    return repeated


def _minus_hint(message: str, arguments: Sequence[str]) -> str:
    """Returns a hint for a value that begins with a minus: argparse takes '-1e-6' for an option, '--name=-1e-6' works."""
    values = [f"{name}={value}" for name, value in itertools.pairwise(arguments) if name in message and re.match(r"-[.\d]", value)]
    return f" (a value that begins with a minus: {values[0]})" if values else ""


_WORDS = {
    "int": "a whole number, written out: 4096",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list in brackets without spaces: [0.5,1.0]",
}
"""Describes, for error messages, how a value of each type is written on the command line."""


def _in_plain_words(message: str) -> str:
    """Returns jsonargparse's error about a value as one of ours, with the way out; any other as it is."""
    if found := re.fullmatch(r'"([\w.]+)": Expected an? (\w+)\. Got value: (.*)', message):
        name, kind, value = found.groups()
        if kind in _WORDS:
            return f"{name} = {value}: must be {_WORDS[kind]}"
    if found := re.fullmatch(r'"(\w+(?:\.\w+)?)": .*Unable to load config "(.*)"', message):
        name, value = found.groups()
        first = next(option for option in RUN_DEFAULTS if option.startswith(f"{name}."))
        return f"{name} = {value!r}: is a group of options; give one of them, for example --{first}"
    return message


def _first_cause(message: str) -> str:
    """Condenses jsonargparse's error of several lines into one: which option, what was expected, what was given."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("Parser key ", "")
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    return ": ".join(dict.fromkeys(line[:300] for line in (lines[0], lines[-1])))


def _write_help(parser: argparse.ArgumentParser) -> None:
    """Gives every option of the parser its text and its default, and every group the name that its options begin with."""
    docs = field_docs(TrainConfig)
    for action in parser._actions:
        if action.dest in RUN_GROUPS:
            action.help = "the options of this group together, as JSON"
        elif action.dest in docs:
            # argparse formats help texts with %, so a literal % is doubled.
            action.help = docs[action.dest].replace("%", "%%") + " (default: %(default)s)"
    for group in parser._action_groups:
        names = {action.dest.rpartition(".")[0] for action in group._group_actions if action.dest not in RUN_GROUPS}
        if str(group.title).startswith("<class"):
            (group.title,) = names


def field_docs(cls: type, prefix: str = "") -> dict[str, str]:
    """Returns {dotted name: help text} for the documented fields of a dataclass and of the dataclasses nested in it."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    hints, texts = typing.get_type_hints(cls), {name: text for base in bases for name, text in _texts_below_fields(base).items()}
    docs: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            docs |= field_docs(typing.cast(type, hints[field.name]), f"{name}.")
        elif field.name in texts:
            docs[name] = texts[field.name]
    return docs


def _texts_below_fields(cls: type) -> dict[str, str]:
    """Returns {field: docstring on one line}."""
    # Python keeps no docstrings of fields at run time, so they are read from the source.
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, below in itertools.pairwise(definition.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[statement.target.id] = " ".join(below.value.value.split())
    return found
