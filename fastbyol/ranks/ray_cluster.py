"""The cluster of an `--engine ray`: connecting to it, and its errors as one line. Scheduling, placement and retries are Ray's own."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastbyol.config.console import say
from fastbyol.config.errors import Lost, RunError, UserError, first_line, shortened

ENGINES = ("local", "ray")
ENGINE_HELP = (
    "local: this process and, under torchrun, its ranks; ray: the cluster at RAY_ADDRESS, else one on this machine (default: local)"
)

ANSWER_S = 10.0
"""Seconds that the cluster's head has to accept a connection."""


def import_ray(module: str = "ray") -> Any:
    """Returns Ray, or a module of it. Raises UserError if it is not installed."""
    # A cluster that starts here must neither report its use nor serve a dashboard; one that runs already is its owner's.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--engine ray: Ray is not installed ({first_line(error)}); pip install 'fastbyol[ray]'") from None


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Connects this process to the cluster at RAY_ADDRESS, or to a local one, which is started if none runs; yields the module ray.

    What the block raises because of the cluster becomes one line: an error of ours that was raised on a node is raised here, and a node
    that is lost for good is a `Lost`. Anything else that was raised on a node keeps its traceback.

    Raises UserError if Ray is not installed, or if no cluster answers at RAY_ADDRESS.
    """
    ray = import_ray()
    was_connected = ray.is_initialized()
    if not was_connected:
        _connect(ray)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise _one_line(ray, error) from error
    finally:
        if not was_connected:
            ray.shutdown()


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    require_answer(address)
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare Exceptions too, as when a node of its own did not start in time
        if address:
            raise _no_cluster(address, error) from error
        raise UserError(
            f"--engine ray: Ray did not start on this machine ({first_line(error)}); is it overloaded? Or set RAY_ADDRESS to a cluster"
        ) from error
    finally:
        if in_main_thread and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray has installed a handler of its own, which would bypass ours


def require_answer(address: str) -> None:
    """Raises UserError if nothing listens at HOST:PORT: Ray itself would try again for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"RAY_ADDRESS = {address}: no cluster of this version of Ray answers there ({first_line(error)}); start one with ray start --head, "
        "or unset RAY_ADDRESS to use this machine alone"
    )


def _one_line(ray: Any, error: Exception) -> Exception:
    """Returns the error of ours that caused an error of Ray's; without one, a `Lost` if Ray gave something up, else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        for kind in (UserError, *RunError.__subclasses__()):
            # Ray's errors may be of our class too, but their text is a coloured traceback; ours is further down.
            if isinstance(cause, kind) and not isinstance(cause, ray.exceptions.RayError):
                return kind(str(cause).partition("\n")[0])  # Ray Data adds lines about its settings
        if isinstance(cause, ModuleNotFoundError):
            return UserError(f"--engine ray: a node of the cluster lacks a package ({first_line(cause)}); install the same there as here")
        cause = getattr(cause, "cause", None) or cause.__cause__
    is_ours = isinstance(error, (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException))
    return error if is_ours else Lost(f"--engine ray: {shortened(error)}; the same command continues")


def node_resources(ray: Any, name: str) -> list[int]:
    """Returns how many CPUs or GPUs ('CPU', 'GPU') each living node has."""
    return [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]


def warn_if_none_fits(ray: Any, *, cpus: int) -> None:
    """Prints a note if no node has this many CPUs: Ray silently waits for one, since a cluster may grow."""
    largest = max(node_resources(ray, "CPU"), default=0)
    if largest < cpus:
        say(f"fastbyol: note: --workers {cpus}: the largest node has {largest} CPUs; waiting for one that has {cpus}")


def on_this_node(error: UserError) -> UserError:
    """Returns the error with the name of this node, where it was raised."""
    return UserError(f"{error} (on node {platform.node()})")
