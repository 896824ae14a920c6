"""Checkpoints are whole or refused, and never run code."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastbyol.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_newest,
    load_run,
    save_checkpoint,
)
from fastbyol.config.errors import UserError


def _save(run, step):
    return save_checkpoint(run, step=step, state={"step": step, "weights": torch.full((1000,), float(step))}, keep=3)


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
    assert checkpoint_steps(tmp_path) == [3, 4, 5]
    assert load_newest(tmp_path)["weights"].unique().item() == 5
    files = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert files == sorted(f"step-{s:09d}.{end}" for s in (3, 4, 5) for end in ("pt", "sha256"))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip_one_bit(path):
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)


def _empty(path):
    path.write_bytes(b"")


def _lose_digest(path):
    path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip_one_bit, _empty, _lose_digest])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2))
    with pytest.raises(CheckpointError):
        load_checkpoint(checkpoint_path(tmp_path, 2))
    assert load_newest(tmp_path)["step"] == 1


def test_when_all_are_damaged_the_run_is_refused_rather_than_begun_anew(tmp_path):
    _truncate(_save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        load_newest(tmp_path)


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_checkpoint_with_code_inside_is_refused_and_the_code_never_runs(tmp_path):
    import hashlib

    marker = tmp_path / "ran"
    path = checkpoint_path(tmp_path, 1)
    path.parent.mkdir()
    torch.save({"step": 1, "x": _Bomb(str(marker))}, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match="not a checkpoint of fastbyol"):
        load_checkpoint(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Bomb(str(marker)))).close()
    assert marker.exists(), "the bomb works, so the test above means something"


def test_a_checkpoint_that_cannot_be_written_says_why_and_leaves_the_earlier_ones(tmp_path):
    _save(tmp_path, 1)
    # Root may write anywhere: a folder in the file's place fails for everyone.
    checkpoint_path(tmp_path, 2).mkdir()
    (checkpoint_path(tmp_path, 2) / "x").touch()
    with pytest.raises(CheckpointError, match="step-000000002.pt.*Earlier checkpoints are untouched"):
        _save(tmp_path, 2)
    assert load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))


def test_paths_without_a_run_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoints"):
        load_run(tmp_path)
