"""`python -m fastbyol convert --to ffcv`, from a checkout."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

import sys

from fastbyol.__main__ import main

if __name__ == "__main__":
    stoppable(main)(["convert", "--to", "ffcv", *sys.argv[1:]])
