"""A user's mistake ends in one line and exit code 2: the exception, the bounds that raise it, and the entry points' catch."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable

USER_ERROR_EXIT = 2
HOLD_BACK_S = 3.0
"""Ranks other than 0 speak this much later: what all of them found is then said once, since torchrun ends the others when rank 0 leaves."""


class UserError(ValueError):
    """Something the user can put right: the message names the thing, its value and the way out."""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point: a UserError prints 'fastbyol: error: …' on stderr and exits with 2, anything else keeps its traceback."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                time.sleep(HOLD_BACK_S)
            print(f"fastbyol: error: {' '.join(str(error).split())}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
            sys.exit(USER_ERROR_EXIT)

    return guarded


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError 'name = value: must be allowed' unless the condition holds."""
    if not condition:
        raise UserError(f"{name} = {value!r}: must be {allowed}")


def require_probability(name: str, value: float) -> None:
    require(math.isfinite(value) and 0.0 <= value <= 1.0, name, value, "a probability in [0, 1]")


def require_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    ordered = len(value) == 2 and all(math.isfinite(v) for v in value) and low <= value[0] <= value[1] <= high
    require(ordered, name, value, f"an increasing pair within [{low:g}, {high:g}]")


def require_at_least(name: str, value: float, low: float) -> None:
    require(math.isfinite(value) and value >= low, name, value, f"a number >= {low:g}")


def require_positive(name: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, name, value, "a number > 0")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, name, value, "one of " + ", ".join(choices))
