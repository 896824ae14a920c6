"""What `python -m fastbyol doctor` says: of packages, machine, disk and self tests; a part that crashes or hangs costs one line."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

from fastbyol.__main__ import main
from fastbyol.config.packages import CORE, OPTIONAL
from fastbyol.doctor import machine, packages, self_tests, trials
from fastbyol.doctor.disk import disk_finding
from fastbyol.doctor.finding import Finding, lines, summary
from fastbyol.doctor.machine import gpu_finding, machine_findings
from fastbyol.doctor.packages import apex_finding, import_faults, too_old
from fastbyol.doctor.subprocesses import run_each
from fastbyol.optim import multi_tensor
from tests.commands import ROOT

IN_TURN = """
import os, signal, sys, time
from fastbyol.doctor.subprocesses import report
for name in sys.argv[1:]:
    report(begun=name)
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(1000)
    if name == "leave":
        os._exit(0)
    print("noise of a library")
    report(text=f"{name} done")
"""
NUMPY_SAYS = "ImportError: numpy.core.multiarray failed to import"


def test_the_report_has_a_line_for_each_finding_with_what_helps_below_and_names_what_is_broken() -> None:
    found = [
        Finding("a", "one", "ok", "1.0"),
        Finding("a", "two", "broken", "does not", "do this"),
        Finding("b", "three", "missing", "costs x"),
    ]
    assert [line.split() for line in lines(found)] == [
        ["a"],
        ["ok", "one", "1.0"],
        ["broken", "two", "does", "not"],
        ["->", "do", "this"],
        ["b"],
        ["missing", "three", "costs", "x"],
    ]
    assert summary(found) == "1 ok, 0 low, 1 missing, 1 broken: does not work: two"
    assert summary(found[:1]).endswith("all that is installed works")
    with pytest.raises(ValueError, match="state = 'fine'"):
        Finding("a", "one", "fine", "")


def test_what_crashes_hangs_or_leaves_costs_itself_only() -> None:
    results = dict(run_each(["one", "crash", "two", "hang", "leave", "three"], "-c", IN_TURN, limit_s=3))
    assert results == {
        "one": {"text": "one done"},
        "crash": {"fault": "crashed (SIGSEGV)"},
        "two": {"text": "two done"},
        "hang": {"fault": "gave no answer within 3 s"},
        "leave": {"fault": "ended without a result"},
        "three": {"text": "three done"},
    }


# ---- packages


def test_every_dependency_and_extra_of_the_package_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = re.compile(r"[\w.-]+")
    assert {name.match(line)[0] for line in project["dependencies"]} == {part.package for part in CORE}
    looked_at = {part.package for part in OPTIONAL} | {"nvidia-dali-cuda120"}
    for extra, requirements in project["optional-dependencies"].items():
        if extra not in ("dev", "lint", "rivals", "docs", "release", "all"):
            assert {name.match(line)[0] for line in requirements} <= looked_at, extra
    assert {part.extra for part in OPTIONAL} <= set(project["optional-dependencies"])


@pytest.fixture
def packages_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path for packages of the test's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Lays a package out as pip does."""
    for path, text in {f"{name}-{version}.dist-info/METADATA": f"Name: {name}\nVersion: {version}\n", **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.mark.parametrize(
    ("files", "state", "said"),
    [
        ({"apex/__init__.py": "import pyramid"}, "broken", "0.9.10 is the wrong apex: PyPI's package of that name is a web toolkit"),
        ({"apex/__init__.py": "", "apex/optimizers/__init__.py": ""}, "broken", "NVIDIA's, but built without its CUDA extensions"),
        ({"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}, "ok", "NVIDIA's, with its CUDA extensions"),
    ],
)
def test_the_wrong_apex_is_told_from_nvidias(files: dict[str, str], state: str, said: str, packages_folder: Path) -> None:
    assert list(apex_finding("optional packages")) == []
    install(packages_folder, "apex", "0.9.10", files)
    (found,) = apex_finding("optional packages")
    assert found.state == state
    assert said in found.text
    assert ("pip uninstall apex" in found.way_out) == (state == "broken")


def test_doctor_ends_with_1_if_something_installed_does_not_work_and_with_0_otherwise(packages_folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        machine, "_FACTS", "from fastbyol.doctor.subprocesses import report; report(torch='2', cuda=None, usable=False, why_not='')"
    )
    for code, broken in ((0, []), (1, ["apex"])):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--quick", "--json"])
        assert ended.value.code == code
        found = json.loads(capsys.readouterr().out)
        assert [each["name"] for each in found["findings"] if each["state"] == "broken"] == broken
        assert {"torch", "numpy", "memory", "GPU"} <= {each["name"] for each in found["findings"]}
        install(packages_folder, "apex", "0.9.10", {"apex/__init__.py": ""})


def test_a_package_that_does_not_import_is_broken_and_one_built_against_another_numpy_is_named(packages_folder: Path) -> None:
    install(packages_folder, "good", "1.0", {"good.py": ""})
    install(packages_folder, "bad", "1.0", {"bad.py": f"raise {NUMPY_SAYS.replace(': ', '(')!s}')".replace("(numpy", "('numpy")})
    os.environ["PYTHONPATH"], before = f"{packages_folder}:{os.environ.get('PYTHONPATH', '')}", os.environ.get("PYTHONPATH")
    try:
        faults = import_faults(["good", "bad", "no_such_module"])
    finally:
        os.environ["PYTHONPATH"] = before or ""
    assert faults == {"bad": NUMPY_SAYS, "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"}
    ffcv = next(part for part in OPTIONAL if part.package == "ffcv")
    found = packages._finding(ffcv, "optional packages", "1.0.2", faults["bad"])
    assert (found.state, found.way_out) == ("broken", packages.REBUILD_FFCV)
    assert "built against another numpy than" in found.text
    found = packages._finding(ffcv, "optional packages", "1.0.2", "ImportError: libGL.so.1: cannot open shared object file: No such file")
    assert (found.state, found.way_out) == ("broken", "apt-get install libgl1"), "installing it again would change nothing"
    assert packages._finding(ffcv, "optional packages", "", "").state == "missing"
    assert packages._finding(CORE[0], "core", "", "").state == "broken", "nothing works without torch"


def test_a_version_below_the_lowest_is_said() -> None:
    assert too_old("torch", "2.0.1").startswith("needs torch>=")
    assert too_old("torch", "99.0") == too_old("unknown", "1") == ""


# ---- machine


@pytest.mark.parametrize(
    ("capability", "built_for", "state"),
    [
        ("90", ["sm_80", "sm_90"], "ok"),
        ("89", ["sm_80", "sm_90"], "ok"),  # code of 8.0 runs on 8.9
        ("70", ["sm_80", "sm_90"], "broken"),
        ("120", ["sm_80", "sm_90"], "broken"),
        ("120", ["sm_80", "sm_90", "compute_90"], "ok"),  # PTX
        ("80", ["sm_86"], "broken"),
    ],
)
def test_a_gpu_works_if_torch_has_code_for_it(capability: str, built_for: list[str], state: str) -> None:
    found = gpu_finding(0, {"name": "Card", "bytes": 80 << 30, "capability": capability}, built_for)
    assert found.state == state
    assert found.text.startswith("Card, 85.9 GB, compute capability ")


@pytest.mark.parametrize(
    ("own_groups", "limits"),
    [
        ("0::/\n", {"memory.max": "1073741824", "cpu.max": "50000 100000"}),
        # SLURM limits the job, four levels above the process; a limit further down may be a higher one.
        (
            "0::/slurm/job_1/step_0/user/task_0\n",
            {
                "slurm/job_1/memory.max": "1073741824",
                "slurm/job_1/cpu.max": "50000 100000",
                "slurm/job_1/step_0/memory.max": "2147483648",
                "slurm/job_1/step_0/user/task_0/memory.max": "max",
                "slurm/job_1/step_0/user/task_0/cpu.max": "max 100000",
            },
        ),
        (
            "4:memory:/docker/ab\n1:cpu,cpuacct:/docker/ab\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/docker/ab/memory.limit_in_bytes": "1073741824",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/docker/ab/cpu.cfs_quota_us": "100000",
                "cpu/docker/ab/cpu.cfs_period_us": "200000",
            },
        ),
        # Inside a container the group's own folder is mounted at the root, whatever the path says.
        ("0::/docker/ab\n", {"memory.max": "1073741824", "cpu.max": "50000 100000"}),
    ],
)
def test_limits_of_the_control_groups_are_read_and_low_ones_named(
    own_groups: str, limits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own_groups)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    for name, value in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    found = {finding.name: finding for finding in machine_findings()}
    assert (found["memory"].state, found["memory"].text.split(",")[0]) == ("low", "1.07 GB")
    assert found["cores"].state == "low"
    assert "may use 0.5" in found["cores"].text
    assert "--data.workers 1" in found["cores"].way_out


@pytest.mark.parametrize(
    ("driver", "node", "visible", "cuda", "said", "state"),
    [
        ("", "", None, "13", "none: small images and the demo train on a CPU", "missing"),
        ("535.1", "nvidia0", None, "13", "torch cannot use it", "broken"),
        ("535.1", "nvidia1", "1", "13", "torch cannot use it", "broken"),
        ("535.1", "dxg", None, "13", "torch cannot use it", "broken"),
        # A container without --gpus sees the host's driver, and its devices for control at most.
        ("535.1", "nvidiactl", None, "13", "nvidia0 is not there", "missing"),
        ("535.1", "nvidia0", "", "13", "CUDA_VISIBLE_DEVICES is ''", "missing"),
        ("535.1", "nvidia0", "-1", "13", "CUDA_VISIBLE_DEVICES is '-1'", "missing"),
        ("535.1", "nvidia0", None, None, "torch 2 was built for the CPU", "low"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_broken_and_none_for_this_process_is_no_fault(
    driver: str, node: str, visible: str | None, cuda: str | None, said: str, state: str, tmp_path: Path, monkeypatch
) -> None:
    facts = f"torch='2', cuda={cuda!r}, usable=False, why_not='old'"
    monkeypatch.setattr(machine, "_FACTS", f"from fastbyol.doctor.subprocesses import report; report({facts})")
    monkeypatch.setattr(machine, "DEVICES", tmp_path, raising=False)
    if node:
        (tmp_path / node).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    gpu, bf16 = machine.gpu_findings()
    assert (gpu.state, said in gpu.text) == (state, True), gpu
    assert bf16.name == "bf16 on this CPU"


def test_what_is_installed_anew_is_the_package_and_not_fastbyol_with_all_that_it_needs(packages_folder: Path) -> None:
    for name, package in (("ffcv backend", "ffcv==1.0.2"), ("dali backend", "nvidia-dali-cuda")):
        way_out = self_tests.finding_of(name, {"fault": "does not work"}).way_out
        command = way_out[way_out.index("pip install") :].partition(",")[0].split()
        assert "--no-deps" in command
        assert command[-1].startswith(package)
    install(packages_folder, "nvidia_dali_cuda120", "2.0", {})
    assert packages.dali_package() == "nvidia-dali-cuda120"


def test_the_disk_of_a_folder_and_of_a_file_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastbyol.doctor.disk.TRIAL_BYTES", 16 << 20)
    file = tmp_path / "x.beton"
    file.write_bytes(os.urandom(1 << 20))
    for path in (tmp_path, file):
        assert re.fullmatch(
            r"reads [\d,]+ MB/s from front to back, [\d,]+ images/s of 112 KiB at random places \(one reader\)", disk_finding(path).text
        )
    assert list(tmp_path.iterdir()) == [file]
    for path, said in ((tmp_path / "no", "cannot be measured (No such file"), (ROOT / "LICENSE", "too small to measure a disk with")):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--quick", "--path", str(path)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


# ---- self tests


def test_tests_are_chosen_by_what_is_here() -> None:
    assert self_tests.chosen_tests(set()) == list(self_tests.ALWAYS)
    everything = self_tests.chosen_tests({"ffcv", "dali", "apex", "compiler", "gpu"})
    assert set(everything) == set(trials.TRIALS)
    assert len(everything) == len(trials.TRIALS)
    assert "dali on the GPU" not in self_tests.chosen_tests({"gpu"})
    assert "target by apex" not in self_tests.chosen_tests({"gpu", "dali"})


@pytest.mark.parametrize(
    "name", ["folder backend", "JPEG check", "LARS and target", "LARS, foreach", "batch norm", "bf16 on the CPU", "ffcv backend"]
)
def test_each_self_test_passes_here(name: str, tmp_path: Path) -> None:
    assert trials.TRIALS[name](tmp_path)


def test_a_wrong_kernel_or_decoder_fails_its_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "trust_ratio", lambda *_: 1.0)
    with pytest.raises(trials.Wrong, match="largest relative error is"):
        trials.TRIALS["LARS and target"](tmp_path)
    monkeypatch.setattr("fastbyol.models.cpu_norm._FLOOR", dict.fromkeys((True, False), -1.0))
    with pytest.raises(trials.Wrong, match="largest relative error is"):
        trials.TRIALS["batch norm"](tmp_path)
    monkeypatch.setattr("fastbyol.augment.reference.solarize", lambda x, threshold: 1 - x)
    with pytest.raises(trials.Wrong, match="a view's largest error is"):
        trials.TRIALS["folder backend"](tmp_path)


def test_self_tests_run_in_a_process_of_their_own_and_a_fault_is_one_line(tmp_path: Path) -> None:
    results = run_each(["no such test", "JPEG check"], "-W", "ignore", "-m", "fastbyol.doctor.trials", str(tmp_path), limit_s=120)
    broken, fine = [self_tests.finding_of(*result) for result in results]
    assert (broken.state, broken.text) == ("broken", "KeyError: 'no such test'")
    assert (fine.state, fine.name) == ("ok", "JPEG check")
