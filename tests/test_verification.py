"""Tests of verification: every changed byte and every missing, swapped or edited file is reported, with its image if possible."""

from __future__ import annotations

import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from fastbyol.__main__ import main
from fastbyol.config.errors import UserError
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.encode import EncodeSettings
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.formats.beton import FIELD, HEADER, read_beton
from fastbyol.data.formats.manifest import Shard
from fastbyol.data.formats.tar_shards import read_tar_shards
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inspection import verification
from fastbyol.data.inspection.findings import KEPT_FAULTS, Fault, Findings
from fastbyol.data.inspection.verification import verify
from tests.commands import run_here
from tests.images import smooth_image

NOT_OF_JPEGS = "shows another picture than its original"


@pytest.fixture
def beton_copy(beton: Path, tmp_path: Path) -> Path:
    shutil.copy(f"{beton}.json", tmp_path / "images.beton.json")
    return Path(shutil.copy(beton, tmp_path / "images.beton"))


@pytest.fixture
def shards(tar_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tar_folder, tmp_path / "shards"))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of two shards with three images each."""
    folder = tmp_path_factory.mktemp("noise") / "data" / "class"
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(2).integers(0, 256, (6, 600, 600, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    write_tar_shards(folder.parent, out=folder.parent.parent / "shards", workers=1, shard_mib=1)
    return folder.parent.parent / "shards"


def told(findings: Findings) -> str:
    return "\n".join(map(str, findings.faults))


def images_named(findings: Findings) -> set[int]:
    return {fault.image for fault in findings.faults if fault.image >= 0}


def flip(path: Path, at: int, *, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


# ---- no faults


def test_converted_data_has_no_faults_even_after_renaming(beton_copy: Path, shards: Path, image_folder: Path) -> None:
    renamed = beton_copy.with_name("other.beton")
    beton_copy.rename(renamed)
    Path(f"{beton_copy}.json").rename(f"{renamed}.json")
    for path in (renamed, shards):
        for originals in (None, list_image_folder(image_folder)):
            findings = verify(path, originals=originals, workers=2)
            assert (findings.num_images, findings.num_classes, findings.faults, findings.notes) == (25, 3, [], [])


def odd_folder(root: Path) -> Path:
    """Returns a folder of images that are kept, transcoded and dropped."""
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            smooth_image(50 * label + i, 40 + i, 64).save(root / name / f"{i:02d}.jpg", quality=90)
        (root / name / "05a.jpg").write_bytes(b"no image")
    smooth_image(7, 30, 50).convert("CMYK").save(root / "a" / "00a.jpg")
    smooth_image(8, 50, 30).save(root / "b" / "00a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth_image(9, 30, 50).save(root / "b" / "00b.jpg", exif=exif)
    return root


@pytest.mark.parametrize("settings", [{}, {"max_side_px": 40, "quality": 50, "exif": "apply"}, {"raw_fraction": 0.5}])
def test_dropped_transcoded_resized_and_shuffled_images_are_found_in_the_source(settings: dict[str, float], tmp_path: Path) -> None:
    source = odd_folder(tmp_path / "source")
    options = ConversionOptions(encode=EncodeSettings(**settings))  # type: ignore[arg-type]
    write_beton(source, out=tmp_path / "shuffled.beton", workers=1, options=options, shuffle_seed=5)
    outputs = [tmp_path / "shuffled.beton"]
    if not settings:
        write_tar_shards(source, out=tmp_path / "shards", workers=1, options=options)
        outputs.append(tmp_path / "shards")
    for out in outputs:
        findings = verify(out, originals=list_image_folder(source), workers=1)
        assert (findings.num_images, told(findings)) == (27, "")


# ---- a byte has changed


def test_a_changed_byte_of_an_image_names_the_image(beton_copy: Path) -> None:
    table = read_beton(beton_copy)
    rng = random.Random(3)
    for index in rng.sample(range(25), 8):
        at, bit = int(table.offset[index]) + rng.randrange(int(table.size[index])), rng.randrange(8)
        flip(beton_copy, at, bit=bit)
        findings = verify(beton_copy, workers=1)
        flip(beton_copy, at, bit=bit)
        assert images_named(findings) == {index}
        assert "images.beton: its sha256 is not the manifest's" in told(findings)


def every_member(tar: Path) -> list[tuple[int, int, int, int]]:
    """Returns (sample, offset of the header, offset of the content, size) of every member."""
    with tarfile.open(tar) as file:
        return [(int(member.name[:8]), member.offset, member.offset_data, member.size) for member in file]


def test_a_changed_byte_of_any_member_of_a_shard_names_the_image(shards: Path) -> None:
    tar = shards / "shard-00000.tar"
    whole = tar.read_bytes()
    rng = random.Random(4)
    members = every_member(tar)
    for sample, header, content, size in rng.sample(members, 24):
        for at in (content + rng.randrange(size), header + rng.randrange(100)):
            flip(tar, at, bit=rng.randrange(7))
            findings = verify(shards, workers=1)
            tar.write_bytes(whole)
            assert sample in images_named(findings), (at, told(findings))
            assert "shard-00000.tar: its sha256" in told(findings)


def test_a_changed_byte_anywhere_in_any_file_is_noticed_and_named(beton_copy: Path, shards: Path) -> None:
    rng = random.Random(5)
    for root, files in ((beton_copy, (beton_copy, Path(f"{beton_copy}.json"))), (shards, tuple(shards.glob("[!r]*")))):
        for file in files:
            whole = file.read_bytes()
            for at in rng.choices(range(len(whole)), k=25):
                if whole[at : at + 1].isspace():
                    continue  # white space in JSON and in the table's header says nothing
                flip(file, at, bit=rng.randrange(7))
                findings = verify(root, workers=1)
                file.write_bytes(whole)
                assert findings.num_faults, (file.name, at)
                assert file.name in told(findings) or root.name in told(findings)
    assert verify(beton_copy).num_faults == verify(shards).num_faults == 0


def test_a_changed_byte_of_padding_or_of_the_tables_names_the_file(beton_copy: Path, shards: Path) -> None:
    samples_at = HEADER.itemsize + 2 * FIELD.itemsize
    for at in (4, HEADER.itemsize + 600, samples_at + 2, beton_copy.stat().st_size - 30):
        whole = beton_copy.read_bytes()
        flip(beton_copy, at, bit=3)
        assert "images.beton: its sha256 is not the manifest's" in told(verify(beton_copy, workers=1))
        beton_copy.write_bytes(whole)
    tar = shards / "shard-00000.tar"
    _, _, content, size = next(member for member in every_member(tar) if member[3] % 512)
    flip(tar, content + size)
    findings = verify(shards, workers=1)
    assert [fault.file for fault in findings.faults] == [str(tar)]


# ---- parts are missing, swapped, edited


@pytest.mark.parametrize("keep", [0, 20, 5000, 20_000, -2000, -100, -1])
def test_a_truncated_beton_is_reported(keep: int, beton_copy: Path) -> None:
    whole, table = beton_copy.read_bytes(), read_beton(beton_copy)
    beton_copy.write_bytes(whole[:keep])
    findings = verify(beton_copy, workers=1)
    assert f"images.beton: has {len(whole[:keep]):,} bytes, the manifest says {len(whole)}" in told(findings)
    lost = np.flatnonzero(table.offset >= len(whole[:keep]))
    if keep > 5000 and len(lost):
        assert f"{len(lost)} images, the first of them image {lost[0]}, lie beyond its end" in told(findings)


def test_a_truncated_shard_names_the_lost_images(shards: Path) -> None:
    tar = shards / "shard-00000.tar"
    whole = tar.read_bytes()
    _, _, content, _ = every_member(tar)[-9]
    tar.write_bytes(whole[: content + 5])
    lost = {sample for sample, _, at, size in every_member_of(whole, shards) if size > 8 and at + size > content + 5}
    findings = verify(shards, workers=1)
    assert images_named(findings) >= lost
    assert len(lost) == 3


def every_member_of(content: bytes, folder: Path) -> list[tuple[int, int, int, int]]:
    path = folder.parent / "whole.tar"
    path.write_bytes(content)
    return every_member(path)


def test_two_swapped_shards_are_both_reported(many_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(many_shards, tmp_path / "shards"))
    for suffix in ("tar", "idx"):
        first, second = folder / f"shard-00000.{suffix}", folder / f"shard-00001.{suffix}"
        first.rename(folder / "x")
        second.rename(first)
        (folder / "x").rename(second)
    findings = verify(folder, workers=2)
    for name, other in (("shard-00000.tar", "shard-00001.tar"), ("shard-00001.tar", "shard-00000.tar")):
        about = [fault.what for fault in findings.faults if name in fault.file and fault.image == -1]
        assert f"is what the manifest calls {other}: renamed, or swapped with it" in about
        assert len(about) == 2
    assert images_named(findings) == set(range(6))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard-00001.tar").unlink(), "shard-00001.tar: missing, although the manifest names it"),
        (lambda folder: shutil.copy(folder / "shard-00001.tar", folder / "shard-00007.tar"), "shard-00007.tar: is not in the manifest"),
        (lambda folder: (folder / "shard-00001.idx").unlink(), r"its index shard-00001.idx cannot be read \(No such file"),
        (lambda folder: (folder / "shard-00001.idx").write_text("v1.2 3\n"), "its index shard-00001.idx disagrees with it in line 2"),
        (lambda folder: (folder / "samples.npy").unlink(), "samples.npy: no readable sample table"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: not a manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), ""),
    ],
)
def test_missing_and_foreign_files_are_named(damage: Callable[[Path], object], message: str, many_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(many_shards, tmp_path / "shards"))
    damage(folder)
    findings = verify(folder, workers=1)
    if message:
        assert findings.num_faults
    assert re.search(message, told(findings))
    assert bool(findings.notes) == (not message or "not a manifest" in message)


def test_an_edit_of_any_field_of_the_manifest_is_reported(beton_copy: Path, shards: Path) -> None:
    for root, path in ((beton_copy, Path(f"{beton_copy}.json")), (shards, shards / "manifest.json")):
        whole = path.read_text()
        for name in json.loads(whole):
            fields = json.loads(whole)
            fields[name] = edited(fields[name])
            path.write_text(json.dumps(fields))
            findings = verify(root, workers=1)
            assert path.name in told(findings) or root.name in told(findings), name
            assert findings.num_faults, name
        path.write_text(whole)


def test_a_manifest_with_values_of_other_types_is_reported(beton_copy: Path, shards: Path) -> None:
    for root, path in ((beton_copy, Path(f"{beton_copy}.json")), (shards, shards / "manifest.json")):
        whole = path.read_text()
        for name in json.loads(whole):
            for value in (None, [], {}, "x", 3, [3], ["x"], [{}]):
                path.write_text(json.dumps({**json.loads(whole), name: value}))
                assert verify(root, workers=1).num_faults or json.loads(whole)[name] == value, (name, value)
        path.write_text(whole)


def edited(value: object) -> object:
    """Returns another value of the same type."""
    if isinstance(value, dict):
        name = next(iter(value))
        return {**value, name: edited(value[name])}
    if isinstance(value, list):
        return [edited(value[0]), *value[1:]] if value else [0]
    return value + 1 if isinstance(value, int | float) else f"{value}x"


# ---- what the loaders check when they open the data


def test_a_changed_label_is_noticed_at_open(beton_copy: Path, shards: Path) -> None:
    label_at = HEADER.itemsize + 2 * FIELD.itemsize + 16  # of image 0: behind its size and place
    for bit, message in ((0, "other numbers of images per class"), (7, "holds the label 128, its manifest names 3 classes")):
        flip(beton_copy, label_at, bit=bit)
        with pytest.raises(UserError, match=message):
            FfcvSource(beton_copy)
        flip(beton_copy, label_at, bit=bit)
    FfcvSource(beton_copy).close()
    table = np.load(shards / "samples.npy")
    table["label"][3] = 2
    np.save(shards / "samples.npy", table)
    with pytest.raises(UserError, match=r"samples.npy: has other numbers of images per class"):
        read_tar_shards(shards)


def test_a_beton_with_any_changed_byte_in_its_tables_opens_or_is_a_one_line_error(beton_copy: Path, shards: Path) -> None:
    rng = random.Random(6)
    for path, end, opened in (
        (beton_copy, HEADER.itemsize + 2 * FIELD.itemsize + 25 * 24, lambda: read_beton(beton_copy)),
        (shards / "samples.npy", 400, lambda: read_tar_shards(shards)),
    ):
        whole = path.read_bytes()
        outcomes = set()
        for at in rng.sample(range(end), 200):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            try:
                opened()
                outcomes.add("opened")
            except UserError:
                outcomes.add("refused")
        path.write_bytes(whole)
        assert outcomes == {"opened", "refused"}


# ---- foreign data


def test_a_beton_of_stock_ffcv_is_decoded_with_a_note_that_it_has_no_checksums(beton_copy: Path) -> None:
    Path(f"{beton_copy}.json").unlink()
    content = bytearray(beton_copy.read_bytes())
    content[content.index(b"fastbyol")] = 0  # what RGBImageField of ffcv has there
    beton_copy.write_bytes(content)
    findings = verify(beton_copy, workers=1)
    assert (findings.num_images, findings.faults, len(findings.notes)) == (25, [], 2)
    table = read_beton(beton_copy)
    content[int(table.offset[7]) : int(table.offset[7]) + 300] = bytes(300)
    beton_copy.write_bytes(content)
    assert images_named(verify(beton_copy, workers=1)) == {7}


def test_tars_written_by_other_tools_are_decoded_and_their_indices_checked(tmp_path: Path) -> None:
    folder = tmp_path / "wds"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for i in range(3):
                for name, data in ((f"x/{i}.jpg", (tmp_path / "i.jpg")), (f"x/{i}.cls", tmp_path / "label")):
                    smooth_image(i, 20, 30).save(tmp_path / "i.jpg")
                    (tmp_path / "label").write_bytes(b"1")
                    tar.add(data, name)
    findings = verify(folder, workers=1)
    assert (findings.num_images, findings.faults) == (6, [])
    (folder / "1.idx").write_text("v1.2 3\nnonsense\n")
    content = bytearray((folder / "0.tar").read_bytes())
    at = content.index(b"x/1.jpg") + 512
    content[at : at + 200] = bytes(200)
    (folder / "0.tar").write_bytes(content)
    findings = verify(folder, workers=1)
    assert images_named(findings) == {1}
    assert "1.tar: its index 1.idx disagrees with it in line 2 (x/0.cls)" in told(findings)


# ---- the source


def test_an_original_that_was_replaced_by_another_picture_is_named(image_folder: Path, beton: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(image_folder, tmp_path / "source"))
    names = list_image_folder(source).files
    shutil.copy(source / names[3], source / names[5])
    smooth_image(999, 40, 60).save(source / names[20])
    findings = verify(beton, originals=list_image_folder(source), workers=1)
    assert images_named(findings) == {5, 20}
    assert all(NOT_OF_JPEGS in fault.what for fault in findings.faults)
    assert "is not as it was" in findings.notes[0]
    (source / names[9]).write_bytes(b"")
    assert f"its original {names[9]} does not decode" in told(verify(beton, originals=list_image_folder(source), workers=1))


def test_a_source_with_more_or_fewer_images_is_compared_by_content(image_folder: Path, tar_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(image_folder, tmp_path / "source"))
    names = list_image_folder(source).files
    (source / names[11]).unlink()
    findings = verify(tar_folder, originals=list_image_folder(source), workers=1)
    assert images_named(findings) == {11}
    shutil.copy(image_folder / names[11], source / names[11])
    smooth_image(5, 10, 10).save(source / "ant" / "more.jpg")
    assert "the source's ant/more.jpg is not in it" in told(verify(tar_folder, originals=list_image_folder(source), workers=1))


def test_other_labels_in_the_source_are_named(image_folder: Path, beton: Path, tmp_path: Path) -> None:
    listing = list_image_folder(image_folder)
    (tmp_path / "labels.csv").write_text("".join(f"{name},{'bee' if name == listing.files[4] else name[:3]}\n" for name in listing.files))
    relabelled = list_images(image_folder, labels=tmp_path / "labels.csv")
    assert images_named(verify(beton, originals=relabelled, workers=1)) >= {4}
    renamed = Path(shutil.copytree(image_folder, tmp_path / "renamed"))
    (renamed / "ant").rename(renamed / "aaa")
    assert "names other classes than the source" in told(verify(beton, originals=list_image_folder(renamed), workers=1))


# ---- the command


def test_the_exit_code_tells_if_there_are_faults(beton_copy: Path, image_folder: Path) -> None:
    done = run_here("verify.py", beton_copy, "--source", image_folder)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done
    assert done.stdout.startswith(f"{beton_copy}: all is well: 25 images of 3 classes")
    content = bytearray(beton_copy.read_bytes())
    for offset in read_beton(beton_copy).offset[:9]:
        content[offset + 5] ^= 1
    beton_copy.write_bytes(content)
    done = run_here("verify.py", beton_copy, "--faults", "4")
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (1, 5, ""), done
    assert f"{beton_copy}: 10 faults, the first 4 shown: 25 images" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.beton"], "none.beton: no such file or folder"),
        ([str(Path(__file__).parent)], "is neither a .beton nor a folder of tar shards"),
        ([str(Path(__file__))], "is neither a .beton nor a folder of tar shards"),
        (["x.beton", "--labels", "y.csv"], "--labels: describes what was converted; give that with --source"),
        (["x.beton", "--workers", "-1"], "workers = -1"),
        ([], "required: PATH"),
    ],
)
def test_nothing_to_verify_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run_here("verify.py", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert message in done.stderr


def test_further_faults_are_counted_but_not_kept() -> None:
    findings = Findings()
    findings.add(fault for _ in range(3) for fault in [("f", 1, "x")] * KEPT_FAULTS)  # type: ignore[misc]
    assert (findings.num_faults, len(findings.faults)) == (3 * KEPT_FAULTS, KEPT_FAULTS)


@pytest.mark.parametrize("asked", [KEPT_FAULTS - 1, KEPT_FAULTS + 1, 2 * KEPT_FAULTS])
def test_the_command_says_how_many_faults_it_shows(
    asked: int, beton_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = Findings()
    findings.add(Fault("f", "x", number) for number in range(KEPT_FAULTS + 500))
    monkeypatch.setattr(verification, "verify", lambda *_, **__: findings)
    with pytest.raises(SystemExit):
        main(["verify", str(beton_copy), "--faults", str(asked)])
    *faults, last = capsys.readouterr().out.splitlines()
    assert len(faults) == min(asked, KEPT_FAULTS)
    assert f"1500 faults, the first {len(faults):,} shown:" in last.replace("1,500", "1500")


def test_a_shard_that_is_removed_while_it_is_verified_is_a_fault(tmp_path: Path) -> None:
    (fault,) = verification._hash_faults(tmp_path / "gone.tar", Shard("gone.tar", 1, 1, ""), {}, Event())
    assert fault.what == "cannot be read (No such file or directory)"


def test_a_tar_folder_without_images_is_a_fault(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert "no image in its 1 tars" in told(verify(tmp_path, workers=1))
    (tmp_path / "part-00000-of-00002.json").write_text("{}")
    with pytest.raises(UserError, match="holds parts of a conversion on many machines; merge them first"):
        verify(tmp_path)
    with pytest.raises(UserError, match="workers = -1"):
        verify(tmp_path, workers=-1)
