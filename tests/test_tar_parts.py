"""Shards from several machines: together the samples and the order that one machine writes."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from interrupted import write_many

from fastbyol.config.errors import UserError
from fastbyol.data.conversion import tar_parts
from fastbyol.data.conversion.encode import EncodeSettings
from fastbyol.data.conversion.image_pass import ConversionOptions
from fastbyol.data.conversion.tar_parts import Part, merge_tar_parts, parse_part, write_tar_part
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.dali_loader import DaliSource
from fastbyol.data.manifest import read_manifest

NUM, SEED = 50, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("parts") / "images", images=NUM, bad_every=20)


@pytest.fixture
def parts(images: Path, tmp_path: Path) -> Path:
    """All three parts, made in no particular order."""
    out = tmp_path / "parts"
    for number in (2, 0, 1):
        write_tar_part(images, out=out, part=Part(number, 3), workers=1, seed=SEED)
    return out


def members(folder: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of everything in the shards, in the manifest's order."""
    found = []
    for shard in read_manifest(folder / "manifest.json").shards:
        with tarfile.open(folder / shard.name) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def test_the_merged_parts_hold_the_samples_of_one_machine_in_its_order(images: Path, parts: Path, tmp_path: Path) -> None:
    merged = merge_tar_parts(images, out=parts)
    alone = write_tar_shards(images, out=tmp_path / "alone", workers=1, seed=SEED)
    assert members(parts) == members(tmp_path / "alone")
    for name in ("num_samples", "class_names", "class_counts", "images", "source", "dropped", "names_sha256"):
        assert getattr(merged, name) == getattr(alone, name), name
    assert json.loads((parts / "report.json").read_text()) == json.loads((tmp_path / "alone" / "report.json").read_text())
    ours, theirs = (np.load(folder / "samples.npy") for folder in (parts, tmp_path / "alone"))
    for name in ("size", "crc32", "label", "height", "width"):
        assert (ours[name] == theirs[name]).all()
    assert sorted(path.name for path in parts.iterdir()) == [
        "manifest.json",
        "report.json",
        "samples.npy",
        *(f"shard-{part}-of-00003-00000.{kind}" for part in ("00000", "00001", "00002") for kind in ("idx", "tar")),
    ]


def test_our_dali_backend_reads_the_merged_parts(images: Path, parts: Path, tmp_path: Path) -> None:
    merge_tar_parts(images, out=parts)
    write_tar_shards(images, out=tmp_path / "alone", workers=1, seed=SEED)
    both = [DaliSource(folder) for folder in (parts, tmp_path / "alone")]
    every = np.arange(both[0].num_samples)
    for ours, theirs in zip(*(source.decode(every) for source in both), strict=True):
        assert (ours == theirs).all()


def test_a_part_that_is_there_already_is_not_made_again(images: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_parts, "convert_images", None)
    assert sum(shard.samples for shard in write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)) > 10


def test_a_part_killed_while_its_files_were_moved_is_completed(
    images: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = parts / ".part-00001-of-00003.partial"
    (work / "shards").mkdir(parents=True)
    for name in ("shard-00001-of-00003-00000.tar", "part-00001-of-00003.json", "part-00001-of-00003.npy"):
        shutil.move(parts / name, work / "shards" / name if name.startswith("shard") else work / name)
    with pytest.raises(UserError, match="1 of 3 parts are missing, the first --shard 1/3"):
        merge_tar_parts(images, out=parts)
    monkeypatch.setattr(tar_parts, "convert_images", None)
    write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)
    assert merge_tar_parts(images, out=parts).num_samples == NUM - 3


def test_parts_that_do_not_belong_together_are_refused(images: Path, parts: Path, tmp_path: Path) -> None:
    other = write_many(tmp_path / "other", images=NUM)
    with pytest.raises(UserError, match="made from other images than"):
        merge_tar_parts(other, out=parts)
    options = ConversionOptions(encode=EncodeSettings(quality=80), restart=True)
    write_tar_part(images, out=parts, part=Part(2, 3), workers=1, seed=SEED, options=options)
    with pytest.raises(UserError, match=r"part-00002-of-00003.json: made with transcode_quality = 80 and not 95"):
        merge_tar_parts(images, out=parts)
    (parts / "part-00002-of-00003.json").unlink()
    write_tar_part(images, out=parts, part=Part(2, 4), workers=1, seed=SEED)
    with pytest.raises(UserError, match=r"holds parts of \[3, 4\] machines"):
        merge_tar_parts(images, out=parts)


def test_a_complete_folder_takes_no_further_part(images: Path, parts: Path) -> None:
    merge_tar_parts(images, out=parts)
    with pytest.raises(UserError, match="holds a complete data set already"):
        write_tar_part(images, out=parts, part=Part(0, 3), workers=1)
    with pytest.raises(UserError, match="is merged already"):
        merge_tar_parts(images, out=parts)


def test_the_number_of_the_machine_is_given_or_taken_from_torchrun_or_slurm() -> None:
    assert parse_part("1/4", {}) == Part(1, 4)
    assert parse_part("auto", {"RANK": "2", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}) == Part(2, 3)
    assert parse_part("auto", {"SLURM_PROCID": "7", "SLURM_NTASKS": "9"}) == Part(7, 9)
    with pytest.raises(UserError, match="neither torchrun's"):
        parse_part("auto", {})


def test_the_parts_of_an_order_are_disjoint_and_together_the_order() -> None:
    order = np.arange(10)[::-1]
    shares = [Part(number, 4).share(order).tolist() for number in range(4)]
    assert [index for share in shares for index in share] == order.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
