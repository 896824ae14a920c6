"""Unusual environments of a command: '~' that no shell expands, names that are not UTF-8 or hold escape sequences, ASCII terminals, no
home, volumes, links.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fastbyol.__main__ import main as fastbyol_command
from fastbyol.config.arguments import OneLineParser, expand_home, through_links
from fastbyol.config.console import PrintableFormatter, accept_any_text, in_utf8, printable, say
from fastbyol.config.errors import UserError, environment_integer, one_line_errors
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import DataConfig, TrainConfig
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.conversion.work_folder import work_path
from fastbyol.data.formats.manifest import TAR_MANIFEST
from fastbyol.evaluation import page
from fastbyol.evaluation.report import Report
from fastbyol.host import compile_cache
from fastbyol.ranks.process_group import join_process_group
from fastbyol.ranks.slurm_environment import adopt_slurm_environment
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.folder import open_run_folder
from fastbyol.run.log import RunLog, configure_logging
from fastbyol.tuning.report import check_output, config_yaml, write_config
from tests.commands import DATA_PREP, ROOT, run_here, run_python
from tests.images import smooth_image, write_files

LATIN1 = os.fsdecode(b"caf\xe9")
ESCAPES = "\x1b]0;title\x07\x1b[8mhidden\x9b2J\nfastbyol: forged\u202e"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_files(tmp_path / "pictures", {f"{name}/{i}.jpg": smooth_image(i, 40, 48) for name in "ab" for i in range(3)})


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Removes the variables of torchrun and srun from the environment."""
    for name in [name for name in os.environ if name in LAUNCHED or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return monkeypatch


# '~'


@pytest.mark.parametrize("option", ["out", "init_from", "data.train", "data.val", "precision.compile_cache"])
@pytest.mark.parametrize("given", ["typed", "with =", "file", "python"])
def test_every_path_of_a_run_may_begin_with_a_tilde(option: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    needed = {"data.val": ["--monitors.knn_every_epochs", "1"], "precision.compile_cache": ["--precision.compile", "true"]}.get(option, [])
    group, _, name = option.rpartition(".")
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({group: {name: "~/x"}} if group else {name: "~/x"}))
    typed = {"typed": [f"--{option}", "~/x"], "with =": [f"--{option}=~/x"], "file": ["--config", "~/some.yaml"], "python": []}[given]
    if given == "python":
        config: Any = DataConfig(train="~/x") if option == "data.train" else TrainConfig(out="~/x")
        assert (config.train if option == "data.train" else config.out) == str(tmp_path / "x")
        return
    plain = to_plain(parse_train_config([*typed, *needed], usage=""))
    assert (plain[group] if group else plain)[name] == str(tmp_path / "x")


def test_an_unknown_home_folder_is_refused_but_a_file_of_such_a_name_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"~nobody-here/x: no home folder is known for ~nobody-here"):
        expand_home("~nobody-here/x")
    with pytest.raises(UserError, match=r"out = '~nobody-here/x': no home"):
        TrainConfig(out="~nobody-here/x")
    (tmp_path / "~nobody-here").mkdir()
    assert expand_home("~nobody-here/x") == "~nobody-here/x"
    assert expand_home("a~b/~") == "a~b/~"


@pytest.mark.parametrize("script", ["to_ffcv.py", "to_dali.py", "subset.py", "demo_data.py", "info.py", "verify.py"])
def test_every_script_of_data_prep_takes_a_tilde(script: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = {
        "to_ffcv.py": "x.beton",
        "to_dali.py": "x",
        "subset.py": "x.txt",
        "demo_data.py": "x",
        "info.py": "x.png",
        "verify.py": "x.beton",
    }[script]
    if script == "verify.py":
        write_beton(pictures, out=tmp_path / out, workers=1)
    arguments = {
        "to_ffcv.py": ["--data=~/pictures", f"--out=~/{out}", "--workers", "1"],
        "to_dali.py": ["--data=~/pictures", f"--out=~/{out}", "--workers", "1"],
        "subset.py": ["--data=~/pictures", f"--out=~/{out}", "--images", "2"],
        "demo_data.py": ["--kind", "scenes", f"--out=~/{out}", "--train-per-class", "1", "--val-per-class", "1"],
        "info.py": ["~/pictures", f"--grid=~/{out}"],
        "verify.py": [f"~/{out}", "--source=~/pictures"],
    }[script]
    monkeypatch.chdir(tmp_path / "pictures")
    done = run_here(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / out).exists()
    assert not (tmp_path / "pictures" / "~").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "knn", "--checkpoint=~/none", "--data", "x"], "{home}/none"),
        (["report", "--run=~/none", "--data", "x"], "{home}/none"),
        (["views", "--data=~/none", "--out=~/v.png"], "{home}/none: no such file"),
        (["tune", "--data=~/none", "--out=~/t.yaml"], "{home}/none: no such file"),
        (["tune", "--data=x", "--out=~/none/t.yaml"], "--out {home}/none/t.yaml"),
    ],
)
def test_every_command_takes_a_tilde(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        fastbyol_command(arguments)
    assert ended.value.code == 2
    assert said.format(home=tmp_path) in capsys.readouterr().err


# An option given twice


@pytest.mark.parametrize(
    "typed", [["--preset", "cpu_demo", "--preset=r50_300ep"], ["--config=a.yaml", "--seed", "1", "--config", "b.yaml"]]
)
def test_a_second_set_of_options_is_refused_by_name(typed):
    with pytest.raises(UserError, match=rf"{typed[0].partition('=')[0]}: is given twice"):
        parse_train_config(typed, usage="")


def test_a_training_option_given_twice_takes_the_last_value_with_a_warning(caplog):
    config = parse_train_config(["--epochs=1", "--seed", "2", "--views.size_px", "64", "--epochs", "3", "--views.size_px=96"], usage="")
    assert (config.epochs, config.views.size_px) == (3, 96)
    assert [record.message for record in caplog.records] == ["--epochs, --views.size_px: given more than once, the last one counts"]


@pytest.mark.parametrize("again", [["--out=b"], ["--out", "b"], ["--many", "3", "4"], ["--flag"]])
def test_an_option_of_other_commands_given_twice_is_refused_unless_it_collects_a_list(again):
    parser = OneLineParser()
    commands = parser.add_subparsers()
    command = commands.add_parser("do")
    command.add_argument("--out", type=Path)
    command.add_argument("--many", nargs="+")
    command.add_argument("--flag", action="store_true")
    command.add_argument("--each", action="append")
    once = ["do", "--out", "a", "--many", "1", "2", "--flag", "--each", "1", "--each", "2"]
    for _ in range(2):  # a parser may be used again
        found = parser.parse_args(once)
        assert vars(found) == {"out": Path("a"), "many": ["1", "2"], "flag": True, "each": ["1", "2"]}
    with pytest.raises(UserError, match=f"{again[0].partition('=')[0]}: is given twice"):
        parser.parse_args([*once, *again])


def test_a_key_given_twice_in_a_file_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("epochs: 1\nviews:\n  size_px: 64\n  size_px: 96\n")
    with pytest.raises(UserError, match=r"x.yaml'?: views.size_px: is given twice"):
        parse_train_config(["--config", str(file)], usage="")


def test_an_empty_path_is_refused_and_not_taken_for_the_current_folder(pictures):
    done = run_here("to_dali.py", "--data", pictures, "--out", "")
    assert done.returncode == 2
    assert "argument --out: is empty" in done.stderr


# What is printed and logged


def test_names_can_neither_give_the_terminal_orders_nor_forge_a_line():
    assert printable(ESCAPES) == r"\x1b]0;title\x07\x1b[8mhidden\x9b2J\nfastbyol: forged\u202e"
    assert printable(LATIN1) == r"caf\xe9"
    assert printable("\ud800 a\u2028b\r") == r"\ud800 a\u2028b\r"
    for fine in ("plain", "été 漢字 ✓ […]", "nim\u200cfasele", "a\u00a0b", "👩\u200d🔬"):
        assert printable(fine) == fine


def test_errors_logs_and_lines_are_printable(capsys, tmp_path):
    @one_line_errors
    def fails() -> None:
        say(f"looked at {ESCAPES}")
        raise UserError(f"{ESCAPES}: is odd")

    with pytest.raises(SystemExit):
        fails()
    printed = capsys.readouterr()
    configure_logging(tmp_path / "train.log")
    log = logging.getLogger("fastbyol")
    log.warning("class %s", ESCAPES)
    try:
        raise OSError(ESCAPES)
    except OSError:
        log.exception("lost")
    configure_logging()
    written = (tmp_path / "train.log").read_text()
    for text in (printed.out, printed.err, written):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert "hidden" in text
    assert printed.out.count("\n") == printed.err.count("\n") == 1
    assert r"hidden\x9b2J\nfastbyol" in written.splitlines()[0]
    assert "Traceback" in written, "whose lines stay lines"
    assert len(written.splitlines()) > 4


def test_a_warning_of_a_command_without_a_log_is_printable_too():
    accept_any_text()
    assert isinstance(logging.lastResort, logging.Handler)
    assert isinstance(logging.lastResort.formatter, PrintableFormatter)


def test_no_module_prints_past_the_one_place():
    bare = [
        path.relative_to(ROOT)
        for folder in ("fastbyol", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "console.py" and any(line.strip().startswith("print(") for line in path.read_text(encoding="utf-8").splitlines())
    ]
    assert not bare


def test_class_and_file_names_pass_through_every_script_and_come_back_whole(tmp_path: Path):
    names = [ESCAPES.replace("\n", "").replace("/", ""), LATIN1, "été ✓"]
    data, beton, chosen = tmp_path / "data", tmp_path / "x.beton", tmp_path / "x.txt"
    for name in names:
        picture = smooth_image(0, 40, 48)
        write_files(data / name, {f"{name}.jpg": picture, "1.jpg": picture, "cut.jpg": b"\xff\xd8\xff"})
    for script, *arguments in (
        ["to_ffcv.py", "--data", data, "--out", beton, "--workers", "1"],
        ["to_ffcv.py", "--data", data, "--out", tmp_path / "y.beton", "--workers", "1", "--strict"],
        ["verify.py", beton, "--source", data],
        ["info.py", beton, "--grid", tmp_path / "x.png"],
        ["info.py", data, "--json"],
        ["subset.py", "--data", data, "--images", "9", "--out", chosen],
    ):
        done = run_here(str(script), *arguments, encoding="ascii")
        said = done.stdout + done.stderr
        assert done.returncode == (1 if "--strict" in arguments else 0), said
        assert not set(said.encode()) - set(b"\n") - set(range(32, 127)), said
        assert "Traceback" not in said
    assert set(json.loads(beton.with_name("x.beton.json").read_text())["class_names"]) == set(names)
    assert {os.fsencode(f"{name}/{name}.jpg") for name in names} <= set(chosen.read_bytes().split(b"\n"))


def test_an_ascii_terminal_shows_the_signs_it_lacks_as_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    accept_any_text()
    say("✓ été")
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u2713 \\xe9t\\xe9\n"


def test_a_command_whose_stdout_is_closed_does_its_work(pictures, tmp_path):
    command = f'"{sys.executable}" "{DATA_PREP}/to_ffcv.py" --data "{pictures}" --out "{tmp_path}/x.beton" --workers 1 >&-'
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.beton").exists()


def test_the_page_shows_names_that_are_not_utf8_and_control_characters_as_text(tmp_path, monkeypatch):
    parts = [page.table([LATIN1], rows=[[ESCAPES, "<b>"]]), page.command(f"one {LATIN1}\ntwo"), page.image(b"", alt=LATIN1)]
    text = page.page(LATIN1, lead=ESCAPES, sections=parts)
    monkeypatch.setattr("fastbyol.evaluation.report.report_page", lambda report: text)
    report = Report.__new__(Report)
    object.__setattr__(report, "run", SimpleNamespace(folder=tmp_path))
    written = report.write().read_text(encoding="utf-8")
    assert written == text
    assert r"caf\xe9" in text
    assert "one caf\\xe9\ntwo" in text
    assert "&lt;b&gt;" in text
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_a_run_logs_into_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / LATIN1
    config = TrainConfig(out=str(folder), data=DataConfig(train=str(tmp_path / LATIN1)))
    open_run_folder(config)
    assert TrainConfig(**{"out": yaml.safe_load((folder / "config.yaml").read_text())["out"]}).out == str(folder)
    assert json.loads((folder / "provenance.json").read_text())["world_size"] == 1
    with RunLog(folder, config, total_steps=1, first_step=0) as log:
        record = dict.fromkeys(("loss", "lr", "tau", "images_per_s_per_device", "data_wait_share", "probe_top1", "epoch"), 0.5)
        log.write({**record, "step": 0, "projection_std": 1.0, "effective_rank": 1.0, "mean_cosine": 0.0, "alarm": None})
    configure_logging()
    assert list((folder / "tensorboard").iterdir())
    assert in_utf8(tmp_path) == str(tmp_path)


def test_the_written_settings_hold_the_command_in_printable_comments(tmp_path):
    text = config_yaml(TrainConfig(data=DataConfig(train=LATIN1)), {"data.train": ESCAPES}, head=[f"--data {LATIN1}{ESCAPES}"])
    write_config(tmp_path / "x.yaml", text)
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\udce9"}
    assert parse_train_config(["--config", str(tmp_path / "x.yaml")], usage="").data.train == LATIN1


# Where compiled code is kept


def test_a_kernel_compiles_where_no_folder_can_be_written(monkeypatch, caplog):
    monkeypatch.setattr("numba.core.caching.FunctionCache._impl_class", _nowhere)
    monkeypatch.setattr(compile_cache, "private_folder", lambda: None)
    compile_cache._say_once.cache_clear()
    kernels = [compile_cache.njit(cache=True)(lambda x, y=y: x + y) for y in range(2)]
    assert [kernel(1) for kernel in kernels] == [1, 2]
    assert [record.message for record in caplog.records if "numba" in record.message] == [
        "numba finds no writable cache folder, not even a temporary one: each start compiles again; set NUMBA_CACHE_DIR"
    ]


def _nowhere(*_: Any) -> Any:
    raise RuntimeError("cannot cache function: no locator available")


def test_where_numba_finds_no_folder_the_cache_is_in_a_private_one_for_us_and_our_processes(tmp_path):
    """Copies one kernel's module, with a file where its __pycache__ would be, and sets a home folder that does not exist."""
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "kernel.py").write_text(
        "from fastbyol.host.compile_cache import njit\n@njit(cache=True)\ndef twice(x):\n    return 2 * x\n"
        "import os\nprint(twice(21), sum(twice.stats.cache_hits.values()), os.environ['NUMBA_CACHE_DIR'])\n"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"},
        **{"PYTHONPATH": str(ROOT), "HOME": "/dev/null/home", "XDG_CACHE_HOME": "/dev/null/cache", "TMPDIR": str(tmp_path)},
    }
    folder = tmp_path / f"fastbyol-cache-{os.getuid()}"
    for hits in (0, 1):
        done = run_python(tmp_path / "kernel.py", env=environment)
        assert done.stdout == f"42 {hits} {folder}/numba\n", done.stderr
        assert done.stderr.count("\n") == 1
        assert f"numba finds no writable cache folder: using {folder}" in done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_of_a_kernel_that_is_cut_short_or_cannot_be_written_costs_a_compilation(tmp_path, monkeypatch, caplog):
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def thrice(x: int) -> int:
        return 3 * x

    compile_cache.njit(cache=True)(thrice)(1)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".nbi", ".nbc"}
    for suffix in (".nbi", ".nbc"):
        for file in files:
            if file.suffix == suffix:
                file.write_bytes(file.read_bytes()[:50])
        assert compile_cache.njit(cache=True)(thrice)(1) == 3
    again = compile_cache.njit(cache=True)(thrice)
    assert again(1) == 3
    assert sum(again.stats.cache_hits.values()) == 1, "the cache is whole again"
    for file in files:
        file.unlink()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", lambda *_: (_ for _ in ()).throw(full))
    compile_cache._say_once.cache_clear()
    assert compile_cache.njit(cache=True)(thrice)(1) == 3
    assert "cannot be written (No space left on device)" in caplog.text


def test_a_temporary_folder_that_another_user_could_have_filled_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compile_cache.private_folder.cache_clear()
    try:
        folder = tmp_path / f"fastbyol-cache-{os.getuid()}"
        folder.mkdir()
        folder.chmod(0o777)
        assert compile_cache.private_folder() is None
        folder.rmdir()
        folder.symlink_to(tmp_path)
        compile_cache.private_folder.cache_clear()
        assert compile_cache.private_folder() is None
    finally:
        compile_cache.private_folder.cache_clear()


@pytest.mark.parametrize(
    ("variable", "use"), [("TRITON_CACHE_DIR", "give_triton_a_cache"), ("TORCHINDUCTOR_CACHE_DIR", "give_inductor_a_cache")]
)
def test_triton_and_torch_compile_keep_their_own_place_or_get_a_private_one(variable, use, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "private_folder", lambda: tmp_path / "private")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    getattr(compile_cache, use)()
    assert "private" not in os.environ.get(variable, "")
    monkeypatch.setenv("HOME", "/dev/null/home")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/cache")
    getattr(compile_cache, use)()
    assert os.environ[variable].startswith(str(tmp_path / "private"))


# What a launcher left in the environment


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2: is in the environment, but RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': this environment variable must be an integer"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0: must be"),
        ({"RANK": "1"}, "RANK = 1: must be in .0, WORLD_SIZE., and WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK = 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK = -1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "http"}, "MASTER_PORT = 'http'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "99999"}, "MASTER_PORT = 99999"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK = 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "8(x2)"}, "SLURM_STEP_NUM_TASKS = '8.x2.'"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS = 8: .*SLURM_NODEID"),
    ],
)
def test_half_a_launchers_environment_is_one_line(environment, said, no_launcher):
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    with pytest.raises(UserError, match=said):
        join_process_group()


@pytest.mark.parametrize(
    "environment", [{}, dict.fromkeys(LAUNCHED, ""), {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}]
)
def test_an_empty_variable_is_one_that_is_not_set(environment, no_launcher):
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    process = join_process_group()
    assert (process.rank, process.world_size) == (0, 1)
    assert environment_integer("LOCAL_RANK", 7) == 7


SRUN = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    **{"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_STEP_NODELIST": "localhost"},
}


def test_what_is_typed_under_srun_pty_trains_alone_and_says_so(caplog):
    environment = SRUN | {"SLURM_PTY_PORT": "40001"}
    assert not adopt_slurm_environment(environment)
    assert "WORLD_SIZE" not in environment
    assert "srun --pty has 8 tasks" in caplog.text
    with pytest.raises(UserError, match="SLURM_PROCID = 3: srun --pty serves its first task only"):
        adopt_slurm_environment(environment | {"SLURM_PROCID": "3"})


def test_a_world_size_left_over_does_not_change_what_srun_says():
    environment = SRUN | {"WORLD_SIZE": "2", "RANK": "", "MASTER_PORT": "29500"}
    assert adopt_slurm_environment(environment)
    assert (environment["WORLD_SIZE"], environment["RANK"], environment["MASTER_PORT"]) == ("8", "0", "29500")


def test_missing_ranks_that_slurm_announced_are_reported_as_slurms(no_launcher):
    from fastbyol.config.errors import Lost

    for name, value in (SRUN | {"SLURM_JOB_ID": str(os.getpid())}).items():
        no_launcher.setenv(name, value)
    for name in LAUNCHED:  # what is adopted goes with the test
        no_launcher.setenv(name, "")
    with pytest.raises(Lost, match="because SLURM_STEP_NUM_TASKS = 8: .*srun python -m fastbyol train"):
        join_process_group(timeout_s=1)


# Folders and links that are there before


@pytest.mark.parametrize("there", [[], ["lost+found"]])
def test_shards_fill_a_folder_that_is_there_and_is_empty(there, pictures, tmp_path):
    out = tmp_path / "volume"
    for name in ("", *there):
        (out / name).mkdir()
    inode = out.stat().st_ino
    write_tar_shards(pictures, out=tmp_path / "beside", workers=1)
    write_tar_shards(pictures, out=out, workers=1)
    assert out.stat().st_ino == inode, "a mounted volume cannot be renamed"
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "beside").iterdir()} | set(there)
    for file in (tmp_path / "beside").iterdir():
        if file.name != TAR_MANIFEST:
            assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_tar_shards(pictures, out=out, workers=1)
    write_tar_shards(pictures, out=out, workers=1, overwrite="replace")


def test_a_folder_with_anything_of_somebodys_is_not_filled(pictures, tmp_path):
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "thesis.tex").write_text("x")
    for overwrite in ("refuse", "replace"):
        with pytest.raises(UserError, match="is a folder that no conversion made"):
            write_tar_shards(pictures, out=tmp_path / "volume", workers=1, overwrite=overwrite)
    assert [file.name for file in (tmp_path / "volume").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_filling_a_folder_that_was_cut_off_goes_on_where_it_was(moved, pictures, tmp_path, monkeypatch):
    """The conversion is interrupted while it moves its finished files into place, after `moved` of them."""
    out = tmp_path / "volume"
    out.mkdir()
    real, done = os.replace, []

    def dies(source: Any, target: Any) -> None:
        if Path(target).parent == out and len(done) == moved:
            raise KeyboardInterrupt
        done.extend([target] if Path(target).parent == out else [])
        real(source, target)

    monkeypatch.setattr("fastbyol.data.conversion.work_folder.os.replace", dies)
    monkeypatch.setattr("fastbyol.data.conversion.work_folder.WorkFolder.close", lambda self: os.close(self._lock))
    with pytest.raises(KeyboardInterrupt):
        write_tar_shards(pictures, out=out, workers=1)
    assert work_path(out) == out / ".partial"
    assert not (out / TAR_MANIFEST).exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists already"):
        write_tar_shards(pictures, out=out, workers=1)
    write_tar_shards(pictures, out=tmp_path / "beside", workers=1)
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "beside").iterdir()}


def test_a_mounted_volume_is_not_replaced_and_nothing_is_converted_first(pictures, tmp_path, monkeypatch):
    write_tar_shards(pictures, out=tmp_path / "volume", workers=1)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UserError, match="is a mounted volume"):
        write_tar_shards(pictures, out=tmp_path / "volume", workers=1, overwrite="replace")


def test_the_demo_fills_a_new_volume(tmp_path):
    (tmp_path / "demo" / "lost+found").mkdir(parents=True)
    inode = (tmp_path / "demo").stat().st_ino
    done = run_here("demo_data.py", "--out", tmp_path / "demo", "--kind", "scenes", "--train-per-class", "1", "--val-per-class", "1")
    assert done.returncode == 0, done.stderr
    assert {"train", "val", "lost+found"} <= {file.name for file in (tmp_path / "demo").iterdir()}
    assert (tmp_path / "demo").stat().st_ino == inode


@pytest.mark.parametrize("there", [[], ["lost+found"]])
def test_a_run_begins_in_a_folder_that_is_there_and_is_empty(there, tmp_path):
    for name in ("", *there):
        (tmp_path / "run" / name).mkdir()
    folder = open_run_folder(TrainConfig(out=str(tmp_path / "run")))
    assert (folder / "config.yaml").exists()


@pytest.fixture
def link(tmp_path: Path) -> Any:
    """Creates a link in home/ to a name in scratch/ that exists or does not exist yet."""
    for name in ("home", "scratch"):
        (tmp_path / name).mkdir()

    def make(name: str) -> tuple[Path, Path]:
        (tmp_path / "home" / name).symlink_to(tmp_path / "scratch" / name)
        return tmp_path / "home" / name, tmp_path / "scratch" / name

    return make


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_written_to_a_link_goes_where_it_points(times, link, pictures, tmp_path):
    places = {name: link(name) for name in ("x.beton", "shards", "run", "x.yaml", "x.txt", "x.png", "report.html")}
    for _ in range(times):
        write_beton(pictures, out=places["x.beton"][0], workers=1, overwrite="replace")
        write_tar_shards(pictures, out=places["shards"][0], workers=1, overwrite="replace")
        open_run_folder(TrainConfig(out=str(places["run"][0])))
        check_output(places["x.yaml"][0], overwrite=True)
        write_config(places["x.yaml"][0], "epochs: 1\n")
        run_here("subset.py", "--data", pictures, "--images", "2", "--out", places["x.txt"][0], "--overwrite")
        run_here("info.py", pictures, "--grid", places["x.png"][0])
        _write_page(tmp_path / "home")
    for at, to in places.values():
        assert at.is_symlink(), at
        assert to.exists(), to
        assert not to.is_symlink()
    assert (tmp_path / "scratch" / "x.beton.json").exists()
    assert (places["shards"][1] / TAR_MANIFEST).exists()
    assert (places["run"][1] / "config.yaml").exists()


def _write_page(folder: Path) -> None:
    report = Report.__new__(Report)
    object.__setattr__(report, "run", SimpleNamespace(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbyol.evaluation.report.report_page", lambda report: "<html>")
        report.write()


def test_the_converter_says_where_it_went_and_a_link_to_itself_is_refused(link, pictures, tmp_path):
    at, to = link("x.beton")
    done = run_here("to_ffcv.py", "--data", pictures, "--out", at, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert f"{to}: 6 images" in done.stdout
    loop = tmp_path / "loop.beton"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="is a link that leads back to itself"):
        through_links(loop)
