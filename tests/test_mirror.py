"""Copies of checkpoints in a store: complete or not taken, never in the way of the training, and enough to continue from."""

from __future__ import annotations

import functools
import json
import logging
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch

import fastbyol.run.mirror as mirror_module
import fastbyol.train as train
from fastbyol.byol import build_byol
from fastbyol.config.errors import STORAGE_EXIT, Lost, NotSaved, UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.stores import retried
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, save_checkpoint
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.mirror import Mirror, MirrorWriter
from tests.commands import SMALL_RUN, state_digest


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture):
    """Lets caplog see the product's lines of information too."""
    caplog.set_level(logging.INFO, logger="fastbyol")
    return caplog


def config_of(tmp_path: Path, **options: object) -> TrainConfig:
    return TrainConfig(out=str(tmp_path / "run"), mirror=f"file://{tmp_path}/mirror", **options)  # type: ignore[arg-type]


def save(tmp_path: Path, step: int, *, keep: int = 2) -> Path:
    """Writes a checkpoint of a run, as the run itself does, and returns the run folder."""
    run = tmp_path / "run"
    state = {"step": step, "config": to_plain(config_of(tmp_path)), "byol": {"weights": torch.full((1000,), float(step))}}
    save_checkpoint(run, step=step, state=state, keep=keep)
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {done}}}\n' for done in range(step)))
    return run


def copied(tmp_path: Path, steps: list[int], *, keep: int = 2) -> Mirror:
    """Returns a mirror to which checkpoints after these steps were copied in turn."""
    mirror = Mirror(config_of(tmp_path))
    mirror.check_writable()
    for step in steps:
        run = save(tmp_path, step)
        with MirrorWriter(mirror, run, keep=keep, stays=lambda step: step == 1):
            pass
    return mirror


def test_the_newest_copies_and_those_that_stay_are_kept_each_with_its_log(tmp_path: Path) -> None:
    assert copied(tmp_path, [1, 2, 3, 4]).steps == [1, 3, 4]
    mirror = tmp_path / "mirror"
    # Nothing else: the file that was written to find out whether the store can be is gone.
    assert sorted(path.name for path in mirror.iterdir()) == sorted(f"step-{step:09d}{end}" for step in (1, 3, 4) for end in ("", ".json"))
    assert checkpoint_path(tmp_path / "run", 4).read_bytes() == (mirror / "step-000000004/step-000000004.pt").read_bytes()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert Mirror(config_of(tmp_path)).bring_newest(tmp_path / "run") == 4
    assert checkpoint_steps(tmp_path / "run") == [4]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4
    assert Mirror(config_of(tmp_path)).bring_newest(tmp_path / "run") == 0  # nothing newer than what is here


@pytest.mark.parametrize("damage", ["no marker", "cut", "changed", "missing", "marker is no JSON", "marker of another shape"])
def test_a_copy_that_is_not_whole_is_never_taken(damage: str, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    copied(tmp_path, [2, 3])
    marker = tmp_path / "mirror/step-000000003.json"
    file = tmp_path / "mirror/step-000000003/step-000000003.pt"
    data = file.read_bytes()
    if damage == "no marker":
        marker.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-10])
    elif damage == "changed":
        file.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "missing":
        file.unlink()
    elif damage == "marker is no JSON":
        marker.write_bytes(marker.read_bytes()[:-1])
    else:
        marker.write_text(json.dumps({"step": 3, "files": {"../../x": ["many", 3]}, "config": {}}))
    fresh = tmp_path / "fresh"
    assert Mirror(config_of(tmp_path)).bring_newest(fresh) == 2
    assert checkpoint_steps(fresh) == [2]
    assert (damage == "no marker") or "not used" in heard.text or "does not count" in heard.text
    shutil.rmtree(tmp_path / "mirror/step-000000002")
    if damage in ("cut", "changed", "missing"):
        with pytest.raises(UserError, match="all 2 copies are damaged"):
            Mirror(config_of(tmp_path)).bring_newest(tmp_path / "another")


def test_copies_that_came_and_went_since_the_start_was_checked_are_known_and_each_marker_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(tmp_path, [1, 2])
    mirror = Mirror(config_of(tmp_path))
    assert mirror.steps == [1, 2]
    copied(tmp_path, [3, 4])  # by another machine; 2 leaves
    read: list[str] = []
    cat = mirror._store.cat_file
    monkeypatch.setattr(mirror._store, "cat_file", lambda path, **part: (read.append(path.rpartition("/")[2]), cat(path, **part))[1])
    shutil.rmtree(tmp_path / "run")
    assert mirror.bring_newest(tmp_path / "run") == 4
    assert mirror.steps == [1, 3, 4]
    assert [name for name in read if name.endswith(".json")] == ["step-000000003.json", "step-000000004.json"]


def test_a_disk_that_takes_no_more_is_not_blamed_on_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, fresh = copied(tmp_path, [2]), tmp_path / "fresh"
    monkeypatch.setattr(mirror_module, "retried", functools.partial(retried, waits_s=()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NotSaved, match=r"fresh: the checkpoint from file://.* cannot be written \(File too large\); make room"):
            mirror.bring_newest(fresh)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in fresh.rglob("*.pt*") if path.is_file()]
    assert mirror.bring_newest(fresh) == 2


def test_a_checkpoint_of_several_parts_is_brought_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, fresh = copied(tmp_path, [2]), tmp_path / "fresh"
    monkeypatch.setattr(mirror_module, "PART_BYTES", 1000)
    assert mirror.bring_newest(fresh) == 2
    assert checkpoint_path(fresh, 2).read_bytes() == checkpoint_path(tmp_path / "run", 2).read_bytes()


def test_the_copies_of_another_run_are_refused(tmp_path: Path) -> None:
    copied(tmp_path, [2])
    with pytest.raises(UserError, match=r"mirror = file://.*: holds a run with another config \(seed was 0, is 1\)"):
        Mirror(config_of(tmp_path, seed=1))
    Mirror(config_of(tmp_path, timeout_s=60.0))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://{}/file/x", r"mirror = file://.*(cannot be written|no such file)"),
        ("https://127.0.0.1:1/x?key=hidden", r"mirror = https://127\.0\.0\.1:1/x: must be a URL that can be written"),
        ("nowhere://x", "fsspec knows no scheme 'nowhere'"),
    ],
)
def test_a_store_that_cannot_be_written_is_refused_before_any_work(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "retried", functools.partial(retried, waits_s=()))
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, Lost), match=message) as refused:
        Mirror(TrainConfig(out="x", mirror=url.format(tmp_path))).check_writable()
    assert "hidden" not in str(refused.value)


def test_a_failing_copy_stops_nothing_and_the_next_checkpoint_brings_it(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    mirror = copied(tmp_path, [2])
    away = (tmp_path / "mirror").rename(tmp_path / "away")
    (tmp_path / "mirror").write_text("a file where the folder was")
    run = save(tmp_path, 4)
    wanted = r"the last checkpoint is in .*run, but could not be copied .*the same command copies it"
    with pytest.raises(NotSaved, match=wanted), MirrorWriter(mirror, run, keep=2, stays=lambda step: False):
        pass
    assert "the checkpoint after step 4 is not copied" in heard.text
    with MirrorWriter(mirror, run, keep=2, stays=lambda step: False) as writer:
        while heard.text.count("the checkpoint after step 4 is not copied") < 2:
            time.sleep(0.01)
        (tmp_path / "mirror").unlink()
        away.rename(tmp_path / "mirror")
        writer.add(checkpoint_steps(save(tmp_path, 6))[-1])
    assert mirror.steps == Mirror(config_of(tmp_path)).steps == [2, 6]


def test_a_run_whose_folder_is_lost_continues_from_its_mirror_to_the_same_weights(
    data_paths: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> str:
        arguments = [
            *SMALL_RUN,
            "--epochs",
            "2",
            "--checkpoint_every",
            "2",
            "--data.train",
            str(data_paths["ffcv"]),
            "--out",
            str(tmp_path / "r"),
        ]
        train.main([*arguments, *options])
        return capfd.readouterr().err

    # The weights that it started from, which it does not need again.
    networks = build_byol(parse_train_config([*SMALL_RUN, "--out", "x"], usage="").model, num_classes=3)
    start = tmp_path / "start.pt"
    torch.save(networks.online.encoder.state_dict(), start)
    mirror = ("--mirror", f"file://{tmp_path}/mirror", "--init_from", str(start))
    run(*mirror)
    start.unlink()
    undisturbed = state_digest(tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "mirror").glob("*.json")) == [f"step-{step:09d}.json" for step in (2, 4, 6)]
    # The machine was taken away before the copy of the last checkpoint was complete.
    (tmp_path / "mirror/step-000000006.json").unlink()
    shutil.rmtree(tmp_path / "r")
    said = run(*mirror, "--resume", "must")
    assert "the checkpoint after step 4 is copied from there" in said
    assert "continues after step 4" in said
    assert checkpoint_steps(tmp_path / "r") == [4, 6]
    assert state_digest(tmp_path / "r") == undisturbed
    assert [json.loads(line)["step"] for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()] == list(range(6))
    # A complete run copies what its mirror lacks, and says so with an exit code if it cannot.
    shutil.rmtree(tmp_path / "mirror")
    run(*mirror)
    assert (tmp_path / "mirror/step-000000006.json").exists()
    with pytest.raises(SystemExit) as refused:
        run(*mirror, "--resume", "never")
    assert refused.value.code not in (0, STORAGE_EXIT)
