"""A private SLURM cluster on this machine: a controller and two nodes, each with a network address, a host name and a slurmd of its own.

All of it lives in Linux namespaces that end with this process, so nothing of the machine's own network, /etc/hosts, /run or SLURM is touched,
and the kernel ends whatever was started, also when this process is killed. It needs root and the Debian packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.commands import ROOT

PACKAGES = {
    "slurm-wlm": ("slurmctld", "slurmd", "sbatch", "scontrol", "sinfo"),
    "munge": ("munged",),
    "iproute2": ("ip",),
    "util-linux": ("unshare", "nsenter", "mount"),
}
"""The Debian packages that are needed, and the programs that are looked for in each."""
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
INSIDE = "FASTBYOL_SLURM_NAMESPACE"
"""Set in the environment of the process that `enter_namespaces` starts."""

NODES = {"node1": "10.77.0.11", "node2": "10.77.0.12"}
CONTROLLER = ("control", "10.77.0.1")
CPUS = 2
"""CPUs that each node offers, whatever this machine has."""

CONFIG = """\
ClusterName=fastbyol
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs={cpus} CoresPerSocket={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=spare Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
"""Debian's defaults but for this: jobs start again after 5 s instead of 2 minutes (cred_expire), finished jobs can be asked about (MinJobAge),
a job in `urgent` takes the nodes from one in `spare`, and neither cgroups nor accounting are needed."""

RUNNING, OVER = ("RUNNING",), ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "PREEMPTED")


def enter_namespaces(module: str) -> None:
    """Goes on only in a process that has its own network, mounts, host name and process ids; elsewhere starts one for the module and ends.

    Ends with one line where SLURM, munge or root are missing.
    """
    missing = [name for name, programs in PACKAGES.items() if not all(shutil.which(program, path=SEARCHED) for program in programs)]
    if missing:
        sys.exit(f"{module}: {' and '.join(missing)} not installed; on Debian or Ubuntu: apt-get install {' '.join(missing)}")
    if os.geteuid():
        sys.exit(f"{module}: must be run by root, because it starts slurmd and munged in network namespaces of their own")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), SEARCHED])  # jobs call `python`
    if os.environ.pop(INSIDE, ""):
        return
    os.environ[INSIDE] = "1"
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    # The shell stays as process 1 of the new process ids, for whoever loses its parent: Python would leave zombies.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    os.execvp("unshare", ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", *shell])


class Cluster:
    """Starts munged, slurmctld and a slurmd for each node, all with their files in this folder; leaving it stops them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        make_network(self.folder)
        for name in ("munge", "state", *NODES):
            (self.folder / name).mkdir()
        names = f"node[1-{len(NODES)}]"
        config = self.folder / "slurm.conf"
        config.write_text(CONFIG.format(controller=CONTROLLER[0], folder=self.folder, nodes=names, cpus=CPUS))
        os.environ |= {"SLURM_CONF": str(config), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = [f"--{name}={self.folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "munged", "--foreground", f"--key-file={key}", *files)
        wait_until((self.folder / "munge" / "socket").exists, "munged opens its socket", show=self.logs)
        self._start("slurmctld", "slurmctld", "-D")
        for name in NODES:
            self._start(name, "nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "sh", "-c", f"hostname {name} && exec slurmd -D")
        idle = f"{len(NODES)} idle"
        wait_until(lambda: self.ask("sinfo", "-h", "-p", "spare", "-o", "%D %t") == idle, f"sinfo says '{idle}'", show=self.logs)
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=out))

    def logs(self) -> str:
        """Returns the last lines of every daemon."""
        return "\n".join(f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-8:]) for path in sorted(self.folder.glob("*.out")))

    def ask(self, *command: str) -> str:
        """Returns what one of SLURM's commands prints; '' if it fails, as it does while the controller is busy."""
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    def submit(self, *options: str | Path) -> int:
        """Submits a job from the repository's root, as a user would; returns its number."""
        done = subprocess.run(["sbatch", "--parsable", *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"sbatch {' '.join(map(str, options))}: {done.stderr}")
        return int(done.stdout)

    def jobs(self, number: int) -> list[dict[str, str]]:
        """Returns what `scontrol show job` says of a job, or of each task of an array."""
        lines = self.ask("scontrol", "--oneliner", "show", "job", str(number)).splitlines()
        return [dict(re.findall(r"(?:^| )([A-Z]\w+)=(\S*)", line)) for line in lines]

    def job(self, number: int) -> dict[str, str]:
        return (self.jobs(number) or [{}])[0]

    def wait_for(self, number: int, states: tuple[str, ...], *, show: Callable[[], str], limit_s: float) -> None:
        """Waits until every task of the job is in one of these states."""

        def reached() -> bool:
            jobs = self.jobs(number)
            return bool(jobs) and all(job.get("JobState") in states for job in jobs)

        wait_until(reached, f"job {number} is {' or '.join(states)}", show=lambda: f"{self.jobs(number)}\n{show()}", limit_s=limit_s)


def make_network(folder: Path) -> None:
    """Joins the controller and the nodes by a bridge, each with its address, and gives all of them the same /etc/hosts."""
    name, address = CONTROLLER
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{ip} {host}\n" for host, ip in {"localhost": "127.0.0.1", name: address, **NODES}.items()))
    _do("mount", "--bind", hosts, "/etc/hosts")
    _do("mount", "-t", "tmpfs", "none", "/run")  # where `ip netns` keeps names
    _do("hostname", name)
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", "cluster", "type", "bridge")
    _do("ip", "address", "add", f"{address}/24", "dev", "cluster")
    _do("ip", "link", "set", "cluster", "up")
    for node, ip in NODES.items():
        _do("ip", "netns", "add", node)
        _do("ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", node)
        _do("ip", "link", "set", node, "master", "cluster", "up")
        _do("ip", "-n", node, "address", "add", f"{ip}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            _do("ip", "-n", node, "link", "set", link, "up")


def _do(*command: Any) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, command))}: {done.stderr.strip() or done.returncode}; this machine does not allow the namespaces of the test"
        )


def wait_until(reached: Callable[[], bool], what: str, *, show: Callable[[], str], limit_s: float = 60.0) -> None:
    """Waits until a condition holds; raises AssertionError with what `show` returns if it does not come."""
    deadline = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {limit_s:.0f} s\n{show()}")
        time.sleep(0.2)
