"""From the command line to a checked `TrainConfig`: a preset, then a YAML file, then dotted options, later ones winning."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence

from fastbyol.config.errors import UserError
from fastbyol.config.field_docs import field_docs
from fastbyol.config.plain import from_plain, nearest_name, to_plain
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import TrainConfig
from fastbyol.run_folder import flatten


def parse_train_config(arguments: Sequence[str] | None, *, usage: str) -> TrainConfig:
    """The run that the arguments describe.

    Args:
        arguments: as typed, without the program's name; None takes sys.argv's.
        usage: shown by --help.

    Raises:
        UserError: an unknown option (with the nearest one), a value of the wrong type or out of range.
    """
    import jsonargparse

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = jsonargparse.ArgumentParser(
        prog="fastbyol/train.py", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    parser.add_argument("--preset", default="r50_300ep", help="a named run to start from (python -m fastbyol presets lists them)")
    parser.add_argument("--config", action="config", help="a YAML file of options, for example a run folder's config.yaml")
    parser.add_class_arguments(TrainConfig, as_group=False)
    if {"-h", "--help"} & set(arguments):
        _explain(parser)
    parser.set_defaults(flatten(to_plain(preset_config(_preset_name(arguments)))))
    _refuse_unknown(arguments, parser)
    try:
        namespace = parser.parse_args(_file_first(arguments))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(_first_cause(str(error)) + _minus_hint(str(error), arguments)) from error
    values = namespace.as_dict()
    return from_plain(TrainConfig, {name: value for name, value in values.items() if name not in ("preset", "config")})


def _explain(parser: argparse.ArgumentParser) -> None:
    """Gives each option the text that stands below its field."""
    docs = field_docs(TrainConfig)
    for action in parser._actions:
        if action.dest in docs:
            action.help = docs[action.dest].replace("%", "%%") + " (default: %(default)s)"


def _preset_name(arguments: Sequence[str]) -> str:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default="r50_300ep")
    try:
        return early.parse_known_args(arguments)[0].preset
    except argparse.ArgumentError as error:
        raise UserError("preset: needs a name, for example --preset r50_300ep") from error


def _file_first(arguments: Sequence[str]) -> list[str]:
    """--config and its value moved to the front: jsonargparse lets the later one win, and what is typed must win over a file."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", action="append", default=[])
    known, rest = early.parse_known_args(list(arguments))
    return [*(f"--config={file}" for file in known.config), *rest]


def _refuse_unknown(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {f"--{name}" for name in flatten(to_plain(TrainConfig()))}
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name.startswith("--") and name not in known:
            raise UserError(f"{name}: no such option{nearest_name(name, known)}; --help lists them")


def _minus_hint(message: str, arguments: Sequence[str]) -> str:
    """argparse takes -1e-6 for an option: says how to give it."""
    values = [f"{name}={value}" for name, value in itertools.pairwise(arguments) if name in message and re.match(r"-[.\d]", value)]
    return f" (a value that begins with a minus: {values[0]})" if values else ""


def _first_cause(message: str) -> str:
    """jsonargparse's report of several lines as one: which option, what was expected, what was given."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("Parser key ", "")
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    return ": ".join(dict.fromkeys([lines[0], lines[-1]]))
