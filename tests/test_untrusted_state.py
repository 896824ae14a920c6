"""Data from files are compared with what this program would have written before a kernel, a generator or the disk sees them."""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import OptimConfig, TrainConfig
from fastbyol.host.durable_files import durable_file, locked_file, write_durably
from fastbyol.host.saved_structure import first_difference
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import TargetUpdate, ema_update
from fastbyol.optim.lars import LARS
from fastbyol.optim.multi_tensor import Update, apply_update
from fastbyol.optim.saved_state import load_optimizer_state, state_difference
from fastbyol.run.checkpoint import CheckpointError, checkpoint_path, load_checkpoint, load_newest, load_run, load_weights, save_checkpoint
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.initial_weights import encoder_weights, load_matching
from fastbyol.run.plain_yaml import read_yaml
from fastbyol.run.rng_state import rng_difference, rng_state
from fastbyol.run.weights_files import read_weights

OPTIMIZERS = ("lars", "sgd", "adamw", "torch_optimizer_lars", "timm_lamb", "timm_adafactor", "timm_lion")


class Networks(nn.Module):
    """Two submodules by the names that get learning rates of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.ModuleDict({"projector": nn.Linear(40, 30), "predictor": nn.Linear(30, 40)})


def _stepped(name, *, steps=7):
    torch.manual_seed(0)
    module = Networks()
    optimizer = build_optimizer(OptimConfig(name=name), module)
    for _ in range(steps):
        for param in module.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return module, optimizer


def _tensors(saved):
    return [
        (i, name) for i, kept in saved["state"].items() for name, value in kept.items() if isinstance(value, torch.Tensor) and value.ndim
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_and_switches_of_a_run_come_from_its_config_and_not_from_the_checkpoint(name):
    own, other = _stepped(name)[1], _stepped(name)[1]
    saved = copy.deepcopy(own.state_dict())
    odd = {"momentum": 5.0, "weight_decay": 1e30, "lr": 1e300, "adapt": False, "amsgrad": True, "maximize": True, "betas": (2.0, -1.0)}
    for group in saved["param_groups"]:
        group.update({option: value for option, value in odd.items() if option in group})
    load_optimizer_state(other, saved)
    assert first_difference(other.state_dict(), own.state_dict(), "state") is None
    assert [{k: v for k, v in group.items() if k != "params"} for group in other.param_groups] == [
        {k: v for k, v in group.items() if k != "params"} for group in own.param_groups
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_buffers_that_share_their_own_elements_are_refused(name):
    def expanded(buffer):
        return torch.zeros(1).expand(buffer.shape)

    def overlapping(buffer):
        return torch.zeros(buffer.numel()).as_strided(buffer.shape, (1,) * buffer.ndim)

    _, optimizer = _stepped(name)
    saved = optimizer.state_dict()
    (index, buffer), *_ = [place for place in _tensors(saved) if saved["state"][place[0]][place[1]].ndim == 2] or _tensors(saved)
    for change in (expanded, overlapping, torch._neg_view):
        bad = copy.deepcopy(saved)
        bad["state"][index][buffer] = change(bad["state"][index][buffer])
        if bad["state"][index][buffer].stride() == (1,) and change is overlapping:  # of one dimension: nothing overlaps
            continue
        assert state_difference(optimizer, bad) == f"optimizer.state.{index}.{buffer} does not hold each of its elements once", change


def test_elements_that_repeat_within_a_span_of_the_right_length_are_refused_and_any_order_is_not():
    own, repeating = torch.zeros(2, 3), torch.zeros(6).as_strided((2, 3), (5, 0))
    assert first_difference({"x": repeating}, {"x": own}, "saved") == "saved.x does not hold each of its elements once"
    assert first_difference({"x": own.t().contiguous().t()}, {"x": own}, "saved") is None


def test_a_number_of_steps_that_is_none_is_refused():
    _, optimizer = _stepped("adamw")
    for steps in (-5.0, float("nan"), float("inf")):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"].fill_(steps)
        assert "optimizer.state.0.step is" in (state_difference(optimizer, saved) or "")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_own_state_passes_and_looking_changes_nothing(name):
    _, optimizer = _stepped(name)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh_module, fresh = _stepped(name, steps=0)
    weights, generator = copy.deepcopy(fresh_module.state_dict()), torch.get_rng_state()
    assert state_difference(fresh, saved) is None
    assert not fresh.state_dict()["state"]
    assert all(torch.equal(value, weights[key]) for key, value in fresh_module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def _shorter(saved, i, name):
    saved["state"][i][name] = torch.zeros(9, 9, 9, 9)[:1]


def _integers(saved, i, name):
    saved["state"][i][name] = saved["state"][i][name].long()


def _half(saved, i, name):
    saved["state"][i][name] = saved["state"][i][name].half()


def _a_number(saved, i, name):
    saved["state"][i][name] = 3


def _meta(saved, i, name):
    saved["state"][i][name] = saved["state"][i][name].to("meta")


def _lost(saved, i, name):
    del saved["state"][i][name]


def _of_no_parameter(saved, i, name):
    saved["state"][99] = saved["state"][i]


def _a_list(saved, i, name):
    saved["state"] = [saved["state"]]


def _all_lost(saved, i, name):
    saved["state"] = {}


def _groups_lost(saved, i, name):
    saved["param_groups"] = saved["param_groups"][:1]


def _no_groups(saved, i, name):
    del saved["param_groups"]


def _text_for_a_number(saved, i, name):
    saved["param_groups"][0]["weight_decay"] = "0"


def _parameters_swapped(saved, i, name):
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][::-1]


def _not_a_number(saved, i, name):
    saved["param_groups"][0]["lr"] = float("nan")


HURTS = (
    *(_shorter, _integers, _half, _a_number, _meta, _lost, _of_no_parameter, _a_list, _all_lost, _groups_lost, _no_groups),
    *(_text_for_a_number, _parameters_swapped, _not_a_number),
)


@pytest.mark.parametrize("hurt", HURTS, ids=[hurt.__name__[1:] for hurt in HURTS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_the_optimizer_could_not_have_is_described_and_not_loaded(name, hurt):
    saved = copy.deepcopy(_stepped(name)[1].state_dict())
    hurt(saved, *_tensors(saved)[0])
    assert state_difference(_stepped(name, steps=0)[1], saved)


@pytest.mark.parametrize("buffer", [torch.zeros(1), torch.zeros(30, 40), torch.zeros(40, 30).to_sparse(), None, torch.zeros(40, 30).long()])
def test_lars_takes_over_buffers_of_its_parameters_shapes_only(buffer):
    param = nn.Parameter(torch.randn(40, 30))
    optimizer = LARS([param], lr=0.1)
    state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": buffer}}}
    with pytest.raises(ValueError, match="momentum buffer of parameter 0"):
        optimizer.load_state_dict(state)


def test_no_kernel_is_given_lists_that_do_not_pair():
    def update(**other):
        tensors = {name: [torch.ones(64, 64)] for name in ("params", "grads", "momenta")} | other
        return Update(**tensors, lr=0.1, momentum=0.9, adapt=True, weight_decay=0.0, trust_coefficient=1e-3)

    guard = torch.full((64 * 64 + 1000,), 7.0)
    for name in ("grads", "momenta"):
        for wrong in (guard[:1], torch.ones(64, 63), torch.ones(64, 64).double()):
            with pytest.raises(ValueError, match="must be alike"):
                apply_update(update(**{name: [wrong]}), None)
    with pytest.raises(ValueError, match="laid out alike"):
        apply_update(update(momenta=[torch.ones(64, 64).t().contiguous().t()]), None)
    fitting = update()
    for backend in ("auto", "foreach", "apex", "triton"):
        with pytest.raises(ValueError, match="the update got a target"):
            TargetUpdate([guard[:1]], fitting.params, 0.9, backend)
        with pytest.raises(ValueError, match="the update got a target"):
            ema_update([torch.zeros(64)], [guard[:1]], 0.9, backend=backend)
    assert (guard == 7).all()
    apply_update(fitting, TargetUpdate([torch.ones(64, 64)], fitting.params, 0.9))
    assert (fitting.params[0] != 1).all(), "lists that pair are updated"


def _rng(part, value):
    state = rng_state()
    if isinstance(part, tuple):
        state[part[0]][part[1]] = value
    else:
        state[part] = value
    return state


def test_generator_states_that_would_read_past_their_words_are_described():
    wrong = [
        _rng(("numpy", 2), 10**6),  # numpy takes it, and reads from there
        _rng(("numpy", 2), -1),
        _rng(("numpy", 1), torch.zeros(3, dtype=torch.int64)),
        _rng(("numpy", 0), "PCG64"),
        _rng(("python", 1), torch.full((625,), 10**6)),
        _rng(("python", 1), -torch.ones(625, dtype=torch.int64)),
        _rng(("python", 0), 99),
        _rng("torch", torch.zeros(8, dtype=torch.uint8)),
        _rng("torch", torch.full_like(torch.get_rng_state(), 255)),
        *("x", {}, None),
    ]
    words = np.random.get_state()[1].copy()
    assert all(rng_difference(state) for state in wrong)
    assert rng_difference(rng_state()) is None
    assert (np.random.get_state()[1] == words).all()


def test_structures_are_alike_in_keys_lengths_shapes_types_and_finite_numbers():
    own = {"a": [1, 2.5, None, True], "b": torch.zeros(2)}
    assert first_difference({"a": [7, 3, "x", False], "b": torch.ones(2)}, own, "s") is None
    wrong = ({}, {"a": [1, 2.5, None], "b": own["b"]}, {**own, "c": 1}, {**own, "b": torch.zeros(3)}, {**own, "b": [0, 0]})
    wrong = (
        *wrong,
        {**own, "a": [1.5, 2.5, None, True]},
        {**own, "a": [1, float("inf"), None, True]},
        {**own, "a": [1, 2.5, None, 1]},
        [own],
    )
    for saved in wrong:
        assert first_difference(saved, own, "s").startswith("s"), saved


# Files that unpack to more than they are.


def _repacked(state, *, compression, repeat=1):
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        for i in range(repeat - 1):
            target.writestr(f"archive/more/{i}", bytes(1 << 20))
    return packed


def test_a_file_of_weights_that_unpacks_to_far_more_than_its_size_is_refused_before_it_does():
    bomb = _repacked({"x": torch.zeros(1000)}, compression=zipfile.ZIP_DEFLATED, repeat=100)
    assert len(bomb.getvalue()) < 1 << 20
    with pytest.raises(ValueError, match=r"would unpack to 0\.1 GB"):
        load_weights(bomb)
    assert load_weights(_repacked({"x": torch.zeros(1000)}, compression=zipfile.ZIP_DEFLATED))["x"].numel() == 1000
    legacy = io.BytesIO()
    torch.save({"x": torch.ones(5)}, legacy, _use_new_zipfile_serialization=False)
    assert load_weights(legacy)["x"].sum() == 5


def _npy(shape, *, numbers=0):
    """Returns a .npy file of float64 that claims this shape and holds this many zeros."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(8 * numbers)


def _npz(path, member, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w.npy", member)
    return path


def _changed_in_both_headers(path, *, local, central, value):
    """Writes two bytes into the member's local header and its entry of the archive's table."""
    payload = bytearray(path.read_bytes())
    for start, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        place = payload.index(start) + offset
        payload[place : place + 2] = value.to_bytes(2, "little")
    path.write_bytes(payload)


def test_an_npz_that_unpacks_to_far_more_than_its_size_is_refused_before_it_does(tmp_path):
    bomb = _npz(tmp_path / "bomb.npz", _npy((12_500_000,), numbers=12_500_000), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"bomb.npz: is not an .npz of arrays .*would unpack to 0\.1 GB, but only 0\.1 GB are allowed"):
        read_weights(bomb, option="init_from")
    np.savez_compressed(tmp_path / "small.npz", w=np.zeros(1000))
    assert read_weights(tmp_path / "small.npz", option="init_from")["w"].numel() == 1000


def test_a_malformed_npz_is_a_one_line_error(tmp_path):
    huge = _npz(tmp_path / "huge.npz", _npy((10**13,)))
    locked, packed = _npz(tmp_path / "locked.npz", _npy((2,), numbers=2)), _npz(tmp_path / "packed.npz", _npy((2,), numbers=2))
    _changed_in_both_headers(locked, local=6, central=8, value=1)  # the flag of encryption
    _changed_in_both_headers(packed, local=8, central=10, value=99)  # no method of compression that is known
    for path, why in ((huge, "Unable to allocate"), (locked, "encrypted"), (packed, "compression method")):
        with pytest.raises(UserError, match=rf"^\S+{path.name}: is not an .npz of arrays \(.*{why}[^\n]*$"):
            read_weights(path, option="init_from")
    np.savez(tmp_path / "whole.npz", w=np.ones(3))
    with zipfile.ZipFile(tmp_path / "whole.npz", "a") as archive:
        archive.writestr("README.txt", "words")
    assert list(read_weights(tmp_path / "whole.npz", option="init_from")) == ["w"], "what is no array is passed over"


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused():
    """torch would enlarge the storage with uninitialised memory."""
    plain, forged = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.arange(250, dtype=torch.float32)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(forged, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            # The shape (250,): BININT1 250, TUPLE1, and the stride; a BININT2 of 65,530 in its place.
            target.writestr(name, data.replace(b"K\xfa\x85", b"M\xfa\xff\x85") if name.endswith("data.pkl") else data)
    with pytest.raises((ValueError, RuntimeError)):
        load_weights(forged)


def _state(step):
    return {"step": step, "config": {}, "byol": {"weights": torch.full((100,), float(step))}}


def test_a_checkpoint_without_its_digest_is_used_with_a_warning_if_its_internal_checksums_match(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step=step, state=_state(step), keep=9)
        checkpoint_path(tmp_path, step).with_suffix(".sha256").unlink()
    assert load_newest(tmp_path)["step"] == 2
    payload = bytearray(checkpoint_path(tmp_path, 2).read_bytes())
    payload[payload.find(np.float32(2).tobytes() * 9)] ^= 1  # in the weights: torch alone would load it
    checkpoint_path(tmp_path, 2).write_bytes(payload)
    assert torch.load(checkpoint_path(tmp_path, 2))["byol"]["weights"][0] != 2
    with pytest.raises(CheckpointError, match="damaged at"):
        load_checkpoint(checkpoint_path(tmp_path, 2))
    assert load_newest(tmp_path)["step"] == 1


def test_a_digest_file_that_an_interrupted_copy_left_empty_is_no_digest_and_another_ones_is_named(tmp_path, caplog):
    path = save_checkpoint(tmp_path, step=1, state=_state(1), keep=9)
    for content in (b"", b"\xff\0", b"deadbeef"):
        path.with_suffix(".sha256").write_bytes(content)
        assert load_newest(tmp_path)["step"] == 1
        assert "its internal checksums match" in caplog.text
        caplog.clear()
    path.with_suffix(".sha256").write_text("0" * 64 + "\n")
    with pytest.raises(CheckpointError, match=f"if {path.stem}.sha256 belongs to another file, remove that"):
        load_checkpoint(path)


def test_what_is_not_a_file_is_passed_over_without_waiting_for_it(tmp_path):
    save_checkpoint(tmp_path, step=1, state=_state(1), keep=9)
    os.mkfifo(checkpoint_path(tmp_path, 2))
    checkpoint_path(tmp_path, 3).mkdir()
    assert load_newest(tmp_path)["step"] == 1
    with pytest.raises(CheckpointError, match="step-000000002.pt: is not a file"):
        load_checkpoint(checkpoint_path(tmp_path, 2))


def test_a_checkpoint_of_a_run_with_another_config_is_skipped_by_every_reader_of_the_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\nepochs: 7\n")
    ours = {"config": {"seed": 3, "epochs": 7.0, "log_every": 99}}
    save_checkpoint(tmp_path, step=1, state=_state(1) | ours, keep=9)
    save_checkpoint(tmp_path, step=2, state=_state(2) | {"config": {"seed": 4, "epochs": 7.0}}, keep=9)
    assert load_newest(tmp_path)["step"] == 1


def test_results_of_a_run_go_to_its_folder_and_those_of_a_checkpoint_elsewhere_beside_the_file(tmp_path):
    run, models = tmp_path / "run", tmp_path / "models" / "byol"
    path = save_checkpoint(run, step=1, state=_state(1), keep=9)
    (run / "config.yaml").write_text("{}\n")
    assert load_run(run).results == load_run(path).results == run / "evaluation"
    models.mkdir(parents=True)
    (models / "best.pt").write_bytes(path.read_bytes())
    assert load_run(models / "best.pt").results == models / "best.evaluation"


def test_new_checkpoints_are_not_deleted_in_favour_of_later_ones_that_were_skipped(tmp_path):
    for step in (1, 2, 800, 900):
        save_checkpoint(tmp_path, step=step, state=_state(step), keep=9)
    for step in (800, 900):
        checkpoint_path(tmp_path, step).write_bytes(b"damaged")
    save_checkpoint(tmp_path, step=3, state=_state(3), keep=2)
    assert load_newest(tmp_path)["step"] == 3


# YAML and errors that stand for gigabytes.

NINE = "[1,2,3,4,5,6,7,8,9]"
BOMBS = {
    "lists": f"seed:\n- &a0 {NINE}\n" + "".join(f"- &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    "depth": "seed: " + "[" * 5000,
    "cycle": "seed: &a [*a]",
    "date": "seed: 2020-13-45",
    "digits": "seed: " + "9" * 5000,
    "zeros": "\0\0",
    "two documents": "seed: 1\n---\nseed: 2",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_yaml_that_expands_to_too_much_or_is_invalid_is_a_short_error(text):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (which one is said differs)
        read_yaml(text)
    assert len(str(error.value)) < 1000


def test_a_typed_value_that_stands_for_too_much_is_a_short_error_and_a_path_that_is_no_yaml_is_none():
    bomb = "{a: &a [x,x,x,x,x,x,x,x,x]" + "".join(f", {b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")) + "}"
    for arguments in (["--seed", bomb], [f"--data.train={bomb}"], ["--seed", "[" * 3000]):
        with pytest.raises(
            UserError, match="^--(seed|data.train) = .*: (stands for more than 10,000 values|more than 20 levels deep)"
        ) as error:
            parse_train_config(arguments, usage="")
        assert len(str(error.value)) < 400
    for path in ("[a", "a: b: c", "*x", "&", "{", "!!python/none", "- x"):
        assert parse_train_config([f"--data.train={path}"], usage="").data.train == path


def test_aliases_and_merges_of_a_sensible_size_are_read():
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}] * 2}


def test_an_error_shows_a_value_in_one_short_line_whatever_it_is():
    nested = [1] * 9
    for _ in range(40):
        nested = [nested] * 9
    for value in (nested, "x" * 10**6, 16**5000, {i: nested for i in range(99)}):
        assert len(shown(value)) < 2000
    assert shown("runs/a") == "'runs/a'"
    for values in (
        {"seed": nested},
        {"epochs": 10**400},
        {"optim": {3: 4}},
        {5: 6},
        None,
        [1],
        {"seed": 16**5000},
        {"data": {"train": nested}},
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            from_plain(TrainConfig, values)
        assert len(str(error.value)) < 3000


# Files that outlive a power cut.


def test_a_durable_file_is_flushed_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, to: (done.append(("rename", str(self))), replace(self, to)))
    write_durably(tmp_path / "a", "text \udcff")
    unfinished = done[0][1]
    assert done == [("fsync", unfinished), ("rename", unfinished), ("fsync", str(tmp_path))]
    assert (tmp_path / "a").read_bytes() == b"text \xff"


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path):
    write_durably(tmp_path / "a", "before")
    with pytest.raises(TypeError), durable_file(tmp_path / "a") as file:
        file.writelines([b"half", "text"])  # type: ignore[list-item]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_a_lock_names_its_holder_waits_for_it_and_is_free_when_the_descriptor_is_closed(tmp_path):
    path = tmp_path / "folder" / "lock"
    held = locked_file(path)
    with pytest.raises(BlockingIOError) as refused:
        locked_file(path)
    assert refused.value.strerror.startswith(f"process {os.getpid()} on ")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(locked_file, path, patience_s=30)
        time.sleep(0.3)
        assert not waiting.done()
        os.close(held)
        os.close(waiting.result(timeout=30))


def test_the_lock_of_a_folder_that_its_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    """The folder goes between opening and locking the file, when another process has just finished: its lock would exclude nobody."""
    path, flock = tmp_path / "folder" / "lock", fcntl.flock
    removals = iter([True])

    def removed_first(descriptor, operation):
        if next(removals, False):
            shutil.rmtree(path.parent)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    held = locked_file(path)
    assert next(removals, False) is False, "the fault struck"
    with pytest.raises(BlockingIOError):
        locked_file(path)
    os.close(held)


@pytest.mark.parametrize("target", ["victim", "missing/file"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_is_not_touched(target, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"lock: is a symbolic link, .*; remove it"):
        locked_file(tmp_path / "lock")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_that_goes_again_and_again_does_not_hold_a_lock_up_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "mkdir", lambda self, **options: None)
    with pytest.raises(FileNotFoundError):
        locked_file(tmp_path / "folder" / "lock")


def test_a_removed_lock_is_taken_anew_where_the_open_file_keeps_a_link(tmp_path, monkeypatch):
    """As on NFS, which renames an open file that is removed: the holder removes it between opening and locking, and another process makes its own."""
    path, flock = tmp_path / "lock", fcntl.flock
    changes = iter([True])

    def replaced_first(descriptor, operation):
        if next(changes, False):
            path.rename(tmp_path / ".nfs0001")
            path.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_first)
    held = locked_file(path)
    assert os.path.samestat(os.fstat(held), path.stat())
    os.close(held)


def test_an_unfinished_file_is_written_through_no_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    for guessed in (f"a.tmp-{os.getpid()}", f"a.tmp-{os.getpid()}-{'0' * 8}"):
        (tmp_path / guessed).symlink_to(tmp_path / "victim")
    write_durably(tmp_path / "a", "text")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", "other")
    assert ((tmp_path / "victim").read_text(), (tmp_path / "a").read_text()) == ("precious", "text")


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(locked_file(tmp_path / "lock"))
    assert "cannot be locked (No locks available); make sure that only one job writes there" in caplog.text


# Weights from elsewhere.


def _own():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()


def _elsewhere(**changes):
    return {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in _own().items()} | changes


FORMS = {
    "as torch saves them": lambda w: w,
    "without counters": lambda w: {name: value for name, value in w.items() if "num_batches" not in name},
    "under state_dict, beside other things": lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"state": {}}, "arch": "r50"},
    "under model": lambda w: {"model": w},
    "with module.": lambda w: {f"module.{name}": value for name, value in w.items()},
    "with a head": lambda w: w | {"fc.weight": torch.zeros(9, 4), "fc.bias": torch.zeros(9), "head.0.weight": torch.zeros(2)},
    "MoCo's": lambda w: {
        "state_dict": {f"module.{q}.{name}": v * s for q, s in (("encoder_q", 1), ("encoder_k", 2)) for name, v in w.items()}
    },
    "an encoder among others": lambda w: {f"backbone.{name}": v for name, v in w.items()} | {"projector.0.weight": torch.zeros(4, 4)},
    "as half": lambda w: {name: value.half() if value.is_floating_point() else value for name, value in w.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_encoder_weights_are_found_however_a_program_wraps_them(form):
    weights, own = _elsewhere(), _own()
    taken = encoder_weights(form(weights), own, source="w.pt")
    assert taken.keys() == own.keys()
    for name, value in weights.items():
        torch.testing.assert_close(taken[name].to(value.dtype), value, rtol=2e-3, atol=2e-3)


def test_the_log_says_which_weights_were_loaded_and_which_were_not(caplog):
    caplog.set_level("INFO", logger="fastbyol")
    encoder_weights({"state_dict": FORMS["with module."](_elsewhere(**{"fc.weight": torch.zeros(2)}))}, _own(), source="w.pt")
    assert "loads 7 tensors from 'state_dict.module', but not 'fc' in the same file" in caplog.text


def test_layers_that_the_encoder_does_not_have_are_not_ignored():
    """A deeper network's weights hold all of a shallower one's."""
    taken = encoder_weights(_elsewhere(**{"0.more.weight": torch.zeros(1)}), _own(), source="w.pt")
    assert "0.more.weight" in taken, "so that load_matching refuses it"


def test_hashes_of_the_files_are_as_recorded(tmp_path):
    path = save_checkpoint(tmp_path, step=1, state=_state(1), keep=2)
    assert path.with_suffix(".sha256").read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_that_are_not_finite_are_refused_by_name():
    module = nn.Linear(3, 2)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    load_matching(module, weights, source="w.pt")
    weights["weight"][1, 2] = float("nan")
    with pytest.raises(
        UserError, match="w.pt: weight holds numbers that are not finite: its training diverged, or the file is damaged; take another"
    ):
        load_matching(module, weights, source="w.pt")
