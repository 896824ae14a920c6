"""srun's environment in torchrun's words: with it, `srun python fastbyol/train.py …` needs no launcher of its own.

Source: srun(1), output environment variables. Tried with a hand-made environment only, no SLURM was at hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import MutableMapping

from fastbyol.config.errors import UserError, environment_integer

log = logging.getLogger("fastbyol")

FIRST_PORT, NUM_PORTS = 20000, 10000
"""The job's id chooses the port of the meeting point: two jobs on one node seldom meet."""


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> bool:
    """Adds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where srun started several tasks and torchrun did not.

    Only srun sets SLURM_STEP_NUM_TASKS: a batch script's or salloc's own python stays one process. So does one under `srun --pty`, which gives
    a terminal to task 0 alone: what is typed there has no other tasks. Returns whether the variables are srun's.

    Raises:
        UserError: variables that srun sets are missing or not what it sets; a task of `srun --pty` that is not the first.
    """
    tasks = environment_integer("SLURM_STEP_NUM_TASKS", 1, environment)
    if environment.get("RANK") or tasks < 2:
        return False
    if environment.get("SLURM_PTY_PORT"):
        if environment_integer("SLURM_PROCID", 0, environment):
            raise UserError(f"SLURM_PROCID = {environment['SLURM_PROCID']}: srun --pty serves its first task only; leave out --pty")
        log.warning(
            "SLURM: srun --pty has %d tasks and this is the only one with a terminal: it trains alone; all: srun without --pty", tasks
        )
        return False
    try:
        environment.update(_torchrun_names(environment))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {tasks}: is in the environment, and other variables of srun are not as it sets them ({error!r}); start with "
            "srun, or, for one process, unset SLURM_STEP_NUM_TASKS"
        ) from error
    return True


def _torchrun_names(environment: MutableMapping[str, str]) -> dict[str, str]:
    node = int(environment["SLURM_NODEID"])
    meeting = {
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS),
    }
    return meeting | {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], node)),
    }


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
