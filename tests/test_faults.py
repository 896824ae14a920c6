"""Real processes, disturbed from outside and inside: in every case the run ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.train import main
from tests.commands import KNOWS_SHUTDOWN_TIMEOUT, LIMIT_S, SMALL_RUN, LaunchedRun, await_gone, is_alive, state_digest
from tests.forked import ForkedPython, run_ranks

pytestmark = pytest.mark.distributed
RESTARTS = ("--standalone", "--max-restarts", "2", "--monitor-interval", "0.1")
TOTAL = 25
"""Steps of 8 epochs of 25 images."""


@pytest.fixture(scope="module")
def arguments(data_paths) -> list[str]:
    return [*SMALL_RUN, "--epochs", "8", "--checkpoint_every", "4", "--data.train", str(data_paths["ffcv"])]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory) -> Path:
    """Starts two ranks as srun does: no torchrun, only SLURM's variables. The result is compared with torchrun's runs in the other
    tests.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    host = {"SLURM_STEP_NODELIST": "localhost"}
    logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
    runs = [
        ForkedPython(
            *("fastbyol/train.py", *arguments, "--out", folder / "run"),
            out=log,
            err=log,
            env=common | host | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]
    with runs[0], runs[1]:
        codes = [run.wait(LIMIT_S) for run in runs]
    first, second = (log.read_text() for log in logs)
    assert codes == [0, 0], first + second
    assert f"global batch 8 = 2 ranks x 1 micro-batches x 4 images; {TOTAL} steps" in first
    assert second == ""
    return folder / "run"


def test_a_run_stopped_orphaned_killed_and_moved_to_other_ranks_loses_no_step(arguments, undisturbed, tmp_path, capsys):
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = [*arguments, "--out", str(out)]
    with LaunchedRun(log, *arguments, ranks=2, launcher=("--standalone", "--signals-to-handle", "SIGTERM,SIGUSR1")) as run:
        run.wait_for("step 5/")
        run.send(signal.SIGUSR1)
        assert run.finish() == 1, "torchrun's code, whatever the workers' is"
        assert "SIGUSR1: finishing this step, then saving and exiting" in run.log
        saved = int(re.findall(r"stopped \(SIGUSR1\): saved after step (\d+)", run.log)[0])
        assert saved == int(re.findall(rf"step (\d+)/{TOTAL}", run.log)[-1])
    assert checkpoint_steps(out)[-1] == saved

    with LaunchedRun(log, *arguments, ranks=2) as run:
        run.wait_for(f"step {saved + 3}/")
        workers = run.workers()
        run.process.kill()  # torchrun itself: nobody tells its workers
        run.process.wait()
        await_gone(workers)
        assert f"continues after step {saved}" in run.log
        orphaned = int(re.findall(r"stopped \(SIGTERM\): saved after step (\d+)", run.log)[0])

    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    capsys.readouterr()
    main([*arguments[:-1], str(alone)])
    said = capsys.readouterr().err
    assert f"continues after step {orphaned}" in said
    assert "continuing on 1 ranks (before: 2): each step has the same images" in said
    assert checkpoint_steps(alone)[-1] == TOTAL

    with LaunchedRun(log, *arguments, ranks=2, launcher=RESTARTS) as run:
        run.wait_for(f"step {orphaned + 3}/")
        os.kill(run.workers()[1], signal.SIGKILL)
        assert run.finish() == 0, run.log
        assert run.log.count("exitcode: -9") == 1
        assert re.search(r"continues after step \d+ \(restart 1\)", run.log)
    assert state_digest(out) == state_digest(undisturbed)


def test_a_rank_that_hangs_ends_the_others_within_the_limit(arguments, tmp_path):
    launcher = ("--standalone", *(("--shutdown-timeout", "1") if KNOWS_SHUTDOWN_TIMEOUT else ()))
    limit = ("--timeout_s", "4", "--out", str(tmp_path / "run"))
    with LaunchedRun(tmp_path / "log", *arguments, *limit, ranks=2, launcher=launcher, fault="stop:1:7") as run:
        run.wait_for("FAULT stop on rank 1 in step 7")
        workers = run.workers()
        assert run.finish() == 1
        assert re.search(r"error: rank 0 got no answer from another rank.*continues from the last checkpoint", run.log)
        assert re.search(r"rank +: 0 .*\n +exitcode +: 5 ", run.log), "the documented code stands in torchrun's report"
        assert not any(is_alive(pid) for pid in workers)
    assert checkpoint_steps(tmp_path / "run") == [4]


def test_nan_on_one_rank_ends_all_of_them_with_its_rank_and_step(arguments, tmp_path):
    ranks = run_ranks("tests/faulty_train.py", *arguments, "--out", tmp_path / "run", env={"FAULT": "nan:1:6"})
    assert "FAULT nan on rank 1 in step 6" in ranks[1].stderr
    for rank in ranks:
        assert rank.returncode == 3, rank.stderr
        # Every rank's loss has the NaN through the shared BN statistics: the first of them is named.
        assert re.search(
            r"error: the loss is not finite in step 6 on rank \d \(lr .*the last good checkpoint is .*step-000000004.pt", rank.stderr
        )
    assert checkpoint_steps(tmp_path / "run") == [4]
