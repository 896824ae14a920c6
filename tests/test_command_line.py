"""What every command shares: both spellings of an option, what was meant by a mistyped word, and one line for a mistake of the user's."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.__main__ import _build_parser, main
from fastbyol.config.arguments import as_spelled
from fastbyol.config.errors import one_line_errors
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import RUN_OPTIONS, TrainConfig
from fastbyol.run.command_line import parse_train_config
from tests.commands import ROOT

NO_CAPABILITIES = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
"""Begins a command that root's rights to read everything are taken from."""


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line with which the command ends as for a mistake of the user's."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("fastbyol: error: ")
    assert line.count("\n") == 1
    return line.removeprefix("fastbyol: error: ").rstrip()


# ---- spelling


def test_dashes_and_underscores_inside_an_option_mean_the_same() -> None:
    known = ["--max-side", "--dry_run", "--optim.base_lr", "--out"]
    typed = ["--max_side", "3", "--dry-run", "--optim.base-lr=1e-3", "--out=a-b_c", "d-e_f", "--no-such_option", "--", "--dry-run"]
    spelled = ["--max-side", "3", "--dry_run", "--optim.base_lr=1e-3", "--out=a-b_c", "d-e_f", "--no-such_option", "--", "--dry-run"]
    assert as_spelled(typed, known) == spelled


def options_of_every_command() -> list[tuple[str, str]]:
    """Returns command and option for every option with a dash or underscore in its name."""
    (commands,) = _build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    found = []
    for name, parser in commands.choices.items():  # type: ignore[union-attr]
        if parser._later:
            parser._later(parser)
        found += [(name, option) for option in parser._option_string_actions if option.startswith("--") and set("-_") & set(option[2:])]
    return found


def test_every_command_knows_its_options_in_the_other_spelling(capsys) -> None:
    options = options_of_every_command()
    assert {("convert", "--max-side"), ("export", "--fold_bn")} <= set(options)
    for command, option in options:
        other = "--" + option[2:].translate(str.maketrans("-_", "_-"))
        assert "unrecognized" not in said(capsys, command, other), "it may lack a value, or others may be required"


def test_options_of_a_run_and_of_a_task_are_known_in_the_other_spelling(capsys) -> None:
    config = parse_train_config(["--optim.base-lr", "0.5", "--global-batch=64", "--preset=r50_300ep"], usage="")
    assert (config.optim.base_lr, config.global_batch) == (0.5, 64)
    assert as_spelled(["--print-config", "--optim.warmup-epochs"], RUN_OPTIONS) == ["--print_config", "--optim.warmup_epochs"]
    nowhere = "checkpoint = 'nowhere': no such file or folder"
    assert nowhere in said(capsys, "weights", "nowhere", "--views.size-px", "32")
    assert nowhere in said(capsys, "evaluate", "linear", "--settings", "paper", "--dry-run", "--checkpoint=nowhere", "--data=nowhere")
    assert nowhere in said(
        capsys, "evaluate", "knn", "--checkpoint", "nowhere", "--data", "nowhere", "--model.stem=small2", "--views.size-px=32"
    )
    assert "--optim.base_lr" in RUN_OPTIONS
    assert TrainConfig().optim.base_lr == 0.3


def test_an_option_given_in_both_spellings_is_given_twice(capsys) -> None:
    assert said(capsys, "export", "--fold_bn", "yes", "--fold-bn", "no").startswith("--fold_bn: is given twice")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("exprot", "invalid choice: 'exprot' (did you mean export?)"),
        ("evaluate lineer", "invalid choice: 'lineer' (did you mean linear?)"),
        ("demo-data --out x --trainperclass 3", "--trainperclass 3 (did you mean --train-per-class?) (fastbyol demo-data --help lists the options)"),
        ("export --checkpoint x --to onnx --out y --fold-bm yes", "--fold-bm (did you mean --fold_bn?) (fastbyol export --help lists the options)"),
        ("weights x --view.size_px 3", "--view.size_px (did you mean --views.size_px?) (fastbyol weights --help lists the options)"),
        ("evaluate knn --checkpoint x --data y --sub z", "--sub: is not an option of evaluate knn (did you mean --subset?) (python -m fastbyol evaluate knn"),
        ("train --optim.base-lrr 3", "--optim.base-lrr: no such option (did you mean --optim.base_lr?); python -m fastbyol train --help"),
        ("presets a b", "unrecognized arguments: b (fastbyol presets --help lists the options)"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_answered_with_the_nearest_and_the_help_of_its_command(typed: str, line: str, capsys) -> None:
    assert line in said(capsys, *typed.split())


def test_the_nearest_name_is_found_in_either_case_and_not_for_its_dashes() -> None:
    assert nearest_name("ONNX", ["timm", "onnx"]) == " (did you mean onnx?)"
    assert nearest_name("--k", ["--to"], prefix="--") == ""


# ---- paths


@pytest.mark.parametrize(
    "typed",
    [
        ["export", "--to", "onnx", "--out", "x", "--checkpoint", ""],
        ["export", "--checkpoint", "x", "--to", "onnx", "--out", ""],
        ["evaluate", "knn", "--data", "x", "--checkpoint", ""],
        ["evaluate", "knn", "--data", "", "--checkpoint", "x"],
        ["evaluate", "knn", "--data", "x", "--checkpoint", "x", "--compare", ""],
        ["evaluate", "linear", "--settings", "paper", "--data", "x", "--checkpoint", "x", "--compare", "other="],
        ["report", "--data", "x", "--run="],
        ["weights", ""],
        ["compare", "a", ""],
        ["info", ""],
        ["neighbours", "--features", "", "--query", "x", "--out", "y"],
    ],
)
def test_an_empty_path_is_refused_and_does_not_mean_the_current_folder(typed: list[str], capsys) -> None:
    assert "empty; give " in said(capsys, *typed)


# ---- files that the system refuses


@pytest.mark.parametrize("name", ["EACCES", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EIO", "EROFS"])
def test_a_file_that_the_system_refuses_costs_one_line_with_its_name_and_the_reason(name: str, capsys) -> None:
    number = getattr(errno, name)

    @one_line_errors
    def fails() -> None:
        raise OSError(number, os.strerror(number), "photos/a\n.png")

    with pytest.raises(SystemExit) as ended:
        fails()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"fastbyol: error: photos/a .png: cannot be used ({os.strerror(number)}); ")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x"), OSError(errno.EACCES, "no name"), OSError(errno.EBADF, "?", 3)]
)
def test_what_may_be_a_bug_keeps_its_traceback(error: OSError) -> None:
    @one_line_errors
    def fails() -> None:
        raise error

    with pytest.raises(OSError, match=str(error.args[1]).replace("?", r"\?")):
        fails()


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbyol.evaluation.contact_sheet.write_contact_sheet", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["views", "--data", "photos", "--out", "views.png"])
    assert (ended.value.code, capsys.readouterr().err) == (130, "fastbyol: stopped\n")


def test_help_shows_a_description_of_several_paragraphs_without_indents(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "\nok: works; low: works with a limit" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which(NO_CAPABILITIES[0]), reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered_costs_every_command_one_line(tmp_path: Path) -> None:
    noread = tmp_path / "noread"
    noread.mkdir()
    noread.chmod(0)
    typed = [
        "export --checkpoint noread --to onnx --out x.onnx",
        "embed --checkpoint noread --data . --out x.npz",
        "evaluate knn --checkpoint noread --data .",
        "evaluate linear --settings paper --checkpoint noread/x.pth --data .",
        "weights noread",
        "weights noread/x.pth",
        "report --run noread --data .",
        "info noread",
        "info noread/x.beton",
        "verify noread/x.beton",
        "convert --data noread --out x.beton",
        "compare noread noread/run",
        "neighbours --features noread/f.npz --query a --out x.png",
        "train --preset cpu_demo --data.train noread/x --out run",
        "train --preset cpu_demo --data.train . --out noread/run",
        "train --config noread/x.yaml --out run",
        "demo-data --out noread/x",
        "doctor --quick --path noread/x",
    ]
    script = f"""
from fastbyol.__main__ import main
for typed in {typed!r}:
    try:
        main(typed.split())
        print(typed, "ended with 0")
    except SystemExit as ended:
        if ended.code != 2:
            print(typed, "ended with", ended.code)
    except BaseException as error:
        print(typed, repr(error))
"""
    taken = NO_CAPABILITIES if os.geteuid() == 0 else ()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*taken, sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastbyol: error: ")]
    assert len(lines) == len(typed)
    assert all("noread" in line and "Permission denied" in line for line in lines), done.stderr


def test_a_run_that_is_not_there_is_named_by_the_option_that_was_typed(capsys) -> None:
    assert said(capsys, "report", "--run", "nowhere", "--data", "x").startswith("run = 'nowhere': no such file or folder")
    assert said(capsys, "weights", "nowhere").startswith("checkpoint = 'nowhere': no such file or folder")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_an_output_without_a_name_is_one_line(out: str, image_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    Path("thesis.tex").touch()
    assert "gives no name for the output" in said(capsys, "convert", "--data", str(image_folder), "--to", "dali", "--out", out)
    for name in ("embed --checkpoint x --data y", "tune --data x", "views --data x", "info x --grid", "neighbours --features x --query y"):
        typed = name.split() + ([] if name.endswith("--grid") else ["--out"])
        assert "must " in said(capsys, *typed, out) or "no such file" in said(capsys, *typed, out)


# ---- packages that are not installed


@pytest.mark.parametrize(
    ("module", "typed", "line"),
    [
        ("jsonargparse", "train --out x", "jsonargparse is not installed; pip install jsonargparse (python -m fastbyol doctor"),
        ("yaml", "train --out x", "pyyaml is not installed; pip install pyyaml (python -m fastbyol doctor"),
        ("torch", "weights x.pth", "torch is not installed; pip install torch (python -m fastbyol doctor"),
        ("no_such_module_of_ours", "presets", ""),
    ],
)
def test_a_needed_package_that_is_not_installed_costs_one_line_with_the_command(module: str, typed: str, line: str) -> None:
    done = without_package(module, typed)
    assert done.returncode == (2 if line else 0), done.stderr
    assert (f"fastbyol: error: {line}" if line else "") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_that_is_missing_inside_a_package_keeps_its_traceback() -> None:
    @one_line_errors
    def fails() -> None:
        import torch.no_such_part  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        fails()


def test_doctor_lists_packaging_as_broken_where_it_is_missing(tmp_path: Path) -> None:
    done = without_package("packaging", "doctor --quick")
    assert "Traceback" not in done.stderr
    assert re.search(r"broken +packaging +not installed: nothing works\n +-> pip install packaging", done.stdout)


def without_package(module: str, typed: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process whose Python does not have the package."""
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
import importlib.metadata as metadata
version = metadata.version
def without(package):
    if package == {module!r}:
        raise metadata.PackageNotFoundError(package)
    return version(package)
metadata.version = without
from fastbyol.__main__ import main
main({typed.split()!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=180)
