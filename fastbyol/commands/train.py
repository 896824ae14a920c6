"""python -m fastbyol train: pre-trains, as `fastbyol/train.py` does."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from fastbyol.host.signals import leave_at_once_on_signals


def add_train(commands: Any) -> None:
    """Adds the command to the parser's sub-commands. Its options are those of a run, which parse_train_config knows."""
    parser = commands.add_parser("train", help="pre-train an encoder on images without labels", add_help=False)
    parser.set_defaults(command=train_run)


def train_run(options: argparse.Namespace) -> None:
    """Pre-trains the run that the options describe, in this process."""
    leave_at_once_on_signals()  # the imports below take seconds
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a connection to a rank that died must raise, not end this process
    from fastbyol.train import main

    main(options.run_options)
