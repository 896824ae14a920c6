"""argparse whose complaints are UserErrors, so that a mistyped option ends in one line as any other mistake does."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fastbyol.config.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Descriptions keep their line breaks; options may not be abbreviated."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")
