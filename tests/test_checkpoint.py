"""Checkpoints are complete or refused, never run code, and are written while training goes on."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from fastbyol.config.errors import Diverged, NotSaved, UserError
from fastbyol.config.schema import TrainConfig
from fastbyol.run.checkpoint import (
    CheckpointError,
    check_resume,
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_newest,
    load_run,
    save_checkpoint,
    sweep_unfinished,
)
from fastbyol.run.checkpoint_writer import CheckpointWriter, copy_to_host
from fastbyol.run.rng_state import rng_state, seed_rank, set_rng_state
from tests.commands import files_no_larger_than


def _state(step: int, *, size: int = 1000) -> dict:
    return {"step": step, "config": {}, "byol": {"weights": torch.full((size,), float(step))}}


def _save(run, step, **options):
    return save_checkpoint(run, step=step, state=_state(step), **{"keep": 3, **options})


@pytest.fixture(autouse=True)
def heard(caplog):
    """Lets caplog see the product's lines of information too."""
    caplog.set_level(logging.INFO, logger="fastbyol")
    return caplog


def test_a_saved_state_is_loaded_unchanged_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step)
    assert checkpoint_steps(tmp_path) == [3, 4, 5]
    assert load_newest(tmp_path)["byol"]["weights"].unique().item() == 5
    files = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert files == sorted(f"step-{s:09d}.{end}" for s in (3, 4, 5) for end in ("pt", "sha256"))


def test_checkpoints_marked_to_stay_are_kept_besides_the_newest(tmp_path):
    for step in range(1, 9):
        _save(tmp_path, step, keep=2, stays=lambda step: step % 3 == 0)
    assert checkpoint_steps(tmp_path) == [3, 6, 7, 8]


def _cut(share):
    def damage(path):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def _flip(share):
    def damage(path):
        payload = bytearray(path.read_bytes())
        payload[int(len(payload) * share)] ^= 1
        path.write_bytes(payload)

    return damage


def _last_byte_lost(path):
    path.write_bytes(path.read_bytes()[:-1])


def _zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def _hole(path):
    payload = bytearray(path.read_bytes())
    payload[2000:3000] = bytes(1000)
    path.write_bytes(payload)


def _digest_of_another(path):
    path.with_suffix(".sha256").write_text(checkpoint_path(path.parent.parent, 1).with_suffix(".sha256").read_text())


def _folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def _foreign(path):
    """Weights of another program, copied here with a digest of their own."""
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


DAMAGES = {
    **{f"cut to {share:.0%}": _cut(share) for share in (0, 0.01, 0.5, 0.99)},
    **{f"a bit flipped at {share:.0%}": _flip(share) for share in (0, 0.1, 0.37, 0.5, 0.73, 0.999)},
    **{f.__name__[1:].replace("_", " "): f for f in (_last_byte_lost, _zeros, _hole, _digest_of_another)},
    **{f.__name__[1:].replace("_", " "): f for f in (_folder_in_its_place, _foreign)},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_is_used(tmp_path, damage, heard):
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2))
    with pytest.raises(CheckpointError):
        load_checkpoint(checkpoint_path(tmp_path, 2))
    assert load_newest(tmp_path)["step"] == 1
    assert "step-000000002.pt" in heard.text
    assert "trying the one before" in heard.text


def test_when_all_checkpoints_are_damaged_the_run_is_refused_and_not_restarted(tmp_path):
    _last_byte_lost(_save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        load_newest(tmp_path)
    assert checkpoint_steps(tmp_path) == [1], "and nothing is deleted"


class _Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def _in_zip(bomb):
    buffer = io.BytesIO()
    torch.save(_state(1) | {"x": bomb}, buffer)
    return buffer.getvalue()


def _bare_pickle(bomb):
    return pickle.dumps(bomb, protocol=2)


def _hidden_in_a_good_file(bomb):
    """Replaces the pickle of a real checkpoint and keeps its tensors."""
    good = io.BytesIO()
    torch.save(_state(1), good)
    buffer = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(bomb, protocol=2) if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


@pytest.mark.parametrize("make", [_in_zip, _bare_pickle, _hidden_in_a_good_file])
def test_a_checkpoint_with_code_inside_is_refused_and_the_code_never_runs(tmp_path, make):
    marker = tmp_path / "ran"
    path = checkpoint_path(tmp_path, 1)
    path.parent.mkdir()
    path.write_bytes(make(_Bomb(str(marker))))
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    for load in (load_checkpoint, load_run):
        with pytest.raises(CheckpointError, match="not a checkpoint of fastbyol"):
            load(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Bomb(str(marker)))).close()
    assert marker.exists(), "the bomb works, so the test above means something"


def test_a_checkpoint_that_cannot_be_written_says_why_and_leaves_the_earlier_ones(tmp_path):
    _save(tmp_path, 1)
    # Root may write anywhere: a folder in the file's place fails for everyone.
    checkpoint_path(tmp_path, 2).mkdir()
    (checkpoint_path(tmp_path, 2) / "x").touch()
    with pytest.raises(
        CheckpointError, match="step-000000002.pt.*make room or choose another --out. The checkpoints after steps 1 are untouched"
    ):
        _save(tmp_path, 2)
    assert load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))


def test_a_full_disk_is_reported_with_the_space_needed_and_leaves_no_partial_file(tmp_path):
    _save(tmp_path, 1)
    with files_no_larger_than(100_000), pytest.raises(CheckpointError, match=r"step-000000002.pt \(4 MB, \d+ MB free\): File too large"):
        save_checkpoint(tmp_path, step=2, state=_state(2, size=10**6), keep=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000001.pt", "step-000000001.sha256"]
    assert load_newest(tmp_path)["step"] == 1


def test_a_folder_that_cannot_be_created_is_reported_and_training_goes_on(tmp_path, heard):
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    writer = CheckpointWriter(tmp_path, keep=9)
    writer.save(_state(1), step=1)
    writer.wait()
    assert "checkpoints/step-000000001.pt" in heard.text
    (tmp_path / "checkpoints").unlink()
    writer.save(_state(2), step=2)
    writer.close()
    assert checkpoint_steps(tmp_path) == [2]


def test_only_the_unfinished_files_of_a_killed_writer_are_removed(tmp_path, heard):
    _save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "step-000000002.pt.tmp-123").write_text("half")
    (folder / "step-000000002.sha256").write_text("renamed first")
    (folder / "notes.txt").write_text("the user's")
    sweep_unfinished(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", "step-000000001.pt", "step-000000001.sha256"]
    assert "ignoring unfinished file" in heard.text


def test_paths_without_a_run_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoints"):
        load_run(tmp_path)


def test_resume_must_and_never_are_checked_against_the_folder(tmp_path, monkeypatch):
    must, never = (TrainConfig(out=str(tmp_path), resume=mode) for mode in ("must", "never"))
    check_resume(never)
    with pytest.raises(UserError, match="resume = 'must': .* holds no checkpoint"):
        check_resume(must)
    _save(tmp_path, 7)
    check_resume(must)
    with pytest.raises(UserError, match="resume = 'never': .* holds a run of 7 steps"):
        check_resume(never)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_resume(never)


def test_the_writer_saves_the_tensors_as_they_were_when_it_was_called(tmp_path):
    state = _state(1, size=10**6)
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step in (1, 2, 3):
            writer.save(state | {"step": step}, step=step)
            state["byol"]["weights"] += 1  # at once, while the thread writes
    assert [load_checkpoint(checkpoint_path(tmp_path, s))["byol"]["weights"].unique().tolist() for s in (1, 2, 3)] == [[1], [2], [3]]


def test_a_copy_keeps_layouts_and_types_and_reuses_the_memory_of_an_earlier_copy():
    layouts = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    state = {"a": layouts, "b": [torch.tensor(3, dtype=torch.int64), {"c": torch.ones(2, dtype=torch.bfloat16)}], "d": "text", 4: None}
    copy = copy_to_host(state)
    assert copy["a"].stride() == layouts.stride()
    assert torch.equal(copy["a"], layouts)
    assert copy["a"].data_ptr() != layouts.data_ptr()
    assert copy["b"][1]["c"].dtype == torch.bfloat16
    assert (copy["d"], copy[4]) == ("text", None)
    layouts += 1
    again = copy_to_host(state, into=copy)
    assert again["a"].data_ptr() == copy["a"].data_ptr()
    assert torch.equal(again["a"], layouts)
    grown = copy_to_host({**state, "a": torch.zeros(5)}, into=copy)
    assert torch.equal(grown["a"], torch.zeros(5))


def test_a_writer_that_fails_warns_and_goes_on_and_the_next_one_is_written(tmp_path, heard):
    with CheckpointWriter(tmp_path, keep=9) as writer:
        writer.save(_state(1), step=1)
        writer.wait()
        with files_no_larger_than(1000):
            writer.save(_state(2), step=2)
            writer.wait()
        writer.save(_state(3), step=3)
    assert "step-000000002.pt" in heard.text
    assert checkpoint_steps(tmp_path) == [1, 3]


def test_a_last_checkpoint_that_fails_is_an_error_at_the_end(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=9)
    with files_no_larger_than(1000):
        writer.save(_state(2), step=2)
        writer.wait()
    with pytest.raises(NotSaved, match=r"step-000000002.pt.*File too large; raise the limit.* After that the same command starts anew$"):
        writer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    writer = CheckpointWriter(tmp_path, keep=9)
    writer.save(_state(1), step=1)
    state = _state(2)
    state["byol"]["weights"][17] = value
    writer.save(state, step=2)
    with pytest.raises(Diverged, match=r"byol.weights is not finite after step 2.*\[1\] are good"):
        writer.close()
    assert checkpoint_steps(tmp_path) == [1]


def test_ranks_draw_numbers_of_their_own_and_the_same_in_every_start_and_rank_0_those_of_one_process():
    draws = []
    for seed, rank in ((5, 0), (5, 1), (5, 2), (6, 1), (5, 1)):
        torch.manual_seed(seed)
        seed_rank(seed, rank=rank)
        draws.append(torch.randn(2).tolist())
    assert draws[0] == torch.randn(2, generator=torch.Generator().manual_seed(5)).tolist()
    assert draws[1] == draws[4]
    assert len({number for draw in draws for number in draw}) == 8


def test_random_generators_continue_where_they_were_and_their_state_passes_the_safe_loader(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(3), torch.randn(5)

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(2).tolist(), torch.randn(2).tolist()

    save_checkpoint(tmp_path, step=1, state=_state(1) | {"rng": rng_state()}, keep=2)
    want = draw()
    assert draw() != want
    set_rng_state(load_newest(tmp_path)["rng"])
    assert draw() == want
