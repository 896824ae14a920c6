"""Runs a script of data_prep/ in this process, as `python FILE` would: a process of its own costs half a second."""

from __future__ import annotations

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from fastbyol.host.signals import COMMAND_SIGNALS


def run_here(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Returns exit code, stdout and stderr of the script with these arguments."""
    out, errors = io.StringIO(), io.StringIO()
    argv = [str(script), *map(str, arguments)]
    code: object = 0
    handlers = {number: signal.getsignal(number) for number in COMMAND_SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), mock.patch.object(sys, "argv", argv):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), errors.getvalue())
