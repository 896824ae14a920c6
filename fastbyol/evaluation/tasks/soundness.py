"""Checks files and images before anything is trained, shared by the ranks: an error in the middle of a training would lose hours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.cores import default_workers
from fastbyol.host.progress import Progress
from fastbyol.ranks.process_group import gather_everywhere


def require_sound(
    job: Job, what: str, items: Sequence[Any], check: Callable[[Any], Any], *, way_out: str = "; correct it, or take it off the list"
) -> list[Any]:
    """Calls the check with every item, each on one of the ranks, and returns on every rank what it returned for each; raises one UserError on
    all ranks if any of the calls raised one.

    The message is the first complaint, with the number of items that have one.
    """
    ranks = job.process.world_size
    ends = [len(items) * rank // ranks for rank in range(ranks + 1)]
    mine = items[ends[job.process.rank] : ends[job.process.rank + 1]]
    everyones = gather_everywhere(_checked(job, what, mine, check))
    complaints = [complaint for part, _ in everyones for complaint in part]
    if complaints:
        more = f" ({len(complaints):,} of {len(items):,} {what} have such a fault)" if len(complaints) > 1 else ""
        raise UserError(f"{complaints[0]}{more}{way_out}")
    return [value for _, part in everyones for value in part]


def require_decodable(job: Job, key: str, *parts: tuple[str, ImageLoader, Indices]) -> None:
    """Decodes images that are first needed after a training, once in the job. Every rank calls it; raises UserError on all if one is damaged.

    Args:
        job: the ranks share the images.
        key: name of the check in the job.
        parts: what the images are called, their loader, and which of its images.
    """

    def decode() -> dict[str, Any]:
        for what, loader, rows in parts:
            require_sound(job, what, rows.tolist(), loader.require_decodable, way_out="")
        return {}

    job.once(key, decode)


def _checked(job: Job, what: str, items: Sequence[Any], check: Callable[[Any], Any]) -> tuple[list[str], list[Any]]:
    """Returns the complaints, and what the check returned for the items without one."""

    def checked(item: Any) -> tuple[str | None, Any]:
        try:
            return None, check(item)
        except UserError as error:
            return str(error), None

    complaints, found = [], []
    with ExitStack() as leaving:
        pool = leaving.enter_context(ThreadPoolExecutor(job.workers or default_workers()))
        progress = leaving.enter_context(Progress(f"checking {what}", len(items), unit="files")) if job.process.is_main else None
        for complaint, value in pool.map(checked, items):
            if progress is not None:
                progress.advance()
            if complaint is not None:
                complaints.append(complaint)
            else:
                found.append(value)
    return complaints, found
