"""Ctrl-C and SIGTERM in a command of data_prep/: one line and the signal's exit code, at whatever moment; nothing where the reader leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.host.signals import Stopped, stoppable

SCRIPTS = sorted((Path(__file__).parents[1] / "data_prep").glob("[!_]*.py"))
WHILE_IMPORTING = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = [{script!r}, "--help"]
runpy.run_path({script!r}, run_name="__main__")
"""


def run_code(code: str) -> tuple[int, str, str]:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_stop_during_the_imports_is_one_line(script: Path) -> None:
    assert run_code(WHILE_IMPORTING.format(number=int(signal.SIGINT), script=str(script))) == (130, "", "fastbyol: stopped\n")


def test_a_stop_during_the_work_leaves_all_tidy_and_what_was_printed() -> None:
    code = """
import os, signal
from fastbyol.host.signals import end_at_once_when_stopped, stoppable
end_at_once_when_stopped()
@stoppable
def main():
    try:
        print("half", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("whole")
    finally:
        print("tidy")
main()
"""
    assert run_code(code) == (143, "half\ntidy\n", "fastbyol: stopped\n")


def test_a_stop_after_the_work_and_a_second_one_end_at_once() -> None:
    head = "import os, signal; from fastbyol.host.signals import stoppable\n"
    after = "stoppable(lambda: print('done', flush=True))(); os.kill(os.getpid(), signal.SIGINT); print('never')"
    assert run_code(head + after) == (130, "done\n", "fastbyol: stopped\n")
    twice = """
@stoppable
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("never")
main()
"""
    assert run_code(head + twice) == (130, "", "fastbyol: stopped\n")


def test_a_stop_with_a_message_of_its_own_says_that(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    @stoppable
    def main() -> None:
        raise Stopped(signal.SIGTERM, "x: stopped at 3 of 5 images")

    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 143
    assert capsys.readouterr().err == "fastbyol: x: stopped at 3 of 5 images\n"


@pytest.mark.parametrize("ends", ["", "raise SystemExit(1)"])
def test_a_reader_that_leaves_ends_a_command_silently(ends: str) -> None:
    code = f"""
import sys
from fastbyol.host.signals import stoppable
@stoppable
def main():
    for number in range(100_000):
        print(number)
    {ends}
main()
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "0\n"
    command.stdout.close()
    assert command.stderr is not None
    assert (command.stderr.read(), command.wait(timeout=60)) == ("", 141)
    command.stderr.close()


def test_an_output_on_a_full_disk_is_one_line() -> None:
    code = "from fastbyol.host.signals import stoppable\nstoppable(lambda: print('x' * 100_000))()"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "fastbyol: error: the output: No space left on device; make room, or write elsewhere\n",
    )
