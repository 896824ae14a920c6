"""The long faults: minutes each, so not part of the suite. Each prints one line per case and fails at the first that is wrong.

python -m tests.long.fault_plan resume      12 steps == kill -9 in step 8 + the rest: every backend, ranks, accumulation, precision, compile
python -m tests.long.fault_plan kills       20 kills -9 of random workers under torchrun --max-restarts: same weights at the end
python -m tests.long.fault_plan stops       SIGTERM, SIGINT and SIGUSR1 at random moments: no step lost
python -m tests.long.fault_plan writes      kill -9 while a checkpoint is being written: the one before, or the new one, never half of one
python -m tests.long.fault_plan nodes       two torchruns that meet on one address, a worker of one killed
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from pathlib import Path

from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint
from tests.commands import KNOWS_SHUTDOWN_TIMEOUT, ROOT, SMALL_RUN, LaunchedRun, is_alive, run_python, state_digest
from tests.images import smooth_image


def main() -> None:
    cases = {"resume": resume, "kills": kills, "stops": stops, "writes": writes, "losses": losses, "nodes": nodes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(cases), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbyol-faults-") as scratch:
        data = make_data(Path(scratch))
        for name in options.cases:
            start = time.perf_counter()
            cases[name](Path(scratch), data, random.Random(options.seed))
            print(f"{name}: all as they must be, {time.perf_counter() - start:.0f} s", flush=True)


def make_data(scratch: Path) -> dict[str, Path]:
    """The same 51 images for every backend."""
    folder = scratch / "images"
    for label, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for i in range(16 + label):
            smooth_image(100 * label + i, 40, 40).save(folder / name / f"{i:03d}.jpg", quality=92)
    write_beton(folder, out=scratch / "t.beton", workers=1)
    write_tar_shards(folder, out=scratch / "shards", workers=1, seed=3)
    return {"ffcv": scratch / "t.beton", "dali": scratch / "shards", "folder": folder}


def check(condition: bool, what: str, log: str = "") -> None:
    if not condition:
        raise SystemExit(f"WRONG: {what}\n{log[-4000:]}")


def resume(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """int(2 * 51) // 8 = 12 steps, a checkpoint after 5; killed in step 8, in the second epoch of 6. Compiled without accumulation."""
    grid = [
        cell for cell in itertools.product(data, (1, 2), (1, 2), ("off", "bf16"), ("false", "true")) if cell[2] == 1 or cell[4] == "false"
    ]
    cells = {}
    for backend, ranks, accumulate, autocast, compiled in grid:
        name = f"{backend}, {ranks} ranks, {accumulate} micro-batches, autocast {autocast}, compile {compiled}"
        cells[name, ranks] = [
            *SMALL_RUN,
            *("--epochs", "2", "--checkpoint_every", "5", "--data.train", str(data[backend]), "--data.backend", backend),
            *("--rank_batch", str(8 // ranks // accumulate), "--precision.autocast", autocast, "--precision.compile", compiled),
        ]
    folders = {name: scratch / f"cell{number}" for number, (name, _) in enumerate(cells)}
    for ranks in (1, 2):
        mine = {name: arguments for (name, r), arguments in cells.items() if r == ranks}
        many_runs(scratch, [[*arguments, "--out", f"{folders[name]}-whole"] for name, arguments in mine.items()], ranks=ranks)
        for name, arguments in mine.items():
            out = Path(f"{folders[name]}-cut")
            fault = f"kill:{chance.randrange(ranks)}:8"
            with LaunchedRun(scratch / "cut.log", *arguments, "--out", str(out), ranks=ranks if ranks > 1 else 0, fault=fault) as run:
                run.finish()
                check("FAULT kill" in run.log and checkpoint_steps(out) == [5], f"{name}: killed in step 8", run.log)
        many_runs(scratch, [[*arguments, "--out", f"{folders[name]}-cut"] for name, arguments in mine.items()], ranks=ranks)
        for name in mine:
            whole, cut = (state_digest(Path(f"{folders[name]}-{kind}"), 12) for kind in ("whole", "cut"))
            check(whole == cut, f"{name}: not bitwise equal")
            print(f"  {name}: bitwise equal, {whole[:12]}", flush=True)


def many_runs(scratch: Path, runs: list[list[str]], *, ranks: int) -> None:
    file = scratch / "runs.json"
    file.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_python(*launcher, "tests/long/many_runs.py", file, env=environment, timeout=1800)
    check(done.returncode == 0, "the runs end", done.stderr)


def kills(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """5 runs of 4 kills each, at random moments between the start of training and 4 s later (some fall into the next start)."""
    arguments = [*SMALL_RUN, "--epochs", "20", "--checkpoint_every", "5", "--data.train", str(data["ffcv"])]
    with LaunchedRun(scratch / "whole.log", *arguments, "--out", str(scratch / "k-whole"), ranks=2) as run:
        check(run.finish() == 0, "the uninterrupted run", run.log)
    want, fired, killed_at, recovery_s = state_digest(scratch / "k-whole"), 0, 0.0, []
    for number in range(5):
        out = scratch / f"k{number}"
        launcher = ("--standalone", "--max-restarts", "10", "--monitor-interval", "0.2")
        with LaunchedRun(scratch / "k.log", *arguments, "--out", str(out), ranks=2, launcher=launcher) as run:
            for kill in range(4):
                starts = len(re.findall("global batch 8 =", run.log)) if kill else 0
                run.wait_for("global batch 8 =", count=max(starts, kill + 1))
                recovery_s += [time.perf_counter() - killed_at] if kill else []
                time.sleep(chance.uniform(0, 4))
                workers = run.workers()
                if run.process.poll() is None and workers:
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed_at, fired = time.perf_counter(), fired + 1
                elif run.process.poll() is not None:
                    break
            check(run.finish() == 0, f"run {number} ends well", run.log)
            check(state_digest(out) == want, f"run {number}: other weights", run.log)
            print(f"  run {number}: same weights after {len(re.findall('exitcode: -9', run.log))} kills", flush=True)
    check(fired == 20, f"only {fired} kills fired")
    print(f"  recovery (kill to training again): median {sorted(recovery_s)[len(recovery_s) // 2]:.1f} s, longest {max(recovery_s):.1f} s")


def stops(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """Each signal to torchrun at 3 random moments of the run, to plain python at 3 and at 3 of its start or end."""
    arguments = [*SMALL_RUN, "--epochs", "10", "--checkpoint_every", "1000", "--data.train", str(data["ffcv"])]
    launcher = ("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    wanted = {}
    for ranks in (0, 2):
        out = scratch / f"s-whole{ranks}"
        with LaunchedRun(scratch / "s.log", *arguments, "--out", str(out), ranks=ranks) as run:
            check(run.finish() == 0, "the uninterrupted run", run.log)
        wanted[ranks] = state_digest(out)
    for ranks, number, turn in itertools.product((0, 2), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), range(3)):
        out = scratch / f"s{ranks}{number.name}{turn}"
        with LaunchedRun(scratch / "s.log", *arguments, "--out", str(out), ranks=ranks, launcher=launcher) as run:
            run.wait_for(f"step {chance.randrange(1, 40)}/")
            time.sleep(chance.uniform(0, 0.1))
            sent_at = int(re.findall(r"step (\d+)/63", run.log)[-1])
            run.send(number)
            code = run.finish()
            check(code == (1 if ranks else 75), f"{number.name}: exit code {code}", run.log)
            saved, shown = checkpoint_steps(out)[-1], int(re.findall(r"step (\d+)/63", run.log)[-1])
            check(saved == shown, f"{number.name}: saved step {saved}, reached step {shown}", run.log)
        with LaunchedRun(scratch / "s.log", *arguments, "--out", str(out), ranks=ranks) as run:
            check(run.finish() == 0 and state_digest(out) == wanted[ranks], f"{number.name}: other weights", run.log)
        print(f"  {number.name} to {'torchrun' if ranks else 'python'}: sent after step {sent_at}, saved {saved}, same weights", flush=True)
    for number, turn in itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), range(3)):
        out = scratch / f"s-edge{number.name}{turn}"
        with LaunchedRun(scratch / "s.log", *arguments, "--out", str(out)) as run:
            wait_until_heard(run)
            if turn == 2:
                run.wait_for("step 62/")
            time.sleep(chance.uniform(0, (2, 6, 0.5)[turn]))
            run.send(number)
            code = run.finish()
            check(code in (0, 75) and "Traceback" not in run.log, f"{number.name}: exit code {code}", run.log)
            done = checkpoint_steps(out)
        with LaunchedRun(scratch / "s.log", *arguments, "--out", str(out)) as run:
            check(run.finish() == 0 and state_digest(out) == wanted[0], f"{number.name}: other weights", run.log)
        print(f"  {number.name} to python near its start or end: code {code}, saved {done}, same weights", flush=True)


def wait_until_heard(run: LaunchedRun) -> None:
    """Until the process has handlers of its own: before that it is not Python's."""
    while not int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{run.process.pid}/status").read_text())[0], 16) >> (signal.SIGUSR1 - 1) & 1:
        check(run.process.poll() is None, "the run starts", run.log)


def writes(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """A checkpoint after every step of a wide net (30 MB), killed at 20 random moments: nearly all fall into a write."""
    arguments = [*SMALL_RUN, "--epochs", "100", "--checkpoint_every", "1", "--data.train", str(data["ffcv"]), "--model.hidden_dim", "4096"]
    out, unfinished = scratch / "w", 0
    for turn in range(20):
        before = checkpoint_steps(out)
        with LaunchedRun(scratch / "w.log", *arguments, "--out", str(out)) as run:
            run.wait_for(f"step {max(before, default=0) + 2}/")
            time.sleep(chance.uniform(0, 1))
            run.process.kill()
            run.process.wait()
        unfinished += len(list((out / "checkpoints").glob("*.tmp-*")))
        steps = checkpoint_steps(out)
        for step in steps:
            check(load_checkpoint(checkpoint_path(out, step))["step"] == step, f"checkpoint {step} is whole")
        check(bool(steps) and steps[-1] > max(before, default=0), f"turn {turn}: nothing new was saved")
    check(unfinished > 0, "no kill fell into a write")
    print(f"  20 kills, {unfinished} left an unfinished file, every checkpoint whole at every turn", flush=True)


def losses(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """Every kind of loss on rank 1 of 2, and data that never come to plain python."""
    arguments = [*SMALL_RUN, "--epochs", "10", "--checkpoint_every", "5", "--data.train", str(data["ffcv"]), "--timeout_s", "8"]
    launcher = ("--standalone", *(("--shutdown-timeout", "2") if KNOWS_SHUTDOWN_TIMEOUT else ()))
    says = {
        "kill": "exitcode  : -9",
        "exit": "rank 0 got no answer from another rank",
        "raise": "KeyError: 'injected'",
        "stop": "rank 0 got no answer from another rank",
        "hang": "(rank 0 got no answer from another rank|rank 1 got no answer|no step for 8 s)",
    }
    for kind, ranks in [*((kind, 2) for kind in says), ("hang", 0)]:
        out = scratch / f"l-{kind}{ranks}"
        step = chance.randrange(7, 30)
        fault = f"{kind}:{1 if ranks else 0}:{step}"
        with LaunchedRun(scratch / "l.log", *arguments, "--out", str(out), ranks=ranks, launcher=launcher, fault=fault) as run:
            run.wait_for("FAULT")
            struck, workers = time.perf_counter(), run.workers()
            code = run.finish()
            took = time.perf_counter() - struck
            check(code == (1 if ranks else 5), f"{fault}: exit code {code}", run.log)
            check(
                bool(re.search(says[kind] if ranks else "no step for 8 s .timeout_s., the process waits in", run.log)),
                f"{fault}: the cause",
                run.log,
            )
            check(not any(is_alive(pid) for pid in workers), f"{fault}: nobody is left", run.log)
            check(took < 8 + 60, f"{fault}: took {took:.0f} s", run.log)
        last = checkpoint_steps(out)[-1]
        check(
            last >= (step - 1) // 5 * 5 - 5 and load_checkpoint(checkpoint_path(out, last))["step"] == last, f"{fault}: checkpoint {last}"
        )
        print(f"  {fault} with {ranks or 1} ranks: all ended {took:.0f} s later, code {code}, checkpoint {last}", flush=True)


def nodes(scratch: Path, data: dict[str, Path], chance: random.Random) -> None:
    """The run of two nodes is the run of one node with two ranks, also when a node's worker is killed on the way."""
    del chance
    arguments = [*SMALL_RUN, "--epochs", "10", "--checkpoint_every", "5", "--data.train", str(data["ffcv"])]
    with LaunchedRun(scratch / "whole.log", *arguments, "--out", str(scratch / "n-whole"), ranks=2) as run:
        check(run.finish() == 0, "the uninterrupted run", run.log)
    for kill in ("nobody", "rank 0", "rank 1"):
        out = scratch / f"n-{kill[-1]}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        launcher = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "faults", "--max-restarts", "3")
        first = LaunchedRun(scratch / "n0.log", *arguments, "--out", str(out), ranks=1, launcher=launcher)
        second = LaunchedRun(scratch / "n1.log", *arguments, "--out", str(out), ranks=1, launcher=launcher)
        with first, second:
            shows = first if wait_for_either(first, second, "step 12/") else second
            if kill != "nobody":
                victim = shows if kill == "rank 0" else (second if shows is first else first)
                os.kill(victim.workers()[0], signal.SIGKILL)
            codes = [first.finish(), second.finish()]
            check(codes == [0, 0], f"{kill} killed: exit codes {codes}", first.log + second.log)
            check(state_digest(out) == state_digest(scratch / "n-whole"), f"{kill} killed: other weights", first.log + second.log)
            check((kill == "nobody") or ("continues after" in first.log + second.log), "the kill fired", first.log + second.log)
            print(f"  two torchruns, {kill} killed: same weights", flush=True)


def wait_for_either(first: LaunchedRun, second: LaunchedRun, text: str) -> bool:
    """Whether it was the first."""
    while text not in first.log + second.log:
        check(first.process.poll() is None and second.process.poll() is None, f"{text} comes", first.log + second.log)
        time.sleep(0.05)
    return text in first.log


if __name__ == "__main__":
    main()
