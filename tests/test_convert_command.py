"""`python -m fastbyol convert` writes the format that --to or the name of --out says, and refuses options that this format does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.__main__ import main


@pytest.mark.parametrize(
    ("options", "out", "made"),
    [
        ([], "x.beton", "x.beton.json"),
        (["--to", "ffcv"], "y.beton", "y.beton.json"),
        ([], "x", "x/manifest.json"),
        (["--to", "dali"], "z.beton", "z.beton/manifest.json"),
    ],
)
def test_the_format_is_that_of_to_or_of_the_name(options: list[str], out: str, made: str, image_folder: Path, tmp_path: Path) -> None:
    main(["convert", "--data", str(image_folder), "--out", str(tmp_path / out), "--workers", "1", *options])
    assert (tmp_path / made).is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.beton", "--shard-mb", "16"], "--shard-mb: has no effect on a .beton; leave it out, or --to dali"),
        (["--out", "x.beton", "--merge"], "--merge: has no effect on a .beton; leave it out, or --to dali"),
        (["--out", "x", "--raw"], "--raw: has no effect on tar shards; leave it out, or --to ffcv"),
        (["--out", "x", "--shuffle-seed", "1"], "--shuffle-seed: has no effect on tar shards; leave it out, or --to ffcv"),
        (["--out", "x", "--to", "zip"], "invalid choice: 'zip'"),
    ],
)
def test_options_of_the_other_format_are_refused(
    options: list[str], said: str, image_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--data", str(image_folder), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("x.beton", "--data: missing; give the images to convert"),
        ("x", "--data: missing; give the images to convert (only --merge needs none)"),
    ],
)
def test_images_are_asked_for(out: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--out", out])
    assert (ended.value.code, capsys.readouterr().err) == (2, f"fastbyol: error: {said}\n")
