"""Converts and embeds on a cluster of Ray with two nodes, loses one in the middle of each, and compares with one machine's results.

python -m tests.long.ray_engine [--images 8000] [--embedded 8192]        (about ten minutes on two cores; needs pip install 'fastbyol[ray]')

Four cases: a node is killed while it converts a part; a node is told to leave by SIGTERM; a node does not see the shared folder (needs root, for
a mount namespace); a node is killed while it embeds. Both nodes are processes of this machine, each with one CPU. Every case shows that its
fault struck: the process that worked on that node, what it had done, and that it is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastbyol.data.conversion.tar_parts import merge_tar_parts, write_tar_part
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.evaluation.embedding import embed
from fastbyol.evaluation.feature_file import FeatureFile
from fastbyol.ranks.parts import Part
from tests.commands import ROOT, SMALL_RUN, await_gone, children_of, is_alive
from tests.images import write_many

PARTS = 6
LIMIT_S = 600.0
Found = TypeVar("Found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000, help="images to convert")
    parser.add_argument("--embedded", type=int, default=8192, help="images to embed, at least three parts of 2,048")
    options = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="fastbyol-ray-") as scratch:
        folder = Path(scratch)
        images = write_many(folder / "images", images=options.images, bad_every=50)
        for number in range(PARTS):
            write_tar_part(images, out=folder / "alone", part=Part(number, PARTS), workers=1, shard_mib=1, options=DROPPED)
        merge_tar_parts(folder / "alone", options=DROPPED)
        _conversion_with_a_node_lost(folder, images, "killed", lambda cluster, node, _: cluster.remove_node(node, allow_graceful=False))
        _conversion_with_a_node_lost(folder, images, "told to leave", _tell_to_leave)
        _node_that_does_not_see_the_folder(folder, images)
        _embedding_with_a_node_lost(folder, options.embedded)


DROPPED = ConversionOptions(max_dropped=0.1)


def _two_nodes() -> tuple[Any, Any]:
    """Returns a cluster of two nodes with a CPU each, and the one that holds neither the cluster's head nor the command."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    return cluster, cluster.add_node(num_cpus=1)


def _start(cluster: Any, log: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastbyol", *map(str, arguments), "--engine", "ray"]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "RAY_ADDRESS": cluster.address}, cwd=ROOT)


def _convert(images: Path, out: Path) -> list[str | Path]:
    return [
        *("convert", "--data", images, "--to", "dali", "--out", out, "--parts", str(PARTS), "--shard-mb", "1"),
        *("--max-dropped", "0.1", "--flush-every", "0"),
    ]


def _awaited(what: str, find: Callable[[], Found | None], process: subprocess.Popen[bytes], log: Path) -> Found:
    """Returns what `find` finds, once it finds something."""
    deadline = time.monotonic() + LIMIT_S
    while (found := find()) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{what} did not come (exit code {process.returncode}):\n{log.read_text()}")
        time.sleep(0.01)
    return found


def _workers_of(node: Any) -> list[int]:
    (raylet,) = node.all_processes["raylet"]
    return children_of(raylet.process.pid)


def _conversion_with_a_node_lost(folder: Path, images: Path, how: str, lose: Callable[[Any, Any, int], None]) -> None:
    out, log = folder / f"converted, node {how}", folder / "convert.log"
    cluster, victim = _two_nodes()
    started = time.monotonic()
    process = _start(cluster, log, *_convert(images, out))

    def in_the_middle() -> tuple[int, Path, int] | None:
        for lock in out.glob(".part-*.partial/lock"):
            try:
                pid = int((re.match(r"process (\d+) ", lock.read_text()) or ["", "0"])[1])
                done = json.loads(lock.with_name("journal.json").read_text())["done"]
            except FileNotFoundError:
                continue
            if pid in _workers_of(victim) and done > 100:
                return pid, lock, done
        return None

    pid, lock, done = _awaited("a part in the middle", in_the_middle, process, log)
    lose(cluster, victim, pid)
    await_gone([pid])
    part = lock.parent.name.removeprefix(".").removesuffix(".partial")
    struck = lock.exists() and not (out / f"{part}.json").exists()

    def continued() -> int | None:
        """Returns the process that works on the same part now."""
        if (out / f"{part}.json").exists() or (out / "manifest.json").exists():
            return 0
        text = lock.read_text() if lock.exists() else ""
        other = int((re.match(r"process (\d+) ", text) or ["", "0"])[1])
        return other if other != pid and is_alive(other) else None

    other = _awaited("the part again", continued, process, log)
    code = process.wait(LIMIT_S)
    cluster.shutdown()
    same = code == 0 and _files(out) == _files(folder / "alone")
    print(
        f"conversion, node {how}: process {pid} was lost at {done} images of {part}, process {other or '(not seen)'} went on; exit code {code}, "
        f"{len(_files(out))} files {'identical to' if same else 'DIFFERENT from'} one machine's, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if not (same and struck):
        sys.exit(log.read_text())


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _tell_to_leave(_cluster: Any, _node: Any, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def _node_that_does_not_see_the_folder(folder: Path, images: Path) -> None:
    from ray.cluster_utils import Cluster

    if os.geteuid():
        print("a node that does not see the folder: left out, needs root")
        return
    out, log = folder / "unseen", folder / "unseen.log"
    out.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    # Only this node has CPUs, and another file system in the place of the folder.
    ray = f"{sys.executable} -c 'from ray.scripts.scripts import main; main()'"
    start = f"mount -t tmpfs none '{out}' && exec {ray} start --address {cluster.address} --num-cpus 1 --block"
    node = subprocess.Popen(["unshare", "--mount", "bash", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        cluster.worker_nodes.add(node)  # counted, so that the next line waits for it
        cluster.wait_for_nodes(LIMIT_S)
        cluster.worker_nodes.clear()
        process = _start(cluster, log, *_convert(images, out))
        code, said = process.wait(LIMIT_S), log.read_text().strip().splitlines()[-1]
    finally:
        node.terminate()
        node.wait(LIMIT_S)
        cluster.shutdown()
    print(f"a node that does not see the folder: exit code {code}: {said}", flush=True)
    if code != 2 or f"{out}: is not there, or is another; with --engine ray it must lie on storage that all nodes share" not in said:
        sys.exit("another end was expected")


def _embedding_with_a_node_lost(folder: Path, images: int) -> None:
    from fastbyol.train import main as train

    data = write_many(folder / "embedded", images=images)
    run, out, log = folder / "run", folder / "rows.parquet", folder / "embed.log"
    train([*SMALL_RUN, "--steps", "4", "--optim.warmup_epochs", "0", "--data.train", str(data), "--out", str(run)])
    embed(run, data, out=folder / "alone.parquet", workers=1)
    cluster, victim = _two_nodes()
    started = time.monotonic()
    process = _start(cluster, log, "embed", "--checkpoint", run, "--data", data, "--out", out)

    def busy_actor() -> int | None:
        for pid in _workers_of(victim):
            # Ray names a process after what it runs: this actor has rows in its hands.
            if b"MapWorker" in (title := Path(f"/proc/{pid}/cmdline").read_bytes()) and b".submit" in title:
                return pid
        return None

    pid = _awaited("an actor on the other node", busy_actor, process, log)
    time.sleep(3)  # into its rows
    struck = busy_actor() == pid and not out.exists()
    cluster.remove_node(victim, allow_graceful=False)
    await_gone([pid])
    written = len(list(folder.glob(".rows.parquet.partial/part-*.npz")))
    code = process.wait(LIMIT_S)
    cluster.shutdown()
    if code:
        sys.exit(log.read_text())
    one, two = FeatureFile(folder / "alone.parquet"), FeatureFile(out)
    off = float(np.abs(one.read() - two.read()).max())
    same = one.names == two.names and (one.labels == two.labels).all() and one.facts == two.facts and off <= 1e-5
    print(
        f"embedding: actor {pid} was lost in the middle of its rows, when {written} of {-(-images // 2048)} parts were written; exit code {code}, "
        f"{images} rows {'equal' if same else 'DIFFERENT from'} one machine's, largest difference {off:.1g}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if not (same and struck):
        sys.exit(log.read_text())


if __name__ == "__main__":
    main()
