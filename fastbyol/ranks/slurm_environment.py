"""Translates srun's environment into torchrun's variables, so that `srun python -m fastbyol train …` needs no other launcher.

Source: srun(1), output environment variables. Run under SLURM 22.05 by tests/long/slurm.py, with two tasks on one node and on two; more only with
their variables set by hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import MutableMapping

from fastbyol.config.errors import UserError, environment_integer

log = logging.getLogger("fastbyol")

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Range of MASTER_PORT; the job id chooses the port, so two jobs on one node rarely collide."""


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> bool:
    """Adds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if srun started several tasks without torchrun.

    Returns True if it did. Raises UserError if variables that srun sets are missing or malformed, or in a task of `srun --pty` other than
    the first, which is the only one with a terminal and trains alone.
    """
    # Only srun sets this one, so python started by a batch script or salloc stays a single process.
    tasks = environment_integer("SLURM_STEP_NUM_TASKS", 1, environment)
    if environment.get("RANK") or tasks < 2:
        return False
    if environment.get("SLURM_PTY_PORT"):
        if environment_integer("SLURM_PROCID", 0, environment):
            raise UserError(f"SLURM_PROCID = {environment['SLURM_PROCID']}: srun --pty serves its first task only; leave out --pty")
        why = "only this one has a terminal, so it trains alone; leave out --pty to use all of them"
        log.warning("SLURM: srun --pty has %d tasks, but %s", tasks, why)
        return False
    try:
        environment.update(_torchrun_names(environment))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS = {tasks}: is in the environment, but other variables of srun are missing or malformed ({error!r}); start with "
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
    """Returns the first name of SLURM's node list: 'gpu[003-005,9],login1' -> 'gpu003'."""
    first = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", node_list)
    return "".join(part or "" for part in first.groups()) if first else node_list


def tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Returns the node's entry in SLURM's list of counts: '4(x2),3' means 4, 4, 3."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]
