"""Checks that all ranks run the same thing. A stale command, data copy or code version on one node would silently spoil the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from fastbyol import __version__
from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.ranks.process_group import Process, broadcast_from_main, gather_on_main
from fastbyol.run.provenance import package_versions, source_digest

log = logging.getLogger("fastbyol")
FREE_ON_EACH_RANK = frozenset(
    {
        *("out", "resume", "mirror", "timeout_s", "grace_s", "keep_checkpoints", "profile_steps", "monitors.wandb_project"),
        *("data.train", "data.val", "data.backend", "data.workers", "data.prefetch", "precision.compile_cache"),
        *("data.cache", "data.cache_gib"),
    }
)
"""Options that may differ between machines: paths, threads, what only rank 0 does. The data behind the paths are compared separately."""


class Fingerprinted(Protocol):
    def fingerprint(self) -> dict[str, str]: ...

    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=Fingerprinted)


def require_same_start(config: TrainConfig, process: Process) -> None:
    """Checks before any work that every rank has the same options and code; other versions of dependencies are only reported.

    Raises UserError on every rank, which names what differs and where.
    """
    if process.world_size == 1:
        return
    options = {name: shown(value) for name, value in flatten(to_plain(config)).items() if name not in FREE_ON_EACH_RANK}
    require_agreement({**options, "fastbyol": f"{__version__}, source {source_digest()}"}, process)
    versions = package_versions()
    main = broadcast_from_main(versions)
    other = [
        f"{name} {versions.get(name)}, rank 0 has {main.get(name)}" for name in main | versions if versions.get(name) != main.get(name)
    ]
    for rank, differing in enumerate(gather_on_main(other)):
        if differing:
            log.warning("rank %d has other package versions, so results may differ between ranks: %s", rank, "; ".join(differing))


def opened_alike(open_data: Callable[[], Opened], process: Process, *, option: str = "data.train") -> Opened:
    """Opens the data on every rank and checks that all have the same images.

    Raises UserError on every rank, which names what differs and where, or why a rank cannot open its data.
    """
    if process.world_size == 1:
        return open_data()
    opened, failure = None, None
    try:
        opened = open_data()
        facts = opened.fingerprint()
    except UserError as error:
        # This rank still takes part in the comparison, or the others would wait for it until the timeout.
        failure, facts = error, {"state": f"unusable ({error})"}
    try:
        require_agreement({f"{option}'s {name}": fact for name, fact in facts.items()}, process)
        if opened is None:
            raise failure or UserError(f"{option}: cannot be opened")
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    return opened


def require_agreement(facts: dict[str, str], process: Process) -> None:
    """Compares each rank's facts with those of rank 0. Raises UserError on every rank, which names those that differ and where."""
    # Each rank finds its own differences, so that what travels stays at a few kilobytes with a thousand ranks.
    main = broadcast_from_main(facts)
    mine = [f"{name} = {facts.get(name)}, where rank 0 has {main.get(name)}" for name in facts | main if facts.get(name) != main.get(name)]
    differing = gather_on_main(mine)
    lines = [f"rank {rank}: {'; '.join(found[:5])}" for rank, found in enumerate(differing) if found]
    # Sent back to all, so that every rank ends with the same error instead of waiting for those that have ended.
    verdict = broadcast_from_main(" | ".join(lines[:4]) + (f" | and {len(lines) - 4} more ranks" if len(lines) > 4 else ""))
    if verdict:
        raise UserError(f"the ranks do not run the same thing ({verdict}); start all of them with the same options, data and code")
