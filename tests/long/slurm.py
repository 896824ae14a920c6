"""Runs scripts/slurm.sbatch under a real SLURM, stops its runs in every way that SLURM has, and holds their weights against an undisturbed run's.

python -m tests.long.slurm [CASE ...] [--steps 600]        (as root, with Debian's slurm-wlm and munge; minutes)

A private cluster of two nodes is started (slurm_cluster.py), without GPUs: each run has one task on each node. The script is submitted as it is;
partition, sizes and times are typed. Cases, all of them by default:

complete    two tasks on two nodes train to the end
requeue     `scontrol requeue` in the middle: saves, starts again, ends in the undisturbed weights
limit       the time limit, as often as it comes: --signal lets it save, and it goes back into the queue; same weights
preempted   a job in a partition of higher priority takes the nodes: saves, starts again when it is over; same weights
lost        SIGKILL to one task, both on one node: goes back into the queue and continues from the last checkpoint; same weights
refused     an error in the configuration: fails with exit code 2 and does not go back into the queue
table       an array job runs the rows of a table of `reproduce`, each once
parts       an array job converts the parts of a data set, each once, and a job that depends on it merges them
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from fastbyol.reproduction.records import read_records
from tests.commands import SCRIPTS, SMALL_RUN, children_of, run_python, state_digest
from tests.conftest import noisy_colours
from tests.images import write_many
from tests.long.slurm_cluster import NODES, OVER, Cluster, enter_namespaces, wait_until
from tests.test_tar_parts import members

SIZES = ("--nodes", str(len(NODES)), "--ntasks-per-node", "1", "--gpus-per-node", "0", "--cpus-per-task", "1")
LIMIT_S = 900.0
"""Seconds that a job may take on a busy machine, its waits in the queue included."""
ROWS = ("byol", "tau_0", "tau_0.9", "tau_0.999", "tau_1")
IMAGES, PARTS = 1200, 3


def check(right: bool, what: str, log: str = "") -> None:
    if not right:
        raise AssertionError(f"{what}\n{log}")


@dataclass
class Runs:
    """Submits runs of one configuration on the same images, each with an output of its own."""

    cluster: Cluster
    scratch: Path
    data: Path
    steps: int
    digests: dict[str, str] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        return self.scratch / "runs" / name

    def log(self, name: str) -> str:
        file = self.scratch / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def submit(self, name: str, *options: str, sbatch: tuple[str, ...] = ("--time", "60")) -> int:
        """Submits the script as it is, with what a user would type: partition, sizes, time, and the run's own options."""
        typed = ["--partition", "spare", *SIZES, *sbatch, "--output", self.scratch / f"{name}.log", SCRIPTS / "slurm.sbatch"]
        run = [*SMALL_RUN, "--steps", str(self.steps), "--checkpoint_every", str(max(1, self.steps // 6)), "--optim.warmup_epochs", "0"]
        return self.cluster.submit(*typed, *run, "--data.train", self.data / "train", "--out", self.folder(name), *options)

    def wait_for_step(self, name: str, step: int) -> None:
        wait_until(lambda: f"step {step}/" in self.log(name), f"{name}: step {step}", show=lambda: self.log(name), limit_s=LIMIT_S)

    def finish(self, name: str, number: int) -> dict[str, str]:
        """Waits until the job is over; returns what SLURM says of it."""
        self.cluster.wait_for(number, OVER, show=lambda: self.log(name), limit_s=LIMIT_S)
        return self.cluster.job(number)

    def undisturbed(self) -> str:
        """Returns the digest of the run that nobody stopped."""
        if "whole" not in self.digests:
            number = self.submit("whole")
            job = self.finish("whole", number)
            check(
                (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "0", "0:0"),
                f"the undisturbed run: {job}",
                self.log("whole"),
            )
            check(job["NodeList"] == "node[1-2]", f"both nodes: {job}")
            check(f"step {self.steps}/{self.steps}" in self.log("whole"), "the last step", self.log("whole"))
            self.digests["whole"] = state_digest(self.folder("whole"))
        return self.digests["whole"]

    def same(self, name: str, number: int, *, struck: str) -> None:
        """Checks that the job was stopped, restarted and ended in the undisturbed weights. struck: what its log says of each stop."""
        job, log = self.finish(name, number), self.log(name)
        stops = re.findall(struck, log)
        check((job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), f"{name}: {job}", log)
        check(int(job["Restarts"]) >= 1 and bool(stops), f"{name}: restarts {job['Restarts']}, stops {stops}", log)
        check(state_digest(self.folder(name)) == self.undisturbed(), f"{name}: other weights", log)
        resumed = re.findall(r"(?:continu|resum)\w* .*?step (\d+)", log)
        print(f"  {name}: {len(stops)} stops, restarts {job['Restarts']}, resumed at {resumed}: same weights", flush=True)


def complete(runs: Runs) -> None:
    print(f"  complete: {runs.steps} steps by two tasks on two nodes, {runs.undisturbed()[:12]}", flush=True)


def requeue(runs: Runs) -> None:
    number = runs.submit("requeue")
    runs.wait_for_step("requeue", runs.steps // 3)
    runs.cluster.ask("scontrol", "requeue", str(number))
    runs.same("requeue", number, struck="SIGTERM: finishing this step")


def limit(runs: Runs) -> None:
    """SLURM may send the signal up to a minute early, so it comes 60 to 120 s after each start."""
    number = runs.submit("limit", "--grace_s", "50", sbatch=("--time", "3", "--signal", "USR1@60"))
    runs.same("limit", number, struck="SIGUSR1: finishing this step")


def preempted(runs: Runs) -> None:
    number = runs.submit("preempted")
    runs.wait_for_step("preempted", runs.steps // 3)
    urgent = runs.cluster.submit(
        "--partition", "urgent", "--nodes", str(len(NODES)), "--exclusive", "--wrap", "sleep 3", "--output", "/dev/null"
    )
    runs.same("preempted", number, struck="SIGTERM: finishing this step")
    check(runs.cluster.job(urgent)["JobState"] == "COMPLETED", f"the urgent job: {runs.cluster.job(urgent)}")


def lost(runs: Runs) -> None:
    number = runs.submit("lost", sbatch=("--nodes", "1", "--ntasks-per-node", "2", "--time", "60"))
    runs.wait_for_step("lost", runs.steps // 3)
    os.kill(task_of(number, rank=1), signal.SIGKILL)
    runs.same("lost", number, struck="task 1: Exited with exit code 137")


def task_of(number: int, *, rank: int) -> int:
    """Returns the process id of one task of a job: the eldest whose environment says so."""
    wanted = {f"SLURM_JOB_ID={number}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, words = (folder / "environ").read_text().split("\0"), (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if wanted <= set(environment) and "fastbyol/train.py" in words:
            found.append(int(folder.name))
    return next(pid for pid in found if not any(pid in children_of(other) for other in found))


REFUSED = {
    "every_rank": ("--global_batch=7", "global_batch = 7: not divisible by 2 ranks"),
    "first_rank": ("--resume=must", "resume = 'must': .* holds no checkpoint"),
    "parser": ("--learning_rate=1", "learning_rate"),
}
"""A wrong option by who refuses it, and what is said: an error that only rank 0 has looks to the others like a lost rank."""


def refused(runs: Runs) -> None:
    numbers = {name: runs.submit(name, option) for name, (option, _) in REFUSED.items()}
    for name, (_, says) in REFUSED.items():
        job, log = runs.finish(name, numbers[name]), runs.log(name)
        check((job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), f"{name}: {job}", log)
        check(bool(re.search(f"error: .*{says}", log)) and "Traceback" not in log, f"{name}: refused in one line", log)
    time.sleep(10)
    for name, number in numbers.items():
        check(runs.cluster.job(number)["JobState"] == "FAILED", f"{name} stays out of the queue: {runs.cluster.job(number)}")
    print(f"  refused: {len(numbers)} errors, each exit code 2, not queued again", flush=True)


def array(runs: Runs, name: str, *, tasks: int, command: str) -> int:
    """Submits an array of plain commands, each task one process; returns its number."""
    sizes = ("--ntasks", "1", "--cpus-per-task", "1", "--time", "60", "--open-mode", "append")
    return runs.cluster.submit("--array", f"0-{tasks - 1}", *sizes, "--output", runs.scratch / f"{name}-%a.log", "--wrap", command)


def finish_array(runs: Runs, name: str, number: int, tasks: int) -> list[str]:
    """Waits until all tasks of the array are complete, on both nodes; returns their logs."""

    def logs() -> list[str]:
        return [runs.log(f"{name}-{task}") for task in range(tasks)]

    runs.cluster.wait_for(number, OVER, show=lambda: "\n".join(logs()), limit_s=LIMIT_S)
    jobs = runs.cluster.jobs(number)
    states, nodes = [job["JobState"] for job in jobs], {job["NodeList"] for job in jobs}
    check(states == ["COMPLETED"] * tasks, f"{name}: {states}", "\n".join(logs()))
    check(nodes == set(NODES), f"{name}: ran on {nodes}")
    return logs()


def table(runs: Runs) -> None:
    """One task is put back into the queue when it has done its first row, and must not do that one again."""
    out, tasks, first = runs.scratch / "tables", 3, re.compile(r"^\[1/2\] (\S+)-seed0: linear", re.MULTILINE)
    small = " ".join(["--preset", "cpu_demo", "--steps", "20", "--optim.warmup_epochs", "0", *SMALL_RUN[2:]])
    rows = "--rows $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    number = array(runs, "table", tasks=tasks, command=f"python -m fastbyol reproduce tau --data {runs.data} --out {out} {rows} {small}")
    wait_until(lambda: bool(first.search(runs.log("table-1"))), "a row", show=lambda: runs.log("table-1"), limit_s=LIMIT_S)
    runs.cluster.ask("scontrol", "requeue", f"{number}_1")
    logs = finish_array(runs, "table", number, tasks)
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in runs.cluster.jobs(number)}
    check(restarts == {"0": "0", "1": "1", "2": "0"}, f"table: restarts by task {restarts}", logs[1])
    check("DUE TO JOB REQUEUE" in logs[1], "task 1 was stopped", logs[1])
    done = re.findall(r"^\[\d/\d\] (\S+)-seed0: linear", "\n".join(logs), re.MULTILINE)
    check(sorted(done) == sorted(ROWS), f"table: the rows that were done, {done}", "\n".join(logs))
    check(sorted(record.run for record in read_records(out)) == sorted(ROWS), "every row has its record")
    print(f"  table: {len(done)} rows by {tasks} tasks, one of them put back into the queue: each once", flush=True)


def parts(runs: Runs) -> None:
    images, out = write_many(runs.scratch / "images", images=IMAGES, bad_every=50), runs.scratch / "parts"
    options = ["--to", "dali", "--max-dropped", "0.1"]
    source = ["--data", str(images), "--seed", "3", "--workers", "1"]
    command = f"python -m fastbyol convert {' '.join(options)} --out {out}"
    number = array(runs, "parts", tasks=PARTS, command=f"{command} {' '.join(source)} --shard auto")
    merge = runs.cluster.submit("--dependency", f"afterok:{number}", "--output", runs.scratch / "merge.log", "--wrap", f"{command} --merge")
    logs = finish_array(runs, "parts", number, PARTS)
    job = runs.finish("merge", merge)
    check(job["JobState"] == "COMPLETED", f"merge: {job}", runs.log("merge"))
    for part, log in enumerate(logs):
        check(re.findall(r"part (\d+/\d+):", log) == [f"{part}/{PARTS}"], f"task {part} converts its part, once", log)
    alone = runs.scratch / "alone"
    done = run_python("-m", "fastbyol", "convert", *options, "--out", alone, *source)
    check(done.returncode == 0, "the conversion by one process", done.stderr)
    check(members(out) == members(alone), "the samples of one process", runs.log("merge"))
    print(f"  parts: {PARTS} parts by as many tasks, merged by a job after them: {len(members(out))} files as from one process", flush=True)


CASES = {case.__name__: case for case in (complete, requeue, limit, preempted, lost, refused, table, parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all)")
    parser.add_argument("--steps", type=int, default=600, help="of each run; it must outlast the time limit's signal, two minutes (600)")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: no such case; take some of {', '.join(CASES)}")
    enter_namespaces("tests.long.slurm")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the folder goes then too
    with tempfile.TemporaryDirectory(prefix="fastbyol-slurm-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # munged wants its socket to be within everybody's reach
        (folder / "cluster").mkdir()
        data = noisy_colours(folder / "colours", train=24, val=8)
        with Cluster(folder / "cluster") as cluster:
            print(f"{cluster.ask('sinfo', '--version')}, two nodes", flush=True)
            runs = Runs(cluster, folder, data, options.steps)
            for name in options.cases or CASES:
                CASES[name](runs)


if __name__ == "__main__":
    main()
