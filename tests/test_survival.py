"""Events that a run must survive, tested in this process: signals, NaN, full disks, other machines, other initial weights."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbyol import load_encoder, train
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.host.quantities import duration_text
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.stop_vote import StopVote, Verdict
from fastbyol.run import checkpoint
from fastbyol.run import folder as run_folder
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from fastbyol.run.finite_check import FiniteCheck, first_not_finite
from fastbyol.run.log import ESTIMATE_STEPS, UNCOUNTED_STEPS, RunLog, read_metrics
from fastbyol.run.plan import RunPlan
from fastbyol.train import main
from tests.commands import SMALL_RUN, files_no_larger_than, state_digest

SMALL = (*SMALL_RUN, "--epochs", "2", "--checkpoint_every", "1")


@pytest.fixture(scope="module")
def arguments(data_paths) -> list[str]:
    return [*SMALL, "--data.train", str(data_paths["folder"])]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    main([*arguments, "--out", str(out)])
    return out


def _ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns exit code and stderr of a run that is expected to fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(str(caught.value.code)), capsys.readouterr().err


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[..., Any]], None]:
    """Calls strike(batches) at the start of a step, counted from 1; its return value replaces the step's batches."""

    def install(step: int, strike: Callable[[Iterator[ViewBatch]], Iterator[ViewBatch]]) -> None:
        inner, taken = train.train_step, [0]

        def struck(config, process, state, batches, *rest, **options):
            taken[0] += 1
            return inner(config, process, state, strike(batches) if taken[0] == step else batches, *rest, **options)

        monkeypatch.setattr(train, "train_step", struck)

    return install


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_after_a_signal_the_step_is_finished_and_saved_and_the_same_command_continues_bitwise(
    name, arguments, whole, at_step, tmp_path, monkeypatch, capsys
):
    requests = []

    class Noted(StopRequest):
        def __init__(self, **options):
            super().__init__(**options)
            requests.append(self)

    def strike(batches):
        os.kill(os.getpid(), signal.Signals[name])
        while not requests[-1].requested:
            time.sleep(0.001)
        return batches

    before = signal.getsignal(signal.Signals[name])
    monkeypatch.setattr(train, "StopRequest", Noted)
    at_step(3, strike)
    out = tmp_path / "run"
    arguments = [*arguments, "--checkpoint_every", "100", "--out", str(out)]
    code, said = _ends(arguments, capsys)
    assert code == 75
    assert re.search(rf"stopped \({name}\): saved after step 3 of 6; the same command continues", said), said
    assert checkpoint_steps(out) == [3]
    assert signal.getsignal(signal.Signals[name]) == before
    monkeypatch.undo()
    main(arguments)
    assert state_digest(out) == state_digest(whole)


def test_an_ignored_signal_stays_ignored():
    """The case of nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(grace_s=5) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            while not stop.requested:
                time.sleep(0.001)
            assert stop.name == "SIGUSR1"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_a_run_cut_off_after_any_step_ends_bitwise_the_same(step, arguments, whole, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(whole, out)
    for later in range(step + 1, 7):
        checkpoint_path(out, later).unlink()
    main([*arguments, "--out", str(out)])
    assert state_digest(out) == state_digest(whole)
    assert [r["loss"] for r in read_metrics(out)] == [r["loss"] for r in read_metrics(whole)]


def test_a_run_counted_in_steps_is_the_same_and_continues_bitwise(data_paths, whole, tmp_path):
    """5 steps are those of a run of 40 images' worth of epochs; 3 of its checkpoints are removed, as if it had been killed after step 2."""
    arguments = [
        *SMALL_RUN,
        "--checkpoint_every",
        "1",
        "--data.train",
        str(data_paths["folder"]),
        "--steps",
        "5",
        "--optim.warmup_steps",
        "2",
    ]
    main([*arguments, "--out", str(tmp_path / "steps")])
    digest, losses = state_digest(tmp_path / "steps"), [record["loss"] for record in read_metrics(tmp_path / "steps")]
    assert len(losses) == 5
    assert losses[:2] == [record["loss"] for record in read_metrics(whole)][:2], "lr 0 in the first step, whatever the warm-up"
    assert [record["lr"] for record in read_metrics(tmp_path / "steps")][:3] == pytest.approx([0, 0.125, 0.25])
    for later in (3, 4, 5):
        checkpoint_path(tmp_path / "steps", later).unlink()
    main([*arguments, "--out", str(tmp_path / "steps")])
    assert state_digest(tmp_path / "steps") == digest
    assert [record["loss"] for record in read_metrics(tmp_path / "steps")] == losses


def test_a_checkpoint_holds_all_that_changes_and_only_finite_numbers(whole):
    state = load_checkpoint(checkpoint_path(whole, 4))
    names = state["byol"].keys()
    assert {n.split(".")[0] for n in names} == {"online", "target", "probe"}
    assert any(n.startswith("target.") and n.endswith("running_var") for n in names)
    trained = [n for n in names if not n.startswith("target.") and "running" not in n and "num_batches" not in n]
    assert len(state["optimizer"]["state"]) == len(trained)
    assert state["loader"] == {"epoch": 1, "batch": 1, "batches_per_epoch": 3, "nodes": 1}
    assert state["step"] == 4
    assert state["config"]["global_batch"] == 8
    assert state["versions"]["torch"]
    assert set(state["ranks"]["rng"][0]) == {"python", "numpy", "torch", "cuda"}
    assert state["scaler"] == {}
    assert first_not_finite(state) is None


def _one_image_of_nan(batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
    for batch in batches:
        view1 = batch.view1.clone()
        view1[0] = torch.nan
        yield batch._replace(view1=view1)


def test_one_image_of_nan_ends_the_run_at_that_step_and_leaves_clean_checkpoints(arguments, at_step, whole, tmp_path, monkeypatch, capsys):
    at_step(4, _one_image_of_nan)
    out = tmp_path / "run"
    code, said = _ends([*arguments, "--out", str(out)], capsys)
    assert code == 3
    error = said.strip().splitlines()[-1]
    assert re.search(
        r"error: the loss is not finite in step 4 on rank 0 \(lr 0.25\): the run diverged; .*checkpoint is .*step-000000003.pt", error
    )
    assert checkpoint_steps(out) == [1, 2, 3]
    assert run_folder.divergence_of(out).startswith("the loss is not finite in step 4 on rank 0")
    assert all(first_not_finite(load_checkpoint(checkpoint_path(out, s))) is None for s in (1, 2, 3))
    monkeypatch.undo()
    main([*arguments, "--out", str(out)])
    assert state_digest(out) == state_digest(whole), "one NaN leaves no trace"
    assert run_folder.divergence_of(out) == ""


def test_a_learning_rate_beyond_all_bounds_ends_with_the_divergence_named(arguments, tmp_path, capsys):
    code, said = _ends([*arguments, "--optim.base_lr", "1e30", "--optim.name", "sgd", "--out", str(tmp_path / "run")], capsys)
    assert code == 3, said
    assert re.search("(not finite in step|is not finite after step)", said)
    assert "Traceback" not in said


def test_training_goes_on_through_a_full_disk_and_says_so_and_the_end_is_an_error(arguments, whole, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*arguments, "--checkpoint_every", "2", "--out", str(out)]
    with files_no_larger_than(300_000):
        code, said = _ends(arguments, capsys)
    assert code == 4
    assert len(read_metrics(out)) == 6, "all steps were taken"
    assert said.count("File too large") == 4, "three checkpoints are warned of, the last is also the error"
    assert re.search(
        r"error: checkpoint .*step-000000006.pt \(\d+ MB, \d+ MB free\): File too large; raise the limit on the size of files", said
    )
    assert "The run has no other checkpoint. After that the same command starts anew" in said.splitlines()[-1]
    assert list((out / "checkpoints").iterdir()) == []
    main(arguments)
    assert state_digest(out) == state_digest(whole)


def test_two_jobs_never_write_to_one_folder(arguments, whole, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.3)
    with (whole / "lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, said = _ends([*arguments, "--out", str(whole)], capsys)
    assert code == 2
    assert re.search(r"is in use by process \d+ on ", said)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--resume", "never"], "resume = 'never': .*holds a run of 6 steps"),
        (["--seed", "5"], "another config.*seed was 0, is 5"),
        (["--global_batch", "16"], "another config.*global_batch was 8, is 16"),
        (["--init_from", "x"], "another config.*init_from was '', is 'x'"),
        (["--out", "{whole}-new", "--resume", "must"], "resume = 'must': .*holds no checkpoint"),
    ],
)
def test_a_run_that_cannot_be_continued_is_refused_with_the_reason(options, says, arguments, whole, capsys):
    code, said = _ends([*arguments, "--out", str(whole), *[o.format(whole=whole) for o in options]], capsys)
    assert code == 2
    assert re.search(says, said), said


def test_a_data_set_of_another_size_is_refused(arguments, whole, data_paths, tmp_path, capsys):
    more, few = tmp_path / "more", tmp_path / "few"
    for folder in (more, few):
        shutil.copytree(data_paths["folder"], folder)
    shutil.copy(more / "ant" / "000.jpg", more / "ant" / "900.jpg")
    for path in sorted(few.glob("*/*.jpg"))[1::3] + sorted(few.glob("*/*.jpg"))[2::3] + [few / "cat" / "001.jpg"]:
        path.unlink(missing_ok=True)
    for folder, number in ((more, 26), (few, len(list(few.glob("*/*.jpg"))))):
        code, said = _ends([*arguments, "--out", str(whole), "--data.train", str(folder)], capsys)
        assert code == 2
        assert f"holds {number} images, the run in" in said


def test_another_rank_batch_sees_the_same_images_and_says_what_changes_for_batch_norm(arguments, whole, tmp_path, capsys, monkeypatch):
    seen: dict[int, list[int]] = {}
    inner = train.views_on_device

    def noted(batch, *rest, **options):
        seen.setdefault(len(batch.index), []).extend(batch.index.tolist())
        return inner(batch, *rest, **options)

    monkeypatch.setattr(train, "views_on_device", noted)
    for rank_batch in ("8", "2"):
        out = tmp_path / rank_batch
        shutil.copytree(whole, out)
        for later in (5, 6):
            checkpoint_path(out, later).unlink()
        main([*arguments, "--rank_batch", rank_batch, "--out", str(out)])
    assert seen[2] == seen[8]
    assert len(seen[8]) == 16
    assert "batch norm now sees 2 images at once, before 8" in capsys.readouterr().err


def test_a_checkpoint_stays_every_so_many_epochs(arguments, tmp_path):
    out = tmp_path / "run"
    main(
        [*arguments, "--epochs", "4", "--checkpoint_every", "100", "--keep_checkpoints", "2", "--keep_every_epochs", "1", "--out", str(out)]
    )
    # Epochs 1, 2 and 3 of 25 images end within steps 4, 7 and 10 of 8; step 12 is the end.
    assert checkpoint_steps(out) == [4, 7, 10, 12]


def test_a_run_may_start_with_the_networks_of_another(arguments, whole, tmp_path, capsys):
    torch.save(load_encoder(whole).state_dict(), tmp_path / "encoder.pt")
    first = ["--epochs", "0.4", "--optim.tau_base", "1"]  # one step of learning rate 0
    sources = {"folder": whole, "file": checkpoint_path(whole, 6), "encoder": tmp_path / "encoder.pt"}
    want = load_checkpoint(checkpoint_path(whole, 6))["byol"]
    for kind, source in sources.items():
        main([*arguments, *first, "--init_from", str(source), "--out", str(tmp_path / kind)])
        got = load_checkpoint(checkpoint_path(tmp_path / kind, 1))["byol"]
        for network in ("online", "target"):
            name = f"{network}.encoder.conv1.weight"
            assert torch.equal(got[name], want["online.encoder.conv1.weight" if kind == "encoder" else name])
        assert torch.equal(got["target.projector.0.weight"], want["target.projector.0.weight"]) == (kind != "encoder")
    shutil.rmtree(whole.parent / "moved", ignore_errors=True)
    (tmp_path / "encoder.pt").unlink()
    main([*arguments, *first, "--init_from", str(tmp_path / "encoder.pt"), "--out", str(tmp_path / "encoder")])  # complete: not read again
    assert "already complete" in capsys.readouterr().err


class _Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("none", [], "init_from = '.*none': no such file or folder"),
        ("empty", [], "no checkpoints/step-"),
        ("text", [], "is not a file of weights .torch.save did not write it"),
        ("code", [], "is not a file of weights .it asks for exec, but only tensors and plain values are accepted"),
        ("tensor", [], "is not a state dict"),
        ("whole", ["--model.hidden_dim", "32"], r"holds other networks .*must be \(32,.*give the model"),
        ("whole", ["--model.encoder", "resnet18"], "holds other networks .* and [0-9]+ more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(source, options, says, arguments, whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no weights")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    torch.save({"x": _Code()}, tmp_path / "code")
    path = whole if source == "whole" else tmp_path / source
    code, said = _ends([*arguments, *options, "--init_from", str(path), "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert re.search(says, said), said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def _with_another_newest(whole, out, **changes):
    """Copies the run and changes parts of its checkpoint after step 6; the value None removes a part."""
    shutil.copytree(whole, out)
    state = load_checkpoint(checkpoint_path(out, 6))
    state |= changes | {"config": state["config"] | changes.get("config", {})}
    checkpoint_path(out, 6).with_suffix(".sha256").unlink()
    save_checkpoint(out, step=6, state={name: value for name, value in state.items() if value is not None}, keep=9)
    return out


WRONG_PARTS = {
    "lacks optimizer": {"optimizer": None},
    "lacks scaler": {"scaler": None},
    "with another config.*seed was 9, is 0": {"config": {"seed": 9}},
    "it holds step 5, but its name says 6": {"step": 5},
    "its step is 6.0": {"step": 6.0},
    r"loader is .*'batch': -1": {"loader": {"epoch": 2, "batch": -1, "batches_per_epoch": 3}},
    r"loader is .*must be counts": {"loader": {"epoch": 2.0, "batch": 0, "batches_per_epoch": 3}},
    r"loader is .*no position after 6 steps": {"loader": {"epoch": 2**50, "batch": 0, "batches_per_epoch": 3}},
    "ranks is": {"ranks": [1]},
    "rng is 'x'": {"ranks": {"rng": ["x"], "bn_images": 8}},
    "versions is": {"versions": {"torch": 2}},
    "num_samples is -25": {"num_samples": -25},
    "scaler has 'scale'": {"scaler": {"scale": 1.0}},
    "its networks are not named tensors": {"byol": {"x": 1}},
    "byol lacks 'online.encoder.conv1.weight'": {"byol": {"probe.bias": torch.zeros(3)}},
}


@pytest.mark.parametrize(("says", "changes"), WRONG_PARTS.items(), ids=WRONG_PARTS)
def test_a_checkpoint_with_a_wrong_part_is_named_and_the_one_before_is_continued(says, changes, arguments, whole, tmp_path, capsys):
    out = _with_another_newest(whole, tmp_path / "run", **changes)
    main([*arguments, "--out", str(out)])
    said = capsys.readouterr().err
    assert re.search(rf"step-000000006.pt: .*{says}.*; trying the one before", said), said
    assert state_digest(out) == state_digest(whole)


def test_a_run_whose_every_checkpoint_is_of_another_run_is_refused(arguments, whole, tmp_path, capsys):
    out = _with_another_newest(whole, tmp_path / "run", config={"seed": 9})
    for step in range(1, 6):
        checkpoint_path(out, step).unlink()
    code, said = _ends([*arguments, "--out", str(out)], capsys)
    assert code == 2
    assert "all 1 checkpoints are damaged or of another run" in said
    assert "seed was 9, is 0" in said


@pytest.mark.parametrize("content", [None, "", "\0\0\0", "epochs: [3", "seed: &a [*a]"])
def test_a_lost_config_is_mended_from_the_newest_checkpoint(content, arguments, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").unlink() if content is None else (out / "config.yaml").write_text(content)
    main([*arguments, "--out", str(out)])
    assert "config.yaml could not be read; it is restored from the checkpoint after step 6" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == config
    code, said = _ends([*arguments, "--out", str(out), "--seed", "9"], capsys)
    assert code == 2
    assert "seed was 0, is 9" in said


def _without(source, target, names):
    shutil.copytree(source, target)
    for name in names:
        (target / name).unlink()
    return target


def test_a_run_goes_on_without_the_images_that_were_removed_and_says_so(whole, data_paths, tmp_path, capsys):
    out, data = tmp_path / "run", _without(data_paths["folder"], tmp_path / "images", ["ant/002.jpg", "bee/005.jpg"])
    shutil.copytree(whole, out)
    for later in (5, 6):
        checkpoint_path(out, later).unlink()
    main([*SMALL, "--data.train", str(data), "--out", str(out)])
    assert "data.train holds 23 images, 2 fewer than at the checkpoint" in capsys.readouterr().err
    assert load_checkpoint(checkpoint_path(out, 5))["class_counts"] == {"ant": 7, "bee": 8, "cat": 8}


def test_a_run_that_goes_on_with_other_images_of_the_same_number_says_so(whole, data_paths, tmp_path, capsys):
    out, data = tmp_path / "run", shutil.copytree(data_paths["folder"], tmp_path / "images")
    shutil.copytree(whole, out)
    for later in (5, 6):
        checkpoint_path(out, later).unlink()
    main([*SMALL, "--data.train", str(data), "--out", str(out)])
    assert "is not what it was at the checkpoint" not in capsys.readouterr().err, "the same images in another place"
    write_beton(data, out=tmp_path / "train.beton", workers=1)
    for later in (5, 6):
        checkpoint_path(out, later).unlink()
    main([*SMALL, "--data.train", str(tmp_path / "train.beton"), "--out", str(out)])
    assert "is not what it was at the checkpoint" not in capsys.readouterr().err, "the same images, read by another backend"
    for later in (5, 6):
        checkpoint_path(out, later).unlink()
    main([*SMALL, "--data.train", str(data), "--out", str(out)])
    shutil.copy(data / "ant" / "001.jpg", data / "ant" / "000.jpg")
    for later in (5, 6):
        checkpoint_path(out, later).unlink()
    main([*SMALL, "--data.train", str(data), "--out", str(out)])
    said = capsys.readouterr().err
    assert "data.train is not what it was at the checkpoint (images differ): the run continues with the images that are there now" in said


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10_000))
    code, said = _ends([*arguments, "--out", str(tmp_path / "run")], capsys)
    assert code == 4, "as for a last checkpoint that cannot be written: `reproduce` then tries no other row"
    assert re.search(
        r"error: --out .*run: a checkpoint takes more than .*B, and its disk has 10 kB free; make room, or choose another\n", said
    )
    assert not read_metrics(tmp_path / "run")


def test_other_data_are_not_taken_for_removed_images(whole, data_paths, tmp_path, capsys):
    data = _without(data_paths["folder"], tmp_path / "moved", ["ant/002.jpg", "ant/003.jpg"])
    shutil.copy(data / "bee" / "000.jpg", data / "bee" / "900.jpg")
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    code, said = _ends([*SMALL, "--data.train", str(data), "--out", str(out)], capsys)
    assert code == 2
    assert "data.train holds 24 images, the run in" in said
    assert "more of class 'bee' than then" in said


def test_the_remaining_time_is_logged_once_after_the_first_steps(tmp_path, capsys):
    with RunLog(tmp_path, TrainConfig(), total_steps=1000, first_step=7) as run_log:
        for done in range(8, 200):
            run_log.estimate(done)
    said = capsys.readouterr().err
    assert said.count("s a step: the remaining") == 1
    assert f"the remaining {1000 - 7 - ESTIMATE_STEPS} steps take about" in said
    assert UNCOUNTED_STEPS < ESTIMATE_STEPS


def test_durations_are_readable():
    spoken = {0.2: "0 s", 40: "40 s", 61: "1 min 1 s", 3600: "1 h", 3725: "1 h 2 min", 86400 * 3 + 7200 + 59: "3 d 2 h"}
    assert {s: duration_text(s) for s in spoken} == spoken


def test_metrics_after_a_line_that_was_cut_are_still_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n{"st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 2]


@pytest.mark.parametrize(
    "line", [b'\xff\xfe\x00{"step": 1}', b"[1, 2]", b"3", b'{"loss": 1.0}', b'{"step": "1"}', b'{"step": 1, "loss": "x"}', b"[" * 100_000]
)
def test_a_damaged_line_of_the_metrics_stops_neither_reading_nor_a_resume_and_is_said(line, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "time_s": 2.0}\n' + line + b'\n{"step": 2, "time_s": 3.0}\n')
    with RunLog(tmp_path, TrainConfig(), total_steps=9, first_step=3):
        pass
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 2]


def test_the_first_step_that_is_not_finite_is_counted_over_its_micro_batches():
    check = FiniteCheck(forwards_per_step=3)
    assert check.first_bad_step() is None
    for forward in range(12):
        check.add(torch.tensor(torch.nan if forward in (7, 9) else 1.0))
        assert check.first_bad_step() == (2 if forward >= 7 else None)


def test_a_tensor_that_is_not_finite_is_named_wherever_it_is():
    state = {"a": [torch.zeros(2), {"b": torch.tensor([0.0, -torch.inf])}], "c": torch.empty(0), "d": torch.tensor([3]), "e": "text"}
    assert first_not_finite(state) == "a.1.b"
    state["a"][1]["b"] = torch.ones(2, dtype=torch.bfloat16)
    assert first_not_finite(state) is None
    state["f"] = torch.tensor([torch.nan, 1.0], dtype=torch.bfloat16)
    assert first_not_finite(state) == "f"


def test_one_process_needs_no_vote():
    vote = StopVote(rank=0, world_size=1)
    assert vote.cast(stop=False, bad_step=None, settle=False) == Verdict(stop=False, bad_step=None, bad_rank=None)
    assert vote.cast(stop=True, bad_step=12, settle=False) == Verdict(stop=True, bad_step=12, bad_rank=0)


def test_the_plan_of_a_run_depends_only_on_the_step():
    """1000 epochs of ImageNet at 4096: 312.7 steps an epoch, 312784 in all (the official README's count)."""
    config = replace(preset_config("r50_1000ep"), keep_every_epochs=100.0, checkpoint_every=5000)
    plan = RunPlan.of(config, num_samples=1_281_167)
    assert plan.total_steps == 312_784
    assert [done for done in range(1, 100_000) if plan.stays(done)] == [31_279, 62_557, 93_836]
    assert plan.saves(5000)
    assert plan.saves(31_279)
    assert plan.saves(312_784)
    assert not plan.saves(31_278)
    assert plan.logs(312_784)
    assert not plan.logs(312_783)
    assert plan.epoch(31_279) == pytest.approx(100.0, abs=1e-2)


def test_a_start_that_was_cut_off_before_its_config_was_written_leaves_the_folder_usable(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("lock", "provenance.json", "config.yaml.tmp"):
        (out / name).write_text("")
    main([*arguments, "--epochs", "0.4", "--out", str(out)])
    assert checkpoint_steps(out) == [1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    code, said = _ends([*arguments, "--out", str(tmp_path / "other")], capsys)
    assert code == 2
    assert "exists and is not a run of fastbyol" in said
