"""Updates of the two networks: LARS for the online one, a moving average for the target. No data, no files, no command line."""

from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import check_update

__all__ = ["build_optimizer", "check_update"]
