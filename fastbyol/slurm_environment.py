"""srun's environment in torchrun's words: with it, `srun python fastbyol/train.py …` needs no launcher of its own.

Source: srun(1), output environment variables. Tried with a hand-made environment only, no SLURM was at hand.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The job's id chooses the port of the meeting point: two jobs on one node seldom meet."""


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Adds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where srun started several tasks and torchrun did not.

    Only srun sets SLURM_STEP_NUM_TASKS: a batch script's or an interactive shell's own python stays one process.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    node = int(environment["SLURM_NODEID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], node)),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS),
    }
    for name, value in found.items():
        environment.setdefault(name, value)


def first_host(node_list: str) -> str:
    """The first name of SLURM's list: 'gpu[003-005,9],login1' -> 'gpu003'."""
    first = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", node_list)
    return "".join(part or "" for part in first.groups()) if first else node_list


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """The node's entry of SLURM's list of counts: '4(x2),3' is 4, 4, 3."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]
