"""Part i of n of a piece of work: the one rule by which machines share it, whether SLURM, Kubernetes, Ray or the user starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastbyol.config.errors import UserError, environment_integer, require

_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
_LAUNCHERS = (("RANK", "WORLD_SIZE"), _ARRAY, ("SLURM_PROCID", "SLURM_NTASKS"))
"""Variables with a process's number and the number of processes: torchrun's, then those of a SLURM array, then of srun's tasks."""
_JOINING = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"),
}
"""Variables by which a process becomes a rank (`process_group`, `slurm_environment`)."""


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts, numbered from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        require(0 <= self.number < self.count, "part", f"{self.number}/{self.count}", "i/n with i from 0 to n - 1")

    def rows(self, total: int) -> slice:
        """Returns which of `total` items are this part's.

        All parts are contiguous, follow each other without gap or overlap, and differ by one item at most. With fewer items than parts some
        are empty.
        """
        return slice(self.number * total // self.count, (self.number + 1) * total // self.count)


def parse_part(text: str, *, option: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Returns the part that 'i/n' names, or, for 'auto', the variables of torchrun (RANK, WORLD_SIZE), of a SLURM array, or of
    srun (SLURM_PROCID, SLURM_NTASKS).

    Raises UserError, naming the option, for another text.
    """
    if text == "auto":
        for number, count in _LAUNCHERS:
            if environment.get(number) and environment.get(count):
                if (number, count) == _ARRAY:
                    _check_array(environment, option=option)
                return Part(environment_integer(number, 0, environment), environment_integer(count, 1, environment))
        raise UserError(f"{option} auto: neither torchrun's RANK and WORLD_SIZE nor SLURM's variables are set; give it as i/n")
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"{option} {text}: must be i/n with i from 0 to n - 1, such as 0/4 for the first of four machines, or auto")
    return Part(int(number), int(count))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a command that is not a rank of this process's launcher, torchrun or srun: without the variables by which it would
    join the other ranks.
    """
    return {name: value for name, value in environment.items() if name not in _JOINING and not name.startswith("TORCHELASTIC_")}


def _check_array(environment: Mapping[str, str], *, option: str) -> None:
    """Raises UserError for a SLURM array whose tasks are not 0 to n - 1, or are several processes each: parts would be left out or done twice."""
    first, last, count, tasks = (
        environment_integer(f"SLURM_{name}", 0, environment) for name in ("ARRAY_TASK_MIN", "ARRAY_TASK_MAX", "ARRAY_TASK_COUNT", "NTASKS")
    )
    if (first, last) != (0, count - 1) or tasks > 1:
        raise UserError(
            f"{option} auto: this SLURM array has {count} tasks from {first} to {last}, of {max(tasks, 1)} processes each; submit it with "
            "--array=0-N --ntasks=1, one task for each part, or give the part as i/n"
        )
