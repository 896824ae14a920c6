"""Tests of interrupted conversions (killed, stopped, full disk, bad images): they continue and end with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import wait
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor

from fastbyol.__main__ import main
from fastbyol.config.errors import UserError
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion import beton_writer, estimate, image_pass
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.encode import EncodeSettings
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Encoded
from fastbyol.data.conversion.estimate import Estimate
from fastbyol.data.conversion.image_pass import BadImage
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.conversion.work_folder import BackgroundDigests, WorkFolder, work_path
from fastbyol.data.formats import manifest as manifest_module
from fastbyol.data.formats.beton import read_beton
from fastbyol.data.formats.manifest import read_manifest
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inputs.listing import ImageListing, ImageLocation
from fastbyol.data.inspection.verification import verify
from fastbyol.host.durable_files import locked_file
from fastbyol.host.signals import OrderlyStop
from tests.commands import CONVERSIONS, Conversion, await_gone, files_no_larger_than, kill_and_continue
from tests.images import write_many

IMAGES, BAD_EVERY = 700, 35


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("many") / "images", images=IMAGES, bad_every=BAD_EVERY)


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Returns the output of each format's command without an interruption."""
    results = {}
    for kind in CONVERSIONS:
        command = make(kind, many, tmp_path_factory.mktemp(kind))
        done = command.run()
        assert done.returncode == 0, done.stderr
        results[kind] = command.result()
    return results


def make(kind: str, data: Path, folder: Path) -> Conversion:
    return CONVERSIONS[kind](data, folder, "--max-dropped", "0.1", "--workers", "2")


# ---- interruptions


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_killed_at_random_moments_continues_to_the_same_bytes(
    kind: str, many: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for attempt in range(20):  # on a busy machine the work may be done before we come to kill it
        (tmp_path / str(attempt)).mkdir()
        command = make(kind, many, tmp_path / str(attempt))
        if done := kill_and_continue(command, images=IMAGES, kills=2, seed=5 + attempt):
            break
    assert done, "every kill came too late"
    assert done == sorted(done)
    assert command.result() == undisturbed[kind]
    assert command.is_finished()


@pytest.mark.parametrize(("kind", "number", "code"), [("beton", signal.SIGINT, 130), ("tar", signal.SIGTERM, 143)])
def test_a_stop_is_one_line_with_the_progress_and_the_same_command_continues(
    kind: str, number: signal.Signals, code: int, many: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    exit_code = 0
    for attempt in range(5):  # on a busy machine the work may be done before we come to send the signal
        (tmp_path / str(attempt)).mkdir()
        command = make(kind, many, tmp_path / str(attempt))
        exit_code, err, workers = command.interrupt(number, after=100)
        if exit_code:
            break
    assert exit_code == code
    assert len(workers) == 2
    await_gone(workers)
    done = command.done()
    assert 100 <= done <= IMAGES  # all of them, if it came after the last image and before the end
    at = "" if done == IMAGES and "stopped at" not in err else f"{command.out}: stopped at {done:,} of {IMAGES:,} images"
    assert err.splitlines()[1:] == [f"fastbyol: {at or 'stopped'}; the same command continues"]
    assert not command.out.exists()
    assert command.run().returncode == 0
    assert command.result() == undisturbed[kind]


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_full_disk_is_a_one_line_error_and_the_same_command_continues_once_there_is_space(
    kind: str, many: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    command = make(kind, many, tmp_path)
    with files_no_larger_than(900_000):  # not before its first journal entry, which waits for the disk
        done = command.run()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "the disk is full" in line
    assert line.endswith("the same command continues")
    assert 0 < command.done() < IMAGES
    assert command.run().returncode == 0
    assert command.result() == undisturbed[kind]


def test_a_conversion_killed_after_moving_its_files_leaves_no_work_folder_when_repeated(many: Path, tmp_path: Path) -> None:
    command = make("beton", many, tmp_path)
    assert command.run().returncode == 0
    command.work.mkdir()
    (command.work / "journal.json").write_text("{}")
    done = command.run()
    assert (done.returncode, command.work.exists()) == (2, False)
    assert "exists already" in done.stderr


def test_a_stopped_restart_says_that_it_continues_without_restart(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: EncodingPool, jobs: object) -> Iterator[Encoded]:
        raise OrderlyStop(signal.SIGTERM)
        yield

    out = tmp_path / "x.beton"
    monkeypatch.setattr(EncodingPool, "encode", stopped)
    monkeypatch.setattr(image_pass, "estimate_conversion", lambda *_, **__: Estimate(10, 1, 1.0, 16, ()))
    with pytest.raises(SystemExit):
        main(["convert", "--data", str(ten), "--out", str(out), "--workers", "1", "--restart"])
    assert "stopped at 0 of 10 images; the same command without --restart continues" in capsys.readouterr().err


# ---- who may continue what


def interrupted_by_a_bad_image(folder: Path, out: Path) -> None:
    with pytest.raises(BadImage):
        write_beton(folder, out=out, workers=1, options=ConversionOptions(strict=True))


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Returns a folder of ten images, the last of them truncated."""
    folder = write_many(tmp_path / "ten", images=10, classes=1)
    last = folder / "class0" / "000009.jpg"
    last.write_bytes(last.read_bytes()[:-150])
    return folder


def test_other_settings_or_images_are_refused_by_name_until_a_restart(ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    interrupted_by_a_bad_image(ten, out)
    other = ConversionOptions(encode=EncodeSettings(quality=90))
    with pytest.raises(UserError, match=r"unfinished conversion is in .*transcode_quality = 95 and not 90.*--restart"):
        write_beton(ten, out=out, workers=1, options=other)
    first = ten / "class0" / "000000.jpg"
    first.write_bytes(first.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"class0/000000.jpg: has changed since .*--restart"):
        write_beton(ten, out=out, workers=1)
    (ten / "class0" / "000010.jpg").write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"images = 10 and not 11.*--restart"):
        write_beton(ten, out=out, workers=1)
    manifest = write_beton(ten, out=out, workers=1, options=ConversionOptions(encode=EncodeSettings(quality=90), unfinished="restart"))
    assert (manifest.num_samples, manifest.dropped) == (10, (9,))


def test_strict_stops_at_the_first_bad_image_and_continues_with_it_once_it_is_repaired(ten: Path, tmp_path: Path) -> None:
    command = Conversion("to_ffcv.py", ten, tmp_path / "x.beton", ("--strict",))
    done = command.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fastbyol: error: class0/000009.jpg: truncated (Premature end of JPEG file); ")
    assert command.done() == 9
    shutil.copy(ten / "class0" / "000000.jpg", ten / "class0" / "000009.jpg")
    assert command.run().returncode == 0
    assert read_manifest(tmp_path / "x.beton.json").num_samples == 10


def test_chunks_are_hashed_as_the_file_grows_and_give_its_sha256_after_an_interruption_too(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beton_writer, "_CHUNK_BYTES", 500)
    monkeypatch.setattr(manifest_module, "_MIN_CHUNK_BYTES", 500)
    begin = BackgroundDigests.begin

    def begin_and_wait(self: BackgroundDigests, name: str, *, start: int = 0, size: int | None = None) -> None:
        """Waits for each digest, so that the journal has it: ten images are converted before a thread would have finished."""
        begin(self, name, start=start, size=size)
        wait(self._pending.values())

    monkeypatch.setattr(BackgroundDigests, "begin", begin_and_wait)
    out = tmp_path / "x.beton"
    interrupted_by_a_bad_image(ten, out)
    notes = json.loads((work_path(out) / "journal.json").read_text())["notes"]
    (shard,) = write_beton(ten, out=out, workers=1).shards
    content = out.read_bytes()
    digests = [sha256(content[at : at + 500]).digest() for at in range(0, len(content), 500)]
    assert (shard.chunk_bytes, shard.sha256) == (500, sha256(b"".join(digests)).hexdigest())
    known = {int(note.partition("@")[2]) // 500: digest for note, digest in notes.items()}
    assert known
    assert known == {number: digests[number].hex() for number in known}
    assert not verify(out, workers=1).faults


def test_two_conversions_to_one_output_do_not_mix(ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    with (
        WorkFolder(tmp_path / ".x.beton.partial", output=out, identity={}),
        pytest.raises(UserError, match="another conversion is writing it at this moment"),
    ):
        write_beton(ten, out=out, workers=1)
    assert write_beton(ten, out=out, workers=1).num_samples == 9


def test_a_lock_can_be_taken_over_by_the_group_if_the_umask_lets_it(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        os.close(locked_file(tmp_path / "lock"))
    finally:
        os.umask(before)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664


def test_resume_continues_an_unfinished_conversion_and_refuses_to_start_one(ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.beton"
    resume = ConversionOptions(unfinished="require")
    with pytest.raises(UserError, match=r"x.beton: there is no unfinished conversion to resume; omit --resume"):
        write_beton(ten, out=out, workers=1, options=resume)
    assert not out.with_name(".x.beton.partial").exists()
    interrupted_by_a_bad_image(ten, out)
    assert write_beton(ten, out=out, workers=1, options=resume).num_samples == 9


def test_a_damaged_work_folder_is_noticed(ten: Path, tmp_path: Path) -> None:
    interrupted_by_a_bad_image(ten, tmp_path / "x.beton")
    os.truncate(tmp_path / ".x.beton.partial" / "data", 100)
    with pytest.raises(UserError, match="its journal says .*: damaged; start again with --restart"):
        write_beton(ten, out=tmp_path / "x.beton", workers=1)


def test_too_little_disk_space_is_reported_before_anything_is_written(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    stored = sum(path.stat().st_size for path in many.rglob("*.jpg"))
    with pytest.raises(UserError, match=r"needs about (\d\.\d+) MB more and 1 MB are free") as error:
        write_tar_shards(many, out=tmp_path / "x", workers=1)
    needed = 1e6 * float(str(error.value).split("about ")[1].split()[0])
    assert needed == pytest.approx(stored + IMAGES * (512 + 256 + 2048), rel=0.1)  # per image: a header, half a block, two numbers
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_mostly_bad_images_is_refused_before_the_work_unless_allowed(many: Path, tmp_path: Path) -> None:
    tiny = EncodeSettings(max_pixels=48 * 40 - 1)  # of all images only some PNGs are smaller
    with pytest.raises(
        UserError, match=r"16 of a sample of 16 images cannot be kept, the first class\d/\d+.jpg: too many pixels"
    ) as refused:
        write_tar_shards(many, out=tmp_path / "x", workers=1, options=ConversionOptions(encode=tiny))
    assert str(refused.value).endswith("--max-dropped 1 converts the others")
    assert list(tmp_path.iterdir()) == []
    allowed = ConversionOptions(encode=tiny, max_dropped=1.0)
    assert write_tar_shards(many, out=tmp_path / "x", workers=1, options=allowed).num_samples == IMAGES // BAD_EVERY


def test_overwriting_keeps_the_old_output_until_the_new_one_is_complete(ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    write_tar_shards(ten, out=out, workers=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BadImage):
        write_tar_shards(ten, out=out, workers=1, seed=2, overwrite="replace", options=ConversionOptions(strict=True))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / ".x.replaced").mkdir()  # of a run that was killed just before its end
    (tmp_path / ".x.replaced" / "shard-00000.tar").touch()
    write_tar_shards(ten, out=out, workers=1, seed=2, overwrite="replace")
    assert read_manifest(out / "manifest.json").settings["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ten", "x"]


# ---- what is dropped


def test_row_i_is_the_ith_kept_image_and_the_manifest_lists_the_dropped_ones(
    many: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for kind, files in undisturbed.items():
        folder = tmp_path / kind
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    beton, tar = tmp_path / "beton" / "x.beton", tmp_path / "tar"
    listing, manifest = list_image_folder(many), read_manifest(Path(f"{beton}.json"))
    cut = [i for i, name in enumerate(listing.files) if int(name[-10:-4]) % BAD_EVERY == 3]
    assert list(manifest.dropped) == list(read_manifest(tar / "manifest.json").dropped) == cut
    kept = [i for i in range(IMAGES) if i not in set(cut)]
    content, table = beton.read_bytes(), read_beton(beton)
    stored = [content[offset : offset + size] for offset, size in zip(table.offset, table.size, strict=True)]
    passed = [i for i in kept if int(listing.files[i][-10:-4]) % BAD_EVERY != 5]
    rows = {index: row for row, index in enumerate(kept)}
    assert all(stored[rows[i]] == listing.path(i).read_bytes() for i in passed)
    assert table.label.tolist() == [listing.labels[i] for i in kept]
    dali, ffcv = DaliSource(tar), FfcvSource(beton)
    assert dali.labels.tolist() == ffcv.labels.tolist()
    some = np.array([0, 1, 400, len(kept) - 1])
    for ours, theirs in zip(ffcv.decode(some), dali.decode(some), strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 3
    assert f"({kept[400]:08d}.jpg of" in dali.sample_name(400)


def test_stock_ffcv_reads_a_beton_with_fewer_rows_than_its_table_has_room_for_and_raw_rows(ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "raw.beton"
    manifest = write_beton(ten, out=out, workers=1, options=ConversionOptions(encode=EncodeSettings(raw_fraction=0.5)))
    table = read_beton(out)
    assert (manifest.num_samples, sorted(set(table.mode.tolist()))) == (9, [0, 1])
    expected = np.stack([image.copy() for image in FfcvSource(out).decode(np.arange(9))])
    loader = Loader(
        str(out),
        batch_size=9,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [CenterCropRGBImageDecoder((40, 40), ratio=1.0), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
    ((image, label),) = list(loader)
    # The middle 40x40 of 40x48 pixels. The fast DCT of stock FFCV differs by a few levels in JPEGs; in raw rows nothing does.
    difference = np.abs(image.numpy().astype(int) - expected[:, :, 4:44])
    assert difference[table.mode == 1].max() == 0
    assert difference.mean() < 2
    assert label.flatten().tolist() == [-1] * 9  # one folder: no labels


def test_too_many_dropped_images_or_an_emptied_class_is_an_error_that_keeps_the_work(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "images", images=40, classes=2)
    for path in (folder / "class1").iterdir():
        path.write_bytes(b"gone")
    out = tmp_path / "x.beton"
    with pytest.raises(UserError, match=r"class class1 lost all of its images; (.*report\.json) names them\. Nothing is lost"):
        write_beton(folder, out=out, workers=1)
    report = json.loads((tmp_path / ".x.beton.partial" / "report.json").read_text())
    assert (report["kept"], report["dropped"]) == (20, {"not an image": 20})
    with pytest.raises(UserError, match=r"20 of 40 images were dropped, at most 18 may be; .*allow it with --max-dropped 0\.5"):
        write_beton(folder, out=out, workers=1, options=ConversionOptions(max_dropped=0.46))
    manifest = write_beton(folder, out=out, workers=1, options=ConversionOptions(max_dropped=1.0))
    assert manifest.class_counts == (20, 0)


def test_a_lost_disk_ends_the_work_and_its_images_are_retried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_many(tmp_path / "images", images=60, classes=1), tmp_path / "x.beton"
    location = ImageListing.location

    def unplugged(listing: ImageListing, index: int) -> ImageLocation:
        return location(listing, index) if index < 25 else ImageLocation(listing.files[index], tmp_path / "unplugged")

    monkeypatch.setattr(ImageListing, "location", unplugged)
    with pytest.raises(
        UserError, match=r"20 files in a row cannot be read, the last class0/000044.jpg \(No such file.*is the disk still there"
    ):
        write_beton(folder, out=out, workers=1, options=ConversionOptions(flush_every_s=0))
    monkeypatch.setattr(ImageListing, "location", location)
    assert write_beton(folder, out=out, workers=1).num_samples == 60


def test_names_that_are_not_utf8_survive_in_report_and_manifest(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "images", images=12, classes=2)
    odd = os.fsdecode(b"caf\xe9 \x1b[31m")
    (folder / "class0").rename(folder / odd)
    (folder / odd / "000000.jpg").write_bytes(b"")
    done = Conversion("to_ffcv.py", folder, tmp_path / "x.beton").run()
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "x.beton.json").class_names == (odd, "class1")
    (entry,) = json.loads((tmp_path / "x.beton.report.json").read_text())["touched"]
    assert (entry["name"], entry["reason"]) == (f"{odd}/000000.jpg", "empty")


def test_a_seeded_shuffle_is_the_order_of_the_rows(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "images", images=30, classes=3)
    manifest = write_beton(folder, out=tmp_path / "x.beton", workers=1, shuffle_seed=4)
    labels, offsets = FfcvSource(tmp_path / "x.beton").labels.tolist(), read_beton(tmp_path / "x.beton").offset
    assert sorted(labels) == [0] * 10 + [1] * 10 + [2] * 10
    assert labels != sorted(labels)
    assert (np.diff(offsets) > 0).all()
    assert manifest.settings["shuffle_seed"] == 4
