"""python -m fastbyol weights: what is in a weights file, and what of it would be used."""

from __future__ import annotations

import argparse
from typing import Any

from fastbyol.commands.shared_options import CHECKPOINT_HELP, changes_from
from fastbyol.config.arguments import path_text
from fastbyol.config.console import say


def add_weights(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "weights", help="list every key of a weights file and whether it is loaded", description=list_weights.__doc__
    )
    parser.add_argument("checkpoint", type=path_text, metavar="FILE", help=CHECKPOINT_HELP)
    parser.set_defaults(command=list_weights)


def list_weights(options: argparse.Namespace) -> None:
    """Prints a line for each key of another program's weights file: taken, taken under another name, or left out and why.

    Weights of another network end it with the same error as every command that loads them.
    """
    changes = changes_from(options.run_options)
    from fastbyol.export import match_encoder
    from fastbyol.run.foreign_weights import load_run_or_weights
    from fastbyol.run.initial_weights import load_matching

    run = load_run_or_weights(options.checkpoint, changes=changes)
    model = run.config.model
    if "encoder" in run.state:
        encoder, found = match_encoder(run)
        say(*found.lines())
        load_matching(encoder, found.weights, source=run.state["source"])
        say(f"{options.checkpoint}: {found.summary()}")
    else:
        say(*(f"{name}  taken" for name in run.state["byol"]), f"{options.checkpoint}: a checkpoint of fastbyol after step {run.step}")
    say(
        f"encoder: {model.encoder}, width {model.width}, stem {model.stem}, padding {model.padding}; images of {run.config.views.size_px} px"
    )
