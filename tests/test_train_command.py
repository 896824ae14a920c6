"""`python -m fastbyol train` is fastbyol/train.py: the same exit codes and signals, under torchrun too. And the start of every command is light."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from fastbyol import train
from fastbyol.__main__ import main
from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.run.provenance import script_typed
from tests.commands import SMALL_RUN, LaunchedRun, run_python

HEAVY = "print(sorted({'torch', 'numba', 'sklearn', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.parametrize("code", ["import fastbyol", "import fastbyol.__main__"])
def test_importing_the_package_loads_no_torch(code: str) -> None:
    assert run_python("-c", f"{code}; import sys; {HEAVY}").stdout == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["doctor", "--help"], ["presets", "cpu_demo"]])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from fastbyol.__main__ import main
try:
    main({arguments!r})
except SystemExit:
    pass
{HEAVY}
"""
    done = run_python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_help_of_train_lists_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert "--views.size_px" in said
    assert "-m fastbyol train" in said


def test_bad_input_ends_train_with_2_and_one_line() -> None:
    done = run_python("-m", "fastbyol", "train", "--preset", "cpu_demo", "--epoch", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"fastbyol: error: --epoch: no such option.*\n", done.stderr)


def test_a_device_without_room_for_the_batch_ends_train_with_2_and_one_line(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "train", too_large)
    with pytest.raises(SystemExit) as ended:
        train.main([*SMALL_RUN, "--data.train", str(image_folder), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastbyol: error: out of memory on cpu: 8 images in one forward pass, two views each, of resnet8 at ")
    assert "--rank_batch 4 " in line


@pytest.mark.parametrize("command", [["train", "--preset", "cpu_demo"], ["reproduce", "tau", "--data", "demo", "--out", "tables"]])
def test_a_signal_during_the_imports_of_a_command_that_trains_ends_it_with_75(command: list[str]) -> None:
    """The handlers stand before torch is imported, which takes seconds."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
from fastbyol.__main__ import main
main({command})
"""
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "stopped (SIGTERM) before the first step; the same command continues\n"


@pytest.mark.distributed
def test_ranks_that_torchrun_starts_by_the_command_save_after_a_signal_to_one_and_end_with_75(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*SMALL_RUN, "--epochs", "1000", "--data.train", str(image_folder), "--out", str(out)]
    with LaunchedRun(tmp_path / "log", *options, ranks=2, script=("-m", "fastbyol", "train")) as run:
        run.wait_for(r"\b3/\d+")
        os.kill(run.workers()[0], signal.SIGTERM)
        assert run.finish() == 1, "torchrun says 1 for everything but 0"
    assert re.search(r"stopped \(SIGTERM\): saved after step \d+ of \d+; the same command continues", run.log), run.log
    assert re.search(r"exitcode *: 75", run.log), run.log
    assert checkpoint_steps(out)
    assert json.loads((out / "provenance.json").read_text())["command"].startswith("-m fastbyol train --preset cpu_demo")


@pytest.mark.parametrize(
    ("path", "typed"),
    [
        ("/usr/bin/fastbyol", ["-m", "fastbyol"]),
        ("/x/fastbyol/__main__.py", ["-m", "fastbyol"]),
        ("fastbyol/train.py", ["fastbyol/train.py"]),
        ("/x/fastbyol/train.py", ["/x/fastbyol/train.py"]),
    ],
)
def test_the_command_of_a_run_is_written_so_that_it_can_be_typed_again(path: str, typed: list[str]) -> None:
    assert script_typed(path) == typed


def test_every_script_of_data_prep_is_its_command() -> None:
    for script, command in (("to_ffcv.py", "convert"), ("demo_data.py", "demo-data")):
        said = [run_python(*start, "--help").stdout for start in ((f"data_prep/{script}",), ("-m", "fastbyol", command))]
        assert said[0] == said[1] != ""
