"""Trains from a web server that fails in every way it can, and on machines that are taken away; each run ends in the undisturbed weights.

python -m tests.long.remote_training [--steps 80] [--only NAME …]        (15 minutes on two quiet cores; `--list` names the cases)
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import tests.commands
from fastbyol.config.errors import LOST_EXIT, USER_ERROR_EXIT
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.run.checkpoint import checkpoint_steps, load_newest
from tests.commands import SMALL_RUN, LaunchedRun, state_digest
from tests.web_server import WebServer

IMAGES, BATCH = 160, 8
CACHE_GIB = 3.3 / 1024
"""Three of the eleven shards: data are fetched all the time."""


class Scene:
    """One folder of data, one server, and runs on them."""

    def __init__(self, root: Path, *, steps: int) -> None:
        self.root, self.steps, self.number = root, steps, 0
        rng = np.random.default_rng(0)
        for i in range(IMAGES):
            folder = root / "images" / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (200, 280, 3), dtype=np.uint8)).save(folder / f"{i:03d}.jpg", quality=95)
        (root / "site").mkdir()
        write_tar_shards(root / "images", out=root / "site/train", workers=1, shard_mib=1)
        self.bytes = sum(path.stat().st_size for path in (root / "site/train").glob("*.tar"))
        self.server = WebServer(root / "site")

    def arguments(self, out: Path, *options: str, data: str = "", traversal: str = "local") -> list[str]:
        return [
            *(*SMALL_RUN, "--steps", str(self.steps), "--checkpoint_every", "10", "--keep_checkpoints", "3"),
            *("--data.train", data or f"{self.server.url}/train", "--data.cache_gib", str(CACHE_GIB)),
            *("--data.traversal", traversal, "--data.window_mib", "1", "--data.prefetch", "1", "--out", str(out), *options),
        ]

    def fresh(self) -> Path:
        """Returns a run folder's path, which does not exist yet."""
        self.number += 1
        return self.root / f"run{self.number}"

    def run(
        self, out: Path, *options: str, meanwhile: Callable[[LaunchedRun], object] = lambda run: None, **settings: str
    ) -> tuple[int, str]:
        """Runs to the end with a cache of its own; returns exit code and log."""
        cache = ("--data.cache", f"{out}-cache")
        with LaunchedRun(out.with_suffix(f".{time.time_ns()}.log"), *self.arguments(out, *cache, *options, **settings)) as run:
            meanwhile(run)
            return run.finish(), run.log


def check(condition: bool, what: object) -> None:
    if not condition:
        raise AssertionError(str(what)[-3000:])


def error_line(log: str) -> str:
    lines = [line for line in log.splitlines() if "fastbyol: error:" in line]
    check(len(lines) == 1 and "Traceback" not in log, log)
    return lines[0]


def undisturbed_from_the_store(scene: Scene, digest: str) -> str:
    out = scene.fresh()
    code, log = scene.run(out)
    check(code == 0 and state_digest(out) == digest, log)
    sent = sum(sent for name, sent in scene.server.sent.items() if name.endswith(".tar"))
    epochs = scene.steps * BATCH / IMAGES
    check(sent <= (epochs + 1) * scene.bytes, sent)
    return f"{sent / scene.bytes:.2f} times the data in {epochs:g} epochs with a cache of {CACHE_GIB * 2**30 / scene.bytes:.0%}"


def stopped_for_20_s(scene: Scene, digest: str) -> str:
    out = scene.fresh()

    def stop(run: LaunchedRun) -> None:
        run.wait_for(r"step 15/")
        scene.server.stop()
        time.sleep(20)
        scene.server.start()

    code, log = scene.run(out, meanwhile=stop)
    check(code == 0 and state_digest(out) == digest, log)
    tries = log.count("tried again in")
    check(tries > 0, "the fault did not strike")
    return f"{tries} more tries"


def killed_for_good(scene: Scene, digest: str) -> str:
    out = scene.fresh()

    def stop(run: LaunchedRun) -> None:
        run.wait_for(r"step 25/")
        scene.server.stop()

    code, log = scene.run(out, meanwhile=stop)
    line = error_line(log)
    check(code == LOST_EXIT and "did not answer in 7 tries" in line and "continues from the last checkpoint" in line, log)
    check(load_newest(out) is not None and checkpoint_steps(out)[-1] >= 20, checkpoint_steps(out))
    scene.server.start()
    code, log = scene.run(out)
    check(code == 0 and "continues after step" in log and state_digest(out) == digest, log)
    return line


def failing_answers(scene: Scene, digest: str) -> str:
    chance, out = random.Random(0), scene.fresh()
    damaged_last = set[str]()

    def fault(method: str, path: str) -> str:
        chosen = chance.choices(["", "503", "cut", "damaged"], [14, 2, 2, 2])[0] if path.endswith(".tar") else ""
        if chosen == "damaged" and path in damaged_last:
            return ""  # the same damage twice in a row would mean that the store's own copy is damaged
        (damaged_last.add if chosen == "damaged" else damaged_last.discard)(path)
        return chosen

    scene.server.fault = fault
    code, log = scene.run(out)
    check(code == 0 and state_digest(out) == digest, log)
    struck = scene.server.struck
    check(all(struck[fault] for fault in ("503", "cut", "damaged")), struck)
    return str(dict(struck))


def damaged_shard(scene: Scene, digest: str) -> str:
    shard = sorted((scene.root / "site/train").glob("*.tar"))[3]
    good = shard.read_bytes()
    middle = len(good) // 2
    shard.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    out = scene.fresh()
    try:
        code, log = scene.run(out)
    finally:
        shard.write_bytes(good)
    line = error_line(log)
    check(code == USER_ERROR_EXIT and shard.name in line and "other bytes in the store" in line, log)
    code, log = scene.run(out)
    check(code == 0 and state_digest(out) == digest, log)
    return line


def preempted(scene: Scene, digest: str) -> str:
    out, chance, at = scene.fresh(), random.Random(1), []
    mirror = ("--mirror", f"file://{scene.root}/mirror")
    for after in (12, 34, 55):
        with LaunchedRun(out.with_suffix(f".{after}.log"), *scene.arguments(out, "--data.cache", f"{out}-cache", *mirror)) as run:
            run.wait_for(rf"step {after}/")
            time.sleep(0.5 * chance.random())
            run.send(signal.SIGKILL)
            check(run.finish() == -signal.SIGKILL, run.log)
            at.append(run.log.rpartition("step ")[2].split("/")[0])
        shutil.rmtree(out)
        shutil.rmtree(f"{out}-cache")
    code, log = scene.run(out, *mirror)
    check(code == 0 and "is copied from there" in log and state_digest(out) == digest, log)
    return f"killed at steps {', '.join(at)}, each time with the folder and the cache lost"


def two_nodes(scene: Scene, digest: str) -> str:
    """Starts two agents of torchrun with one rank each, as on two machines, with caches of their own."""
    sent, digests = dict[str, float](), []
    epochs = scene.steps * BATCH / IMAGES
    for name, traversal in (("sharded", "sharded"), ("sharded, stopped and continued", "sharded"), ("local", "local")):
        out = scene.fresh()
        scene.server.sent.clear()
        for attempt in range(2 if "stopped" in name else 1):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            runs = [
                LaunchedRun(
                    out.with_suffix(f".{attempt}.{node}.log"),
                    *scene.arguments(out, "--data.cache", f"{out}-cache{node}", traversal=traversal),
                    ranks=1,
                    launcher=("--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                )
                for node in range(2)
            ]
            with runs[0], runs[1]:
                if "stopped" in name and attempt == 0:
                    runs[0].wait_for(r"step 33/")
                    runs[0].send(signal.SIGTERM)
                codes = [run.finish() for run in runs]
            check(all(code == 0 for code in codes) or ("stopped" in name and attempt == 0), runs[0].log + runs[1].log)
        sent[name] = sum(sent for file, sent in scene.server.sent.items() if file.endswith(".tar")) / scene.bytes
        if traversal == "sharded":
            digests.append(state_digest(out))
    check(digests[0] == digests[1], "a stopped and continued run differs")
    check(sent["sharded"] < 0.75 * sent["local"], sent)
    return f"data sent, in sizes of the data for {epochs:g} epochs: " + ", ".join(f"{name} {times:.2f}" for name, times in sent.items())


CASES = (undisturbed_from_the_store, stopped_for_20_s, killed_for_good, failing_answers, damaged_shard, preempted, two_nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="*", default=[case.__name__ for case in CASES], help="names of cases")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        sys.exit(print(*(case.__name__ for case in CASES)))
    tests.commands.LIMIT_S = 1200.0
    with tempfile.TemporaryDirectory(prefix="fastbyol-store-") as scratch:
        scene = Scene(Path(scratch), steps=options.steps)
        local = scene.fresh()
        code, log = scene.run(local, data=str(scene.root / "site/train"))
        check(code == 0, log)
        digest = state_digest(local)
        for case in CASES:
            if case.__name__ not in options.only:
                continue
            scene.server = WebServer(scene.root / "site")
            scene.server.sent, scene.server.struck = Counter(), Counter()
            began = time.monotonic()
            with scene.server:
                said = case(scene, digest)
            print(f"{case.__name__.replace('_', ' ')}: right, {time.monotonic() - began:.0f} s. {said}", flush=True)


if __name__ == "__main__":
    main()
