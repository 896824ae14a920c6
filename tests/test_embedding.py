"""Embeddings of a data set, from the command line and from Python: formats, ranks, kills, and files that are not what they should be."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import fastbyol
from fastbyol.__main__ import main as fastbyol_command
from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader, replacements
from fastbyol.evaluation import embedding
from fastbyol.evaluation.embedding import embed
from fastbyol.evaluation.feature_file import FeatureFile
from fastbyol.evaluation.neighbours import write_neighbours
from fastbyol.export import load_encoder
from fastbyol.run.checkpoint import checkpoint_path
from fastbyol.train import main as train_command
from tests.commands import SMALL_RUN, files_no_larger_than, run_python
from tests.forked import run_forked, run_ranks

NAMES = [f"{name}/{i:03d}.jpg" for name, count in {"ant": 8, "bee": 9, "cat": 8}.items() for i in range(count)]
LABELS = [0] * 8 + [1] * 9 + [2] * 8


@pytest.fixture(scope="module")
def run(data_paths, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train_command([*SMALL_RUN, "--epochs", "1", "--data.train", str(data_paths["folder"]), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def expected(run, data_paths) -> np.ndarray:
    """The features one image at a time, straight from its file."""
    encoder = load_encoder(run)
    with torch.no_grad():
        rows = [encoder(encoder.preprocess(data_paths["folder"] / name)) for name in NAMES]
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def features(run, data_paths, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("features") / "features.npz"
    embed(run, data_paths["folder"], out=out, workers=1)
    return out


def _ends(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        fastbyol_command(list(map(str, arguments)))
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


# Preprocessing.


@pytest.mark.parametrize("kind", ["demo's", "antialiased", "bilinear"])
def test_an_encoder_prepares_an_image_as_the_evaluation_loader_does_byte_for_byte(kind, data_paths):
    from fastbyol.export import Preprocessing

    views = {
        "demo's": ViewPair(size_px=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
        "antialiased": ViewPair(size_px=16, antialias=True),
        "bilinear": ViewPair(size_px=48, interpolation="bilinear"),
    }[kind]
    preprocess = Preprocessing(views)
    with build_image_loader(data_paths["folder"], views=views, batch=8, workers=1) as loader:
        images = torch.cat([batch.image for batch in loader])
        assert loader.image_names() == NAMES
    for name, image in zip(NAMES, images, strict=True):
        path = data_paths["folder"] / name
        with Image.open(path) as opened:  # one of them is grayscale
            assert torch.equal(preprocess(opened)[0], image), name
        assert torch.equal(preprocess(path)[0], image), name


def test_a_16_bit_image_is_prepared_as_the_loader_decodes_it(tmp_path):
    ramp = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    (tmp_path / "d" / "a").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "d" / "a" / "ramp.png")
    views = ViewPair(size_px=24)
    from fastbyol.export import Preprocessing

    with build_image_loader(tmp_path / "d", views=views, batch=1, workers=1) as loader:
        (batch,) = loader
    mine = Preprocessing(views)(Image.fromarray(ramp))
    assert torch.equal(mine, batch.image)
    assert float(mine.std()) > 0.5, "not cut off at 255"


def test_a_loaded_encoder_can_be_copied_and_still_prepares_images(run, data_paths):
    import copy

    encoder = load_encoder(run)
    twin = copy.deepcopy(encoder)
    path = data_paths["folder"] / NAMES[0]
    assert torch.equal(encoder.preprocess(path), twin.preprocess(path))
    assert not [name for name in encoder.state_dict() if "preprocess" in name]


def test_a_file_that_is_no_image_is_refused_by_name(run, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="text.jpg: cannot be read as an image"):
        load_encoder(run).preprocess(tmp_path / "text.jpg")


# Formats.


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_format_holds_a_row_for_every_image_with_name_label_and_origin(suffix, dtype, run, data_paths, expected, tmp_path):
    out = tmp_path / f"f.{suffix}"
    file = embed(run, data_paths["folder"], out=out, dtype=dtype, projection=True, batch=7, workers=1)
    assert file.names == NAMES
    assert file.labels.tolist() == LABELS
    assert file.read().dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(file.read(), expected, rtol=tolerance, atol=tolerance)
    assert file.read("projection").shape == (25, 8)
    facts = file.facts
    assert (facts.checkpoint, facts.step, facts.data) == (str(run), 3, str(data_paths["folder"]))
    assert (facts.feature_dim, facts.size_px, facts.class_names, facts.encoder) == (128, 32, ["ant", "bee", "cat"], "resnet8")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"npy": ["f.npy", "f.json", "f.projection.npy"]}.get(suffix, [out.name])
    )


def test_other_programs_read_the_files_without_us(run, data_paths, expected, tmp_path):
    for suffix in ("parquet", "npz", "npy"):
        embed(run, data_paths["folder"], out=tmp_path / f"f.{suffix}", workers=1)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["name", "label", "feature"]
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 128)
    assert table["name"].to_pylist() == NAMES
    np.testing.assert_allclose(np.array(table["feature"].to_pylist()), expected, rtol=1e-5, atol=1e-5)
    assert json.loads(table.schema.metadata[b"fastbyol"])["step"] == 3
    arrays = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert sorted(arrays.files) == ["facts", "feature", "label", "name"]
    assert arrays["name"].tolist() == NAMES
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy", allow_pickle=False), arrays["feature"])
    assert json.loads((tmp_path / "f.json").read_text())["labels"] == LABELS


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_converted_data_give_the_same_features_under_the_images_numbers(backend, run, data_paths, expected, tmp_path):
    file = embed(run, data_paths[backend], out=tmp_path / "f.npz", workers=1)
    assert len(set(file.names)) == 25
    assert sorted(file.names) == [f"{i:08d}" for i in range(25)]
    order = list(map(int, file.names))
    np.testing.assert_allclose(file.read(), expected[order] if backend == "dali" else expected, rtol=1e-2, atol=1e-2)


def _as_list(flat: Path, folder: Path) -> str:
    (folder / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in sorted(flat.iterdir())))
    return str(folder / "list.csv")


def _as_shards(flat: Path, folder: Path) -> str:
    files = sorted(flat.iterdir())
    for shard, members in enumerate((files[:10], files[10:])):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for path in members:
                tar.add(path, path.name)
    return str(folder / "part-{0..1}.tar")


UNLABELLED = {"flat": lambda flat, _: str(flat), "list": _as_list, "shards": _as_shards}


@pytest.mark.parametrize("source", UNLABELLED)
@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
def test_images_without_a_label_have_minus_one_whatever_they_come_from(source, suffix, run, data_paths, expected, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in NAMES:
        shutil.copy(data_paths["folder"] / name, flat / name.replace("/", "-"))
    data = UNLABELLED[source](flat, tmp_path)
    file = embed(run, data, out=tmp_path / f"f.{suffix}", workers=1)
    assert set(file.labels.tolist()) == {-1}
    assert file.facts.class_names == []
    assert [name.rpartition("/")[2] for name in file.names] == [name.replace("/", "-") for name in NAMES]
    np.testing.assert_allclose(file.read(), expected, rtol=1e-5, atol=1e-5)
    found = write_neighbours(tmp_path / f"f.{suffix}", file.names[3], out=tmp_path / "n.png", k=3)
    assert {each.label for each in found} == {""}


def test_labels_are_left_out_on_request_also_where_the_neighbours_are_drawn(run, data_paths, tmp_path):
    data = data_paths["folder"]
    arguments = ["embed", "--checkpoint", run, "--data", data, "--labels", "none", "--out", tmp_path / "f.npz", "--workers", "1"]
    fastbyol_command(list(map(str, arguments)))
    file = FeatureFile(tmp_path / "f.npz")
    assert (set(file.labels.tolist()), file.facts.labels, sorted(file.names)) == ({-1}, "none", NAMES)
    assert write_neighbours(tmp_path / "f.npz", "ant/000.jpg", out=tmp_path / "n.png", k=2)[0].label == ""


def test_a_name_that_is_not_utf8_is_written_with_its_bytes_escaped(run, tmp_path):
    folder = tmp_path / "d" / "a"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 40), (90 * i, 50, 60)).save(folder / os.fsdecode(b"caf\xe9%d.png" % i))
    for suffix in ("parquet", "npz", "npy"):
        file = embed(run, tmp_path / "d", out=tmp_path / f"f.{suffix}", workers=1)
        assert file.names == [r"a/caf\xe90.png", r"a/caf\xe91.png"]
    name = os.fsdecode(b"a/caf\xe91.png")
    assert write_neighbours(tmp_path / "f.npy", name, out=tmp_path / "n.png", k=1)[0].row == 0


# Images that do not decode.


@pytest.fixture
def partly_damaged(data_paths, tmp_path) -> Path:
    """The folder, with the first, a middle and the last two images damaged: two headers and two ends."""
    folder = shutil.copytree(data_paths["folder"], tmp_path / "damaged")
    for position, name in enumerate(DAMAGED_NAMES):
        path = folder / name
        path.write_bytes(b"no image" if position % 2 else path.read_bytes()[: path.stat().st_size // 2])
    return folder


DAMAGED_NAMES = ("ant/000.jpg", "bee/003.jpg", "cat/006.jpg", "cat/007.jpg")
SOUND = [row for row, name in enumerate(NAMES) if name not in DAMAGED_NAMES]


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
def test_damaged_images_have_no_row_and_are_named(suffix, run, partly_damaged, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "PART_ROWS", 4)
    said: list[str] = []
    file = embed(run, partly_damaged, out=tmp_path / f"f.{suffix}", projection=True, batch=3, workers=2, announce=said.append)
    assert said[-1] == f"4 of 25 images do not decode, and have no row: {', '.join(DAMAGED_NAMES)}"
    assert (file.names, file.labels.tolist()) == ([NAMES[row] for row in SOUND], [LABELS[row] for row in SOUND])
    np.testing.assert_allclose(file.read(), expected[SOUND], rtol=1e-5, atol=1e-5)
    assert file.read("projection").shape == (21, 8)
    assert (file.facts.num_images, file.facts.damaged) == (21, [0, 11, 23, 24])
    assert [file.facts.index_of(row) for row in range(21)] == SOUND
    assert not list(tmp_path.glob(".*"))


def test_neighbours_show_the_images_of_the_rows_that_are_left(run, partly_damaged, data_paths, tmp_path):
    sound = shutil.copytree(data_paths["folder"], tmp_path / "sound")
    for name in DAMAGED_NAMES:
        (sound / name).unlink()
    pictures = []
    for data in (sound, partly_damaged):
        (data.parent / f"of_{data.name}").mkdir()
        file = embed(run, data, out=data.parent / f"of_{data.name}" / "f.npz", workers=1, announce=lambda _: None)
        found = write_neighbours(file.path, "cat/001.jpg", out=tmp_path / f"{data.name}.png", k=6)
        pictures.append(((tmp_path / f"{data.name}.png").read_bytes(), found))
    assert pictures[0] == pictures[1]


def test_indices_of_damaged_images_that_cannot_be_true_are_refused(features, tmp_path):
    facts = json.loads(_facts_of(features))
    del facts["damaged"]
    _with(features, tmp_path / "earlier.npz", facts=np.array(json.dumps(facts)))
    assert FeatureFile(tmp_path / "earlier.npz").facts.damaged == [], "a file of an earlier version"
    for damaged in ([3, 1], [-1], [1, 1], ["1"], [True], [2**70], 1):
        _with(features, tmp_path / "f.npz", facts=np.array(json.dumps(facts | {"damaged": damaged})))
        with pytest.raises(UserError, match="is not a complete file of features"):
            FeatureFile(tmp_path / "f.npz")
    _with(features, tmp_path / "f.npz", facts=np.array(json.dumps(facts | {"damaged": [0]})))
    with pytest.raises(UserError, match="its facts name 1 damaged images, more than its data can have; embed again"):
        write_neighbours(tmp_path / "f.npz", NAMES[0], out=tmp_path / "n.png", k=24)


def test_too_many_damaged_images_are_an_error_however_often_the_command_is_repeated(run, data_paths, tmp_path, monkeypatch):
    """Each start counts only what it meets, so the whole is counted at the end."""
    monkeypatch.setattr(embedding, "PART_ROWS", 4)
    monkeypatch.setattr(replacements, "_ALWAYS_ALLOWED", 2)
    folder = shutil.copytree(data_paths["folder"], tmp_path / "images")
    for name in NAMES[::5]:
        (folder / name).write_bytes(b"")
    for _ in range(4):
        with pytest.raises(UserError, match=r"where 2 may; python -m fastbyol convert lists all damaged images"):
            embed(run, folder, out=tmp_path / "f.npz", batch=4, workers=1, announce=lambda _: None)
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize("protocol", ["labelfree", "report"])
def test_an_evaluation_without_accuracy_leaves_damaged_images_out(protocol, run, partly_damaged, tmp_path, caplog):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in NAMES:
        shutil.copy(partly_damaged / name, flat / name.replace("/", "_"))
    if protocol == "report":  # as val too, which a report without accuracy reads
        flat = shutil.copytree(flat, tmp_path / "both" / "train")
        flat = shutil.copytree(flat, tmp_path / "both" / "val").parent
    given = ["evaluate", "labelfree", "--checkpoint", run] if protocol == "labelfree" else ["report", "--run", run]
    fastbyol_command(list(map(str, [*given, "--data", flat, "--out", tmp_path / "out"])))
    assert json.loads((tmp_path / "out" / "labelfree.json").read_text())["num_images"] == 21
    assert sum(record.getMessage().endswith("; it is left out") for record in caplog.records) == (8 if protocol == "report" else 4)


# Ranks, kills, mistakes.


def test_the_command_says_what_it_wrote_and_what_to_do_next(run, data_paths, tmp_path, capsys):
    fastbyol_command(["embed", "--checkpoint", str(run), "--data", str(data_paths["folder"]), "--out", str(tmp_path / "f.npy")])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"embedded: 25 images, 128 numbers of float32 each: {tmp_path / 'f.npy'}"
    assert said[1] == f"names, labels and settings: {tmp_path / 'f.json'}"
    assert said[2].startswith("next: python -m fastbyol neighbours --features ")


@pytest.mark.distributed
def test_two_ranks_write_what_one_process_writes(run, data_paths, features, tmp_path):
    command = ["-m", "fastbyol", "embed", "--checkpoint", run, "--data", data_paths["folder"], "--workers", "1"]
    first, second = run_ranks(*command, "--out", tmp_path / "f.parquet")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "embedded: 25 images" in first.stdout
    assert second.stdout == ""
    two, one = FeatureFile(tmp_path / "f.parquet"), FeatureFile(features)
    assert (two.names, two.labels.tolist(), two.facts) == (one.names, one.labels.tolist(), one.facts)
    np.testing.assert_allclose(two.read(), one.read(), rtol=1e-5, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_is_killed_goes_on_whatever_the_number_of_ranks(rank, run, data_paths, features, tmp_path):
    out = tmp_path / "f.npz"
    arguments = ["embed", "--checkpoint", run, "--data", data_paths["folder"], "--out", out, "--batch", "3", "--workers", "1"]
    ranks = run_ranks("tests/faulty_embed.py", *arguments, env={"FAULT": f"kill:{rank}:2"})
    assert f"FAULT kill on rank {rank} after 2 parts" in ranks[rank].stderr
    assert (ranks[rank].returncode, ranks[1 - rank].returncode) == (-9, 5), ranks
    assert not out.exists()
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".f.npz.partial").glob("part-*.npz")}
    assert 2 <= len(parts) < 7
    killed = run_forked("tests/faulty_embed.py", *arguments, env={"FAULT": "kill:0:1"})  # again, in one process
    assert killed.returncode == -9
    assert f"goes on after {len(parts)} of 7 parts" in killed.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".f.npz.partial").glob("part-*.npz")}
    assert parts.items() <= kept.items(), "no part was made twice"
    done = run_forked("tests/faulty_embed.py", *arguments, env={"FAULT": ""})
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    file, whole = FeatureFile(out), FeatureFile(features)
    assert (file.names, file.facts) == (whole.names, whole.facts)
    np.testing.assert_allclose(file.read(), whole.read(), rtol=1e-5, atol=1e-5)


def test_the_parts_of_another_embedding_are_not_used(run, data_paths, tmp_path):
    out = tmp_path / "f.npz"
    arguments = ["embed", "--checkpoint", run, "--data", data_paths["folder"], "--out", out, "--workers", "1"]
    run_forked("tests/faulty_embed.py", *arguments, env={"FAULT": "kill:0:1"})
    done = run_forked("tests/faulty_embed.py", *arguments, "--dtype", "float16", env={"FAULT": ""})
    assert done.returncode == 2
    assert "holds the parts of another embedding (it differs in dtype); remove that folder" in done.stderr
    part = next((tmp_path / ".f.npz.partial").glob("part-*.npz"))
    part.write_bytes(part.read_bytes()[:-900])
    done = run_forked("tests/faulty_embed.py", *arguments, env={"FAULT": ""})
    assert done.returncode == 2
    assert "was damaged and is removed" in done.stderr
    assert "repeat the command" in done.stderr
    done = run_forked("tests/faulty_embed.py", *arguments, env={"FAULT": ""})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(suffix, run, data_paths, expected, tmp_path):
    out = tmp_path / f"f.{suffix}"
    with files_no_larger_than(13_000), pytest.raises(UserError, match="cannot be written .*; make room and repeat the command"):
        embed(run, data_paths["folder"], out=out, workers=1)
    assert not out.exists()
    work = tmp_path / f".f.{suffix}.partial"
    assert work.is_dir()
    announced: list[str] = []
    file = embed(run, data_paths["folder"], out=out, workers=1, announce=announced.append)
    np.testing.assert_allclose(file.read(), expected, rtol=1e-5, atol=1e-5)
    assert not work.exists()


def test_the_end_of_the_disk_while_the_parts_are_joined_loses_no_part(run, data_paths, expected, tmp_path, monkeypatch):
    from fastbyol.evaluation import embedding

    monkeypatch.setattr(embedding, "PART_ROWS", 4)
    for suffix in ("parquet", "npz", "npy"):
        out, announced = tmp_path / f"f.{suffix}", []
        with files_no_larger_than(6_000), pytest.raises(UserError, match="cannot be written .*; make room and repeat the command"):
            embed(run, data_paths["folder"], out=out, workers=1)
        assert not out.exists()
        file = embed(run, data_paths["folder"], out=out, workers=1, announce=announced.append)
        assert announced == [f"{out}: goes on after 7 of 7 parts of 4 images"]
        np.testing.assert_allclose(file.read(), expected, rtol=1e-5, atol=1e-5)


def test_a_file_that_lies_where_one_belongs_is_not_replaced(run, data_paths, tmp_path):
    (tmp_path / "f.json").write_text("mine")
    with pytest.raises(UserError, match="f.json: exists already; remove it or choose another file"):
        embed(run, data_paths["folder"], out=tmp_path / "f.npy", workers=1)
    assert (tmp_path / "f.json").read_text() == "mine"


def test_two_commands_do_not_write_to_one_file(run, data_paths, tmp_path):
    from fastbyol.host.durable_files import locked_file

    held = locked_file(tmp_path / ".f.npz.partial" / "lock")
    with pytest.raises(UserError, match="process [0-9]+ on .* is embedding to it"):
        embed(run, data_paths["folder"], out=tmp_path / "f.npz", workers=1)
    os.close(held)
    embed(run, data_paths["folder"], out=tmp_path / "f.npz", workers=1)


def test_features_that_do_not_fit_float16_are_refused(run, data_paths, tmp_path):
    encoder = load_encoder(run)
    weights = encoder.state_dict()
    last = next(name for name in reversed(weights) if name.endswith("bn2.weight"))
    weights[last] = weights[last] * 1e9
    torch.save(weights, tmp_path / "w.pt")
    known = {"views.size_px": 32, "model.stem": "small2"}
    with pytest.raises(UserError, match="do not fit float16; take --dtype float32"):
        embed(tmp_path / "w.pt", data_paths["folder"], out=tmp_path / "f.npz", dtype="float16", changes=known, workers=1)
    # As it says: nothing of the first attempt is in the way.
    file = embed(tmp_path / "w.pt", data_paths["folder"], out=tmp_path / "f.npz", changes=known, workers=1)
    assert file.read().max() > 65504


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "f.csv"], "--out f.csv: must end in .parquet, .npz, .npy"),
        (["--out", "none/f.npz"], "there is no folder none"),
        (["--out", "there.npz"], "--out there.npz: exists already"),
        (["--data", "none"], "--data = none: no such file or folder"),
        (["--data", "empty"], "empty"),
        (["--checkpoint", "none"], "checkpoint = 'none': no such file or folder"),
        (["--checkpoint", "text"], "checkpoint text: is not a file of weights .torch.save did not write it"),
        (["--checkpoint", "bare.pt", "--projection"], "bare.pt holds an encoder without a projector"),
        (["--views.size_px", "64"], "views.size_px: has no effect on a run"),
        (["--views.flip_p", "0"], "unrecognized arguments: --views.flip_p"),
        (["--checkpoint", "bare.pt", "--model.stem", "big"], "model.stem = 'big': must be one of"),
        (["--batch", "0"], "--batch = 0: must be a number >= 1"),
    ],
)
def test_mistakes_end_in_one_line(arguments, says, run, data_paths, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npz").write_bytes(b"")
    (tmp_path / "text").write_text("no weights")
    torch.save(load_encoder(run).state_dict(), tmp_path / "bare.pt")
    given = {"--checkpoint": str(run), "--data": str(data_paths["folder"]), "--out": "f.npz"}
    own = [item for name, value in given.items() if name not in arguments for item in (name, value)]
    code, said = _ends(["embed", *own, *arguments], capsys)
    assert code == 2
    last = said.splitlines()[-1]
    assert re.search(says, last), said
    assert not list(tmp_path.glob(".f.npz*/part*"))


def test_a_folder_that_may_not_be_written_is_refused_before_the_work_and_not_called_one_to_remove(
    run, data_paths, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"--out {tmp_path}/f.npz: you may not write into the folder {tmp_path}; choose another"):
        embed(run, data_paths["folder"], out=tmp_path / "f.npz")
    monkeypatch.undo()

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(embedding, "locked_file", refused)
    with pytest.raises(
        UserError, match=rf"--out {tmp_path}/f.npz: nothing can be written into the folder {tmp_path} \(.*; choose another$"
    ):
        embed(run, data_paths["folder"], out=tmp_path / "f.npz")


def test_pyarrow_is_named_where_it_is_missing(run, data_paths, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow.* is not installed; pip install 'fastbyol.parquet.'"):
        embed(run, data_paths["folder"], out=tmp_path / "f.parquet")


# Files of features that are not whole.


class _Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')",)


def _facts_of(path: Path) -> str:
    return str(np.load(path)["facts"])


def _with(path: Path, out: Path, **changes: object) -> None:
    arrays = dict(np.load(path)) | changes
    np.savez(out, **{name: value for name, value in arrays.items() if value is not None})


DAMAGE = {
    "cut.npz": lambda good, path: path.write_bytes(good.read_bytes()[:-2000]),
    "empty.npz": lambda good, path: path.write_bytes(b""),
    "text.npy": lambda good, path: (path.write_text("no array"), path.with_suffix(".json").write_text("{}")),
    "code.npy": lambda good, path: (path.write_bytes(pickle.dumps(_Code())), path.with_suffix(".json").write_text("[]")),
    "objects.npz": lambda good, path: _with(good, path, name=np.array([_Code()] * 25, dtype=object)),
    "without_facts.npz": lambda good, path: _with(good, path, facts=None),
    "other_facts.npz": lambda good, path: _with(good, path, facts=np.array("[1]")),
    "fewer_names.npz": lambda good, path: _with(good, path, name=np.array(["a", "b"])),
    "text.parquet": lambda good, path: path.write_text("no table"),
    "other.parquet": lambda good, path: pyarrow.parquet.write_table(pa.table({"x": [1]}), path),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_whole_is_refused_in_one_line_and_nothing_is_unpickled(name, features, tmp_path, capsys):
    DAMAGE[name](features, tmp_path / name)
    code, said = _ends(["neighbours", "--features", tmp_path / name, "--query", "x", "--out", tmp_path / "n.png"], capsys)
    assert code == 2
    assert f"{name}: is not a complete file of features" in said, said
    assert said.count("\n") == 1


def test_an_npy_without_its_names_says_where_they_belong(run, data_paths, tmp_path):
    embed(run, data_paths["folder"], out=tmp_path / "f.npy", workers=1)
    (tmp_path / "f.json").unlink()
    with pytest.raises(UserError, match="f.npy: its names are missing; f.json must lie beside it"):
        FeatureFile(tmp_path / "f.npy")
    with pytest.raises(UserError, match="none.npz: no such file"):
        FeatureFile(tmp_path / "none.npz")
    with pytest.raises(UserError, match="no file of features: expected .parquet"):
        FeatureFile(tmp_path / "f.csv")


@pytest.mark.parametrize("change", ["rows", "width", "type"])
def test_rows_that_contradict_the_facts_are_refused(change, features, tmp_path):
    whole = np.load(features)["feature"]
    wrong = {"rows": whole[:-1], "width": whole[:, :-1], "type": whole.astype(np.float64)}[change]
    _with(features, tmp_path / "f.npz", feature=wrong)
    with pytest.raises(UserError, match="is not a complete file of features"):
        FeatureFile(tmp_path / "f.npz").read()


# Neighbours.


def test_the_neighbours_of_a_row_are_those_of_largest_cosine_without_itself(features, expected, tmp_path, capsys):
    out = tmp_path / "n.png"
    fastbyol_command(["neighbours", "--features", str(features), "--query", "bee/004.jpg", "--k", "6", "--out", str(out)])
    said = capsys.readouterr().out
    row = NAMES.index("bee/004.jpg")
    unit = expected.astype(np.float64) / np.linalg.norm(expected, axis=1, keepdims=True)
    cosine = unit @ unit[row]
    cosine[row] = -2
    order = np.argsort(-cosine)[:6]
    record = json.loads(out.with_suffix(".json").read_text())
    assert [each["name"] for each in record["neighbours"]] == [NAMES[i] for i in order]
    assert [each["cosine"] for each in record["neighbours"]] == pytest.approx(cosine[order].tolist(), abs=1e-4)
    assert [each["label"] for each in record["neighbours"]] == [NAMES[i][:3] for i in order]
    assert (record["query"], record["label"], record["step"]) == ("bee/004.jpg", "bee", 3)
    assert NAMES[order[0]] in said.splitlines()[0]
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        # The query's tile shows the query's own pixels, and the first neighbour's tile that image's.
        assert sheet.width > 6 * 144


def test_the_picture_shows_the_images_that_the_json_names(run, tmp_path):
    """Images of one colour each: the tiles' colours say which images were drawn, in which order."""
    from fastbyol.evaluation.neighbours import LINE_PX, MARGIN_PX, TILE_PX

    colours = [(255, 0, 0), (250, 20, 10), (0, 0, 255), (0, 255, 0), (200, 60, 20)]
    folder = tmp_path / "d" / "a"
    folder.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (40, 40), colour).save(folder / f"{i}.png")
    embed(run, tmp_path / "d", out=tmp_path / "f.npz", workers=1)
    found = write_neighbours(tmp_path / "f.npz", "a/0.png", out=tmp_path / "n.png")
    assert len(found) == 4, "fewer than k = 20"
    with Image.open(tmp_path / "n.png") as sheet:
        top = 2 * MARGIN_PX + LINE_PX
        assert sheet.getpixel((MARGIN_PX + 70, top + 70)) == pytest.approx(colours[0], abs=2)
        for place, each in enumerate(found):
            at = (MARGIN_PX + place * (TILE_PX + MARGIN_PX) + 70, top + TILE_PX + 3 * LINE_PX + MARGIN_PX + 70)
            assert sheet.getpixel(at) == pytest.approx(colours[each.row], abs=2)


def test_an_image_file_is_embedded_with_the_checkpoint_that_the_features_name(features, data_paths, tmp_path):
    copy = tmp_path / "query.jpg"
    shutil.copy(data_paths["folder"] / "cat/002.jpg", copy)
    found = write_neighbours(features, str(copy), out=tmp_path / "n.png", k=3)
    assert found[0].name == "cat/002.jpg"
    assert found[0].cosine == pytest.approx(1, abs=1e-5)


def test_features_of_any_format_give_the_same_neighbours_block_by_block(run, data_paths, features, tmp_path, monkeypatch):
    inner = FeatureFile.blocks
    monkeypatch.setattr(FeatureFile, "blocks", lambda self, column="feature", rows=0: inner(self, column, rows=4))
    found = {}
    for suffix in ("parquet", "npy"):
        embed(run, data_paths["folder"], out=tmp_path / f"f.{suffix}", workers=1)
        found[suffix] = write_neighbours(tmp_path / f"f.{suffix}", "ant/001.jpg", out=tmp_path / "n.png", k=7)
    monkeypatch.undo()
    assert found["parquet"] == found["npy"] == write_neighbours(features, "ant/001.jpg", out=tmp_path / "n.png", k=7)


def test_queries_and_places_that_do_not_fit_end_in_one_line(run, features, data_paths, tmp_path, capsys):
    base = ["neighbours", "--features", features, "--out", tmp_path / "n.png"]
    assert "(did you mean ant/000.jpg?)" in _ends([*base, "--query", "ant/000.jpeg"], capsys)[1]
    assert "must end in .png" in _ends([*base[:3], "--query", "ant/000.jpg", "--out", tmp_path / "n.jpg"], capsys)[1]
    assert "--k = 0" in _ends([*base, "--query", "ant/000.jpg", "--k", "0"], capsys)[1]
    assert "has no effect where --query names a row" in _ends([*base, "--query", "ant/000.jpg", "--checkpoint", run], capsys)[1]
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg: cannot be read as an image" in _ends([*base, "--query", tmp_path / "text.jpg"], capsys)[1]
    other = tmp_path / "other" / "a"
    other.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(other / "a.png")
    assert "does not hold the images of" in _ends([*base, "--query", "ant/000.jpg", "--data", tmp_path / "other"], capsys)[1]
    query = data_paths["folder"] / "ant/000.jpg"
    encoder = load_encoder(run)
    with torch.no_grad():
        encoder.conv1.weight.mul_(-1)  # type: ignore[union-attr]
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    assert "is another encoder" in _ends([*base, "--query", query, "--checkpoint", checkpoint_of_other_step(run, tmp_path)], capsys)[1]
    assert "no longer there" not in capsys.readouterr().err


def checkpoint_of_other_step(run: Path, folder: Path) -> Path:
    """Returns a copy of the run's checkpoint with other weights."""
    state = torch.load(checkpoint_path(run, 3), weights_only=True)
    state["byol"]["online.encoder.conv1.weight"] *= -1
    torch.save(state, folder / "changed.pt")
    return folder / "changed.pt"


def test_the_encoder_of_the_features_that_is_gone_is_asked_for(run, data_paths, tmp_path):
    gone = tmp_path / "w.pt"
    torch.save(load_encoder(run).state_dict(), gone)
    known = {"views.size_px": 32, "model.stem": "small2"}
    file = embed(gone, data_paths["folder"], out=tmp_path / "f.npz", changes=known, workers=1)
    assert file.facts.changes == known
    moved = gone.rename(tmp_path / "moved.pt")
    query = str(data_paths["folder"] / "ant/000.jpg")
    with pytest.raises(UserError, match="is no longer there; say where it is with --checkpoint"):
        write_neighbours(tmp_path / "f.npz", query, out=tmp_path / "n.png")
    assert write_neighbours(tmp_path / "f.npz", query, out=tmp_path / "n.png", checkpoint=moved)[0].name == "ant/000.jpg"


def test_every_public_name_is_found_and_the_package_itself_imports_nothing_slow():
    assert set(fastbyol.__all__) == set(fastbyol._HOME)
    for name in fastbyol.__all__:
        assert getattr(fastbyol, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastbyol.nothing  # noqa: B018
    done = run_python("-c", "import sys, fastbyol; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr
