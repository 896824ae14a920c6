"""Tests of shards written by several machines: merged, they have the samples and the order of one machine's."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastbyol.config.errors import UserError
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.conversion import tar_parts
from fastbyol.data.conversion.encode import EncodeSettings
from fastbyol.data.conversion.tar_parts import merge_tar_parts, write_tar_part
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.formats.manifest import read_manifest
from fastbyol.host.durable_files import locked_file
from fastbyol.ranks.parts import Part, parse_part
from tests.commands import run_here
from tests.images import write_many

NUM, SEED = 50, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(tmp_path_factory.mktemp("parts") / "images", images=NUM, bad_every=20)


@pytest.fixture
def parts(images: Path, tmp_path: Path) -> Path:
    """Returns a folder with all three parts, converted in no particular order."""
    out = tmp_path / "parts"
    for number in (2, 0, 1):
        write_tar_part(images, out=out, part=Part(number, 3), workers=1, seed=SEED)
    return out


def members(folder: Path) -> list[tuple[str, bytes]]:
    """Returns (name, bytes) of every member of the shards, in the manifest's order."""
    found = []
    for shard in read_manifest(folder / "manifest.json").shards:
        with tarfile.open(folder / shard.name) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def test_merged_parts_have_the_same_samples_in_the_same_order_as_from_one_machine(images: Path, parts: Path, tmp_path: Path) -> None:
    merged = merge_tar_parts(parts)
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
    merge_tar_parts(parts)
    write_tar_shards(images, out=tmp_path / "alone", workers=1, seed=SEED)
    both = [DaliSource(folder) for folder in (parts, tmp_path / "alone")]
    every = np.arange(both[0].num_samples)
    for ours, theirs in zip(*(source.decode(every) for source in both), strict=True):
        assert (ours == theirs).all()


def test_a_complete_part_is_not_converted_again(images: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_parts, "convert_images", None)
    assert sum(shard.samples for shard in write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)) > 10


def test_a_complete_part_of_other_settings_or_images_is_refused_and_replaced_on_request(images: Path, parts: Path, tmp_path: Path) -> None:
    part = {"out": parts, "part": Part(1, 3), "workers": 1}
    others = write_many(tmp_path / "others", images=NUM - 1)
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    with pytest.raises(UserError, match=r"is complete, made with seed = 3 and not 4; repeat its settings.*--restart"):
        write_tar_part(images, seed=4, **part)
    with pytest.raises(UserError, match=r"is complete, made from other images \(.*images\) than .*others holds; .*--restart"):
        write_tar_part(others, seed=SEED, **part)
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    shards = write_tar_part(others, seed=SEED, options=ConversionOptions(unfinished="restart"), **part)
    assert sum(shard.samples for shard in shards) == len(range(NUM - 1)[Part(1, 3).rows(NUM - 1)])


def test_a_part_that_is_made_again_leaves_no_shards_of_the_earlier_one(images: Path, parts: Path) -> None:
    before = {path.name for path in parts.iterdir()}
    earlier = [parts / f"shard-00001-of-00003-00007.{kind}" for kind in ("tar", "idx")]
    of_another_part = parts / "shard-00002-of-00003-00007.tar"
    for shard in (*earlier, of_another_part):
        shard.touch()
    options = ConversionOptions(unfinished="restart")
    write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED, options=options)
    assert {path.name for path in parts.iterdir()} == before | {of_another_part.name}


def test_a_complete_part_is_not_moved_while_another_process_works_on_it(images: Path, parts: Path) -> None:
    held = locked_file(parts / ".part-00001-of-00003.partial" / "lock")
    with pytest.raises(UserError, match="another conversion is writing it at this moment"):
        write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)
    os.close(held)
    write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)
    assert not (parts / ".part-00001-of-00003.partial").exists()


def test_a_part_killed_while_moving_its_files_is_completed(
    images: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = parts / ".part-00001-of-00003.partial"
    (work / "shards").mkdir(parents=True)
    for name in ("shard-00001-of-00003-00000.tar", "part-00001-of-00003.json", "part-00001-of-00003.npz"):
        shutil.move(parts / name, work / "shards" / name if name.startswith("shard") else work / name)
    with pytest.raises(UserError, match="1 of 3 parts are missing, the first --shard 1/3"):
        merge_tar_parts(parts)
    monkeypatch.setattr(tar_parts, "convert_images", None)
    write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)
    assert merge_tar_parts(parts).num_samples == NUM - 3


def test_parts_that_do_not_belong_together_are_refused(images: Path, parts: Path, tmp_path: Path) -> None:
    other = write_many(tmp_path / "other", images=NUM)
    with pytest.raises(UserError, match=f"made from other images than {other} holds"):
        merge_tar_parts(parts, data=other)
    write_tar_part(other, out=parts, part=Part(2, 3), workers=1, seed=SEED, options=ConversionOptions(unfinished="restart"))
    with pytest.raises(UserError, match=rf"part-00002-of-00003.json: made from other images \({other}\) than the first part \({images}\)"):
        merge_tar_parts(parts)
    options = ConversionOptions(encode=EncodeSettings(quality=80), unfinished="restart")
    write_tar_part(images, out=parts, part=Part(2, 3), workers=1, seed=SEED, options=options)
    with pytest.raises(UserError, match=r"part-00002-of-00003.json: made with transcode_quality = 80 and not 95"):
        merge_tar_parts(parts)
    (parts / "part-00002-of-00003.json").unlink()
    write_tar_part(images, out=parts, part=Part(2, 4), workers=1, seed=SEED)
    with pytest.raises(UserError, match=r"holds parts of 3 machines and parts of 4 machines"):
        merge_tar_parts(parts)


def test_a_merge_needs_no_source_but_checks_it_if_given(images: Path, parts: Path, tmp_path: Path) -> None:
    gone = images.rename(tmp_path / "gone")
    copies = [shutil.copytree(parts, tmp_path / name) for name in ("without", "with")]
    try:
        without = merge_tar_parts(copies[0])
    finally:
        gone.rename(images)
    assert merge_tar_parts(copies[1], data=images) == without
    assert all(
        (copies[1] / name).read_bytes() == (copies[0] / name).read_bytes() for name in ("manifest.json", "samples.npy", "report.json")
    )


def test_a_damaged_table_of_a_part_is_reported(parts: Path) -> None:
    table = parts / "part-00001-of-00003.npz"
    whole = table.read_bytes()
    other = (parts / "part-00000-of-00003.npz").read_bytes()
    for damaged, says in ((whole[:-100], "not the table of a part"), (b"", "not the table of a part"), (other, "each of 50 once")):
        table.write_bytes(damaged)
        with pytest.raises(UserError, match=says):
            merge_tar_parts(parts)
    table.unlink()
    with pytest.raises(UserError, match=r"part-00001-of-00003.npz: not the table of a part .*convert that part again"):
        merge_tar_parts(parts)
    assert not (parts / "manifest.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.unlink(), r"shard-00001-of-00003-00000.tar: missing; remove .*part-00001-of-00003.json and convert that part"),
        (lambda shard: shard.with_suffix(".idx").unlink(), r"shard-00001-of-00003-00000.idx: missing"),
        (lambda shard: os.truncate(shard, 1024), r"00000.tar: 1,024 bytes, part-00001-of-00003.json says [\d,]+ \(cut or replaced\)"),
    ],
)
def test_a_merge_refuses_missing_and_cut_shards_and_keeps_the_descriptions(
    damage: Callable[[Path], None], message: str, images: Path, parts: Path
) -> None:
    damage(parts / "shard-00001-of-00003-00000.tar")
    with pytest.raises(UserError, match=message):
        merge_tar_parts(parts)
    assert not (parts / "manifest.json").exists()
    (parts / "part-00001-of-00003.json").unlink()
    write_tar_part(images, out=parts, part=Part(1, 3), workers=1, seed=SEED)
    assert merge_tar_parts(parts).num_samples == NUM - 3


@pytest.mark.parametrize("line", ['{"index": 99, "outcome": "noted", "reason": "x", "detail": ""}', "{}", "[", '{"index": 0}', "1"])
def test_damaged_notes_of_a_part_are_reported(line: str, parts: Path) -> None:
    notes = parts / "part-00001-of-00003.jsonl"
    notes.write_text(line)
    with pytest.raises(UserError, match=r"part-00001-of-00003.jsonl: damaged \(.*\); remove .* and convert that part again"):
        merge_tar_parts(parts)
    notes.unlink()
    with pytest.raises(UserError, match=r"part-00001-of-00003.jsonl: missing; remove .* and convert that part again"):
        merge_tar_parts(parts)


def test_a_merge_killed_while_removing_the_parts_descriptions_completes_when_repeated(parts: Path, tmp_path: Path) -> None:
    before = shutil.copytree(parts, tmp_path / "before")
    merged = merge_tar_parts(parts)
    names = sorted(path.name for path in parts.iterdir())
    for left in ("part-00001-of-00003.json", "part-00002-of-00003.json", "part-00002-of-00003.npz"):
        shutil.copy(before / left, parts)
    assert merge_tar_parts(parts) == merged
    assert sorted(path.name for path in parts.iterdir()) == names


def test_the_merge_command_says_what_has_no_effect_and_what_is_missing(parts: Path) -> None:
    for options, says in (
        (["--merge", "--quality", "80"], "--quality: has no effect with --merge"),
        (["--merge", "--devkit", "x.tar.gz"], "--devkit: describes what was converted; give that with --data"),
        (["--merge", "--shard", "0/3"], "--merge does not go with --shard; run it by itself"),
        ([], "--data: missing"),
    ):
        ended = run_here("to_dali.py", "--out", parts, *options)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith(f"fastbyol: error: {says}")
    merged = run_here("to_dali.py", "--out", parts, "--merge")
    assert (merged.returncode, merged.stderr) == (0, "")
    assert f"{parts}: 47 images of 3 classes, 3 shards" in merged.stdout


def test_a_part_whose_number_is_beyond_their_count_is_named(parts: Path) -> None:
    shutil.copy(parts / "part-00002-of-00003.json", parts / "part-00009-of-00003.json")
    with pytest.raises(UserError, match=r"part-00009-of-00003.json: there is no such part of 3; remove it, then merge"):
        merge_tar_parts(parts)


def test_a_complete_folder_accepts_no_further_part(images: Path, parts: Path) -> None:
    merge_tar_parts(parts)
    with pytest.raises(UserError, match="holds a complete data set already"):
        write_tar_part(images, out=parts, part=Part(0, 3), workers=1)
    with pytest.raises(UserError, match="is merged already"):
        merge_tar_parts(parts)


def test_more_parts_than_images_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"part 0 of 99: {NUM} images are too few for so many parts; take fewer"):
        write_tar_part(images, out=tmp_path / "parts", part=Part(0, 99), workers=1)


def test_a_part_waits_for_the_process_that_writes_it_if_it_is_told_to(images: Path, tmp_path: Path) -> None:
    """As for the process of a node that Ray has given up: it may go on for a moment."""
    (tmp_path / "parts").mkdir()
    held = locked_file(tmp_path / "parts" / ".part-00000-of-00001.partial" / "lock")
    with pytest.raises(UserError, match="another conversion is writing it at this moment"):
        write_tar_part(images, out=tmp_path / "parts", part=Part(0, 1), workers=1)
    release = threading.Timer(0.5, os.close, [held])
    release.start()
    shards = write_tar_part(images, out=tmp_path / "parts", part=Part(0, 1), workers=1, options=ConversionOptions(patience_s=60.0))
    release.join()
    assert sum(shard.samples for shard in shards) == NUM - 3


def _array(number: int, *, first: int = 0, last: int = 2, count: int = 3) -> dict[str, str]:
    """Returns the variables of one task of a SLURM array, as SLURM 22.05 sets them where --ntasks is given."""
    array = {"ID": number, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()} | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


def test_each_task_of_a_slurm_array_takes_the_part_of_its_number() -> None:
    assert [parse_part("auto", option="--shard", environment=_array(number)) for number in range(3)] == [
        Part(number, 3) for number in range(3)
    ]
    assert parse_part("auto", option="--shard", environment=_array(2) | {"RANK": "0", "WORLD_SIZE": "2"}) == Part(0, 2)


@pytest.mark.parametrize(
    "environment", [_array(1, first=1, last=3), _array(4, last=4), _array(2, first=2, count=1), _array(0) | {"SLURM_NTASKS": "2"}]
)
def test_other_slurm_arrays_are_refused_instead_of_leaving_parts_out(environment: dict[str, str]) -> None:
    with pytest.raises(
        UserError, match=r"--shard auto: this SLURM array has . tasks from . to ., of . processes each; submit it with --array=0-N"
    ):
        parse_part("auto", option="--shard", environment=environment)
