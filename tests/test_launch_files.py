"""scripts/: the launch files are valid, and torchrun and fastbyol know the options that they pass on."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fastbyol.__main__ import _build_parser
from fastbyol.ranks.parts import Part, parse_part
from fastbyol.run.command_line import parse_train_config
from tests.commands import KNOWS_SHUTDOWN_TIMEOUT, SCRIPTS
from tests.kubernetes_models import check_manifest
from tests.long import slurm_cluster

TYPED = ["--preset", "r50_100ep", "--data.train", "a folder/train.beton", "--out", "runs/r50"]
# sbatch(1), Slurm 24.05
SBATCH_OPTIONS = {
    *("account", "array", "begin", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error", "exclude", "exclusive"),
    *("export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hint", "job-name", "licenses", "mail-type", "mail-user", "mem"),
    *("mem-per-cpu", "mem-per-gpu", "no-requeue", "nodelist", "nodes", "ntasks", "ntasks-per-gpu", "ntasks-per-node", "open-mode"),
    *("output", "partition", "qos", "requeue", "reservation", "signal", "switches", "time", "time-min"),
}


@pytest.fixture
def on_path(tmp_path):
    """Puts a program of a few shell lines first on PATH, and returns the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, lines: str) -> dict[str, str]:
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
        return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}

    return put


WAITS_S = 30
"""Seconds that a torchrun waits which knows no such option: torch 2.11's."""


def _torchrun(option: str) -> str:
    """Returns a torchrun that prints its arguments, and whose help names the option."""
    return f"""if [ "$1" = --help ]; then echo "usage: {option}"; else printf '%s\\n' "$@"; fi"""


TORCHRUN = _torchrun("--shutdown-timeout SECONDS" if KNOWS_SHUTDOWN_TIMEOUT else "")


def _check_command(torchrun_and_ours: list[str], *, preset: str, train: str) -> None:
    """Checks that both parsers accept the command, each its own part."""
    known = get_args_parser().parse_args(torchrun_and_ours)
    ours = known.training_script_args
    if known.module:  # as in the container, which holds the installed package and no checkout
        assert [known.training_script, ours.pop(0)] == ["fastbyol", "train"]
    else:
        assert known.training_script == "fastbyol/train.py"
    config = parse_train_config(ours, usage="")
    assert ours[ours.index("--preset") + 1] == preset
    assert config.data.train == train
    assert "SIGTERM" in known.signals_to_handle
    if KNOWS_SHUTDOWN_TIMEOUT:
        assert config.grace_s < known.shutdown_timeout, "torchrun must not kill who may still be saving"


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch")))
def test_every_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", SCRIPTS / script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("script", "environment", "torchrun"),
    [
        ("one_node.sh", {"GPUS": "8"}, {"nproc_per_node": "8", "standalone": True}),
        (
            "several_nodes.sh",
            {"NODES": "4", "HOST": "node0", "GPUS": "8"},
            {"nnodes": "4", "rdzv_endpoint": "node0:29400", "rdzv_backend": "c10d"},
        ),
    ],
)
def test_the_torchrun_scripts_pass_on_what_was_typed(script, environment, torchrun, on_path):
    env = on_path("torchrun", TORCHRUN) | environment
    done = subprocess.run(["bash", SCRIPTS / script, *TYPED], env=env, capture_output=True, text=True, check=True)
    command = done.stdout.splitlines()
    _check_command(command, preset="r50_100ep", train="a folder/train.beton")
    known = vars(get_args_parser().parse_args(command))
    assert {name: known[name] for name in torchrun} == torchrun
    assert known["max_restarts"] > 0


@pytest.mark.parametrize("typed", [["--grace_s", "60"], ["--grace_s=60"]])
def test_a_grace_time_that_is_typed_takes_the_place_of_the_scripts_own(typed, on_path):
    env = on_path("torchrun", TORCHRUN) | {"GPUS": "8"}
    done = subprocess.run(["bash", SCRIPTS / "one_node.sh", *TYPED, *typed], env=env, capture_output=True, text=True, check=True)
    ours = get_args_parser().parse_args(done.stdout.splitlines()).training_script_args
    assert parse_train_config(ours, usage="").grace_s == 60


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
@pytest.mark.parametrize(("option", "passed", "grace_s"), [("--shutdown-timeout SECONDS", ["120"], "110"), ("", [], "20")])
def test_torchrun_is_told_how_long_to_wait_only_if_it_knows_the_option(script, option, passed, grace_s, on_path):
    """Otherwise it would refuse the command; and the workers must be done before it kills them."""
    env = on_path("torchrun", _torchrun(option)) | {"GPUS": "8", "NODES": "2", "HOST": "node0"}
    done = subprocess.run(["bash", SCRIPTS / script, *TYPED], env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert [after for word, after in itertools.pairwise(words) if word == "--shutdown-timeout"] == passed
    assert words[words.index("--grace_s") + 1] == grace_s


def test_several_nodes_asks_for_what_it_needs(on_path):
    done = subprocess.run(
        ["bash", SCRIPTS / "several_nodes.sh", *TYPED], env=on_path("torchrun", ":"), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "NODES: how many machines" in done.stderr


def _run_slurm_script(on_path, tmp_path, python, *, srun='SLURM_PROCID=0 "$@"; exit 143', **environment):
    """Runs the script with a python of a few shell lines as task 0; srun says 143, as it does when it ended other tasks.

    Returns the process, what scontrol was asked, and the arguments of python.
    """
    on_path("scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    on_path("python", f'printf "%s\\n" "$@" > {tmp_path}/python.log; {python}')
    env = on_path("srun", f'while [ "$1" != bash ]; do shift; done; {srun}')
    env |= {"SLURM_SUBMIT_DIR": str(SCRIPTS.parent), "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "12", "TMPDIR": str(tmp_path / "node")}
    (tmp_path / "node").mkdir(exist_ok=True)
    done = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", *TYPED], env=env | environment, capture_output=True, text=True, check=False)
    asked, told = (path.read_text() if (path := tmp_path / name).exists() else "" for name in ("scontrol.log", "python.log"))
    assert not list((tmp_path / "node").iterdir()), "nothing is left behind"
    return done, asked, told.splitlines()


@pytest.mark.parametrize(
    ("python", "requeued", "exit_code"),
    [
        *((f"exit {code}", False, code) for code in (0, 1, 2, 3, 4)),
        *((f"exit {code}", True, 0) for code in (5, 75)),
        ("kill -KILL $$", True, 0),  # the machine's memory ran out
    ],
)
def test_the_slurm_script_requeues_what_can_go_on_and_nothing_else(python, requeued, exit_code, on_path, tmp_path):
    done, asked, told = _run_slurm_script(on_path, tmp_path, python)
    assert done.returncode == exit_code, done.stderr
    assert asked == ("requeue 4711\n" if requeued else "")
    assert told.pop(0) == "fastbyol/train.py"
    assert parse_train_config(told, usage="").out == "runs/r50"


def test_the_slurm_script_ends_a_fault_that_comes_back_after_every_restart_but_not_a_run_that_is_stopped_often(on_path, tmp_path):
    lost, asked, _ = _run_slurm_script(on_path, tmp_path, "exit 5", SLURM_RESTART_COUNT="20")
    assert (lost.returncode, asked) == (5, "")
    _, asked, _ = _run_slurm_script(on_path, tmp_path, "exit 75", SLURM_RESTART_COUNT="20")
    assert asked == "requeue 4711\n"


def test_the_slurm_script_goes_by_sruns_code_where_no_task_came_to_run(on_path, tmp_path):
    done, asked, _ = _run_slurm_script(on_path, tmp_path, "exit 75", srun="exit 1")
    assert (done.returncode, asked) == (1, "")


@pytest.mark.parametrize(("task_1", "slept"), [("exit 5", "60\n"), ("kill -TERM $PPID; exit 75", ""), ("exit 0", "")])
def test_another_task_that_fails_leaves_task_0_the_time_to_say_why_unless_it_was_told_to_stop(task_1, slept, on_path, tmp_path):
    """With --kill-on-bad-exit srun ends task 0 when another fails; and when SLURM ends the job, a task that waits is killed after KillWait."""
    on_path("sleep", f'echo "$@" > {tmp_path}/slept')
    python = f'if [ "$SLURM_PROCID" = 1 ]; then {task_1}; fi; exit 3'
    done, asked, _ = _run_slurm_script(on_path, tmp_path, python, srun='SLURM_PROCID=1 "$@"; SLURM_PROCID=0 "$@"; exit 143')
    assert (done.returncode, asked) == (3, "")
    assert ((tmp_path / "slept").read_text() if (tmp_path / "slept").exists() else "") == slept


def test_the_slurm_directives_exist_and_leave_time_to_save():
    directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (SCRIPTS / "slurm.sbatch").read_text(), flags=re.MULTILINE)
    assert len(directives) == (SCRIPTS / "slurm.sbatch").read_text().count("\n#SBATCH")
    assert {name for name, _ in directives} <= SBATCH_OPTIONS
    options = dict(directives)
    number, seconds = options["signal"].split("@")
    assert number == "USR1"
    grace_s = float(re.findall(r"--grace_s (\d+)", (SCRIPTS / "slurm.sbatch").read_text())[0])
    assert grace_s < float(seconds)
    assert "requeue" in options


def test_the_kubernetes_manifest_is_a_pytorchjob_whose_command_both_parsers_know(monkeypatch):
    (job,) = yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    launcher, *command = container["command"]
    assert launcher == "torchrun"
    assert all(isinstance(word, str) for word in command), "Kubernetes refuses numbers in a command"
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])  # torchrun reads its options from PET_ variables too
    _check_command(command, preset="r50_300ep", train="/data/train.beton")
    known = get_args_parser().parse_args(command)
    assert (known.shutdown_timeout if KNOWS_SHUTDOWN_TIMEOUT else WAITS_S) < pod["terminationGracePeriodSeconds"]
    assert known.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    target = container["image"].partition(":")[2]
    assert f" AS {target}\n" in (SCRIPTS.parent / "Dockerfile").read_text()


MANIFESTS = [
    pytest.param(document, id=f"{path.name} {document['metadata']['name']}")
    for path in sorted(SCRIPTS.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_kubernetes_manifest_has_only_what_its_published_model_has(manifest):
    check_manifest(manifest)


@pytest.mark.parametrize("manifest", MANIFESTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod["spec"]["containers"][0].update(imagee="x"), r"containers\[0\]: V1Container has no field imagee"),
        (lambda pod: pod["spec"]["containers"][0]["command"].append(8), r"command\[\d+\]: 8 is no str"),
        (lambda pod: pod["spec"]["containers"][0].pop("name"), r"containers\[0\]: .*`name`, must not be `None`"),
        (lambda pod: pod["spec"].update(terminationGracePeriodSeconds="60"), "terminationGracePeriodSeconds: '60' is no int"),
    ],
)
def test_the_published_model_refuses_a_wrong_manifest(manifest, change, said):
    wrong = copy.deepcopy(manifest)
    change((wrong["spec"].get("pytorchReplicaSpecs", {}).get("Worker") or wrong["spec"])["template"])
    with pytest.raises(ValueError, match=said):
        check_manifest(wrong)


def test_the_pods_of_the_indexed_job_convert_each_part_once_and_the_merge_takes_the_same_folder():
    convert, merge = yaml.safe_load_all((SCRIPTS / "kubernetes_convert.yaml").read_text())
    number = convert["spec"]["completions"]
    assert (convert["spec"]["completionMode"], convert["spec"]["template"]["spec"]["restartPolicy"]) == ("Indexed", "Never")
    parts, typed = [], None
    for index in range(number):
        typed = _fastbyol_options(convert, {"JOB_COMPLETION_INDEX": str(index)})
        parts.append(parse_part(typed.shard, option="--shard", environment={}))
    assert parts == [Part(index, number) for index in range(number)]
    last = _fastbyol_options(merge, {})
    assert (last.merge, last.out, last.to) == (True, typed.out, typed.to)
    assert convert["metadata"]["labels"] != merge["metadata"]["labels"], "the header applies them one after the other"
    for job in (convert, merge):
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert f" AS {container['image'].partition(':')[2]}\n" in (SCRIPTS.parent / "Dockerfile").read_text()


def _stages(dockerfile):
    """Returns the Debian packages in each stage of a Dockerfile, its own and those of the stages that it is made from."""
    packages = {}
    for base, name, lines in re.findall(r"^FROM (\S+) AS (\w+)$(.*?)(?=^FROM |\Z)", dockerfile, re.M | re.S):
        installed = re.findall(r"apt-get install -y --no-install-recommends ([^&]*) &&", lines)
        packages[name] = packages.get(base, set()) | set(" ".join(installed).split())
    return packages


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_has_the_headers_that_compiled_code_includes_and_the_libraries_that_wheels_load(target):
    packages = _stages((SCRIPTS.parent / "Dockerfile").read_text())[target]
    assert {"g++", "python3-dev"} <= packages
    assert {"libgl1", "libglib2.0-0"} <= packages, "opencv-python, which `import ffcv` imports"


def _fastbyol_options(job, environment):
    """Returns what our parser makes of the command of a job's pod, in which Kubernetes replaces $(NAME) by the variable."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container.get("args", [])]
    words = [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word) for word in words]
    assert words[:3] == ["python", "-m", "fastbyol"]
    return _build_parser().parse_args(words[3:])


def test_the_long_test_under_slurm_names_the_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_cluster, "SEARCHED", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^tests.long.slurm: slurm-wlm and munge .* apt-get install slurm-wlm munge iproute2 util-linux$"):
        slurm_cluster.enter_namespaces("tests.long.slurm")
