"""Settings for a user's own images: what a sample shows, what follows from it, and the file that training takes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fastbyol.__main__ import main
from fastbyol.config.schema import TrainConfig
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.inspection.sample import Sample, look_at, near_duplicates
from fastbyol.run.checkpoint import checkpoint_steps
from fastbyol.run.command_line import parse_train_config
from fastbyol.train import main as train
from fastbyol.tuning.stepper import Pace
from fastbyol.tuning.suggestion import fit_hours, rates_at_batch, suggest
from tests.images import encoded, smooth_image, write_files


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 coloured JPEGs in one folder, without labels."""
    files = {f"{seed}.jpg": smooth_image(seed, 50, 40 + seed % 20) for seed in range(40)}
    return write_files(tmp_path_factory.mktemp("colour"), files)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 grey images, half of them stored with three channels."""
    files = {f"{seed}.jpg": smooth_image(seed, 40, 48).convert("L").convert("L" if seed % 2 else "RGB") for seed in range(40)}
    return write_files(tmp_path_factory.mktemp("grey"), files)


def _suggested(folder: Path, out: Path, *options: str) -> str:
    main(["suggest", "--data", str(folder), "--devices", "0", "--out", str(out), *options])
    return out.read_text()


def _sample(**changes: object) -> Sample:
    seen = {"images": 4000, "class_names": (), "looked_at": 1000, "unreadable": (), "short_side": 300, "grey": 0.0, "near_duplicates": 0.0}
    return Sample(**{**seen, **changes})  # type: ignore[arg-type]


def test_damaged_images_are_named_and_too_many_are_refused(colour, tmp_path, capsys):
    folder = shutil.copytree(colour, tmp_path / "images")
    images = sorted(folder.rglob("*.jpg"))
    for image in images[:2]:
        image.write_bytes(b"")
    _suggested(folder, tmp_path / "mine.yaml")
    names = ", ".join(str(image.relative_to(folder)) for image in images[:2])
    assert f"2 of the images looked at do not decode, and training leaves them out: {names}." in capsys.readouterr().out
    for image in images[:21]:
        image.write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        _suggested(folder, tmp_path / "other.yaml")
    assert ended.value.code == 2
    assert "21 of 40 images that were looked at do not decode (" in capsys.readouterr().err
    assert not (tmp_path / "other.yaml").exists()


def test_damaged_converted_data_are_for_verify(colour, tmp_path, capsys):
    write_beton(colour, out=tmp_path / "x.beton", workers=1)
    whole = bytearray((tmp_path / "x.beton").read_bytes())
    first = whole.find(b"\xff\xd8\xff")
    whole[first + 3 : first + 300] = bytes(297)
    (tmp_path / "x.beton").write_bytes(whole)
    with pytest.raises(SystemExit):
        _suggested(tmp_path / "x.beton", tmp_path / "mine.yaml")
    assert re.search(
        r"error: --data .*x.beton: image \d+ does not decode; python -m fastbyol verify .*x.beton names every fault\n",
        capsys.readouterr().err,
    )


def test_40_flat_images_get_a_file_that_training_takes_with_a_reason_on_each_line(colour, tmp_path, capsys):
    text = _suggested(colour, tmp_path / "mine.yaml")
    said = capsys.readouterr().out
    assert "40 images, no labels; of 40 looked at: in colour" in said
    assert "Few images: 40." in said
    assert "cannot be told from the images: 0.5 if a mirrored image still shows the same thing" in said
    assert said.splitlines()[-1] == f"next: python -m fastbyol train --config {tmp_path}/mine.yaml --out runs/mine"
    settings = [line for line in text.splitlines() if not line.startswith("#") and not line.endswith(":")]
    assert len(settings) > 10
    assert all(re.search(r"\S  # \S", line) for line in settings), "every setting has its reason"
    assert "1 devices" not in text
    train(
        [
            "--config",
            str(tmp_path / "mine.yaml"),
            "--steps",
            "2",
            "--optim.warmup_steps",
            "0",
            "--data.workers",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert checkpoint_steps(tmp_path / "run") == [2]


def test_grey_images_get_no_colour_jitter_and_coloured_ones_do(colour, grey, tmp_path):
    views = [yaml.safe_load(_suggested(folder, tmp_path / f"{folder.name}.yaml"))["views"]["view1"] for folder in (colour, grey)]
    assert "saturation" not in views[0]
    assert views[0]["jitter_p"] > 0
    assert [views[1][name] for name in ("saturation", "hue", "gray_p")] == [0, 0, 0]
    assert look_at(str(grey)).grey == 1
    assert look_at(str(colour)).grey == 0


def test_a_sample_shows_the_same_whatever_the_images_are_stored_in(data_paths, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(data_paths["folder"].rglob("*.jpg"))))
    seen = {name: look_at(str(path)) for name, path in data_paths.items()}
    assert seen["ffcv"] == seen["folder"]
    assert seen["dali"] == seen["folder"]
    assert seen["folder"].class_names == ("ant", "bee", "cat")
    assert replace(look_at(str(tmp_path / "list.txt")), class_names=seen["folder"].class_names) == seen["folder"]
    assert seen["folder"].grey == pytest.approx(1 / 25)


def test_the_same_picture_in_another_size_or_quality_is_a_near_duplicate_and_others_are_not(tmp_path):
    pictures = [smooth_image(seed, 60, 80) for seed in range(6)]
    flat = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue", "black", "white")]
    copies = {"a.jpg": encoded(pictures[0], quality=60), "b.png": encoded(pictures[1].resize((160, 120)), "PNG")}
    folder = write_files(tmp_path, {f"{i}.png": image for i, image in enumerate([*pictures, *flat])} | copies)
    assert look_at(str(folder)).near_duplicates == pytest.approx(2 / 12)
    mirrored = np.asarray(pictures[0].resize((9, 9)), dtype=np.float32)
    assert near_duplicates([mirrored, mirrored[:, ::-1], mirrored + 0.1]) == [False, False, True]


def test_the_rates_follow_the_batch_as_in_appendix_g():
    assert rates_at_batch(512, planned=4096, base_lr=0.2, tau_base=0.996) == (0.4, pytest.approx(0.9995, abs=2e-6))
    assert rates_at_batch(256, planned=256, base_lr=2.0, tau_base=0.996) == (2.0, pytest.approx(0.996))


@pytest.mark.parametrize(
    ("images", "gpus", "preset", "batch"),
    [(4000, 0, "own_tiny", 64), (4000, 1, "own_small", 256), (200, 1, "own_small", 25), (50_000, 8, "own", 512), (60_000, 3, "own", 510),
     (2_000_000, 16, "own_large", 4096)],
)  # fmt: skip
def test_the_preset_and_the_batch_follow_from_the_number_of_images_and_devices(images, gpus, preset, batch):
    suggestion = suggest("images", _sample(images=images), gpus=gpus)
    assert (suggestion.preset, suggestion.settings["global_batch"]) == (preset, batch)
    assert isinstance(suggestion.config(), TrainConfig)
    assert batch % max(1, gpus) == 0


def test_small_images_keep_their_size_on_a_gpu_and_the_crop_shows_more_of_them(tmp_path):
    config = suggest("images", _sample(short_side=40), gpus=1).config()
    assert (config.views.size_px, config.model.stem, config.views.view2.crop_area[0]) == (32, "small", 0.2)
    assert config.views.view2.solarize_p == parse_train_config(["--preset", "own_small"], usage="").views.view2.solarize_p
    assert suggest("images", _sample(short_side=110), gpus=1).config().views.size_px == 96


def test_hours_become_as_many_steps_as_this_machine_takes_in_them(colour, tmp_path, monkeypatch):
    monkeypatch.setattr("fastbyol.tuning.suggestion.TIMED_S", 1.0)
    values = yaml.safe_load(_suggested(colour, tmp_path / "mine.yaml", "--hours", "2"))
    seconds = float(re.search(r"at ([\d.e+-]+) s a step", (tmp_path / "mine.yaml").read_text()).group(1))  # type: ignore[union-attr]
    assert values["steps"] == pytest.approx(2 * 3600 / seconds, rel=0.01)
    assert values["optim"]["warmup_steps"] == pytest.approx(values["steps"] * 0.05, abs=1)


def test_hours_of_a_step_that_does_not_fit_into_memory_end_in_one_line(colour, tmp_path, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastbyol.tuning.stepper.train_step", full)
    with pytest.raises(SystemExit) as ended:
        _suggested(colour, tmp_path / "mine.yaml", "--hours", "2")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(
        r"--hours 2: a step of 5 images of 32 px cannot be timed on one device \(out of memory\); .*tune finds the rank_batch", said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda:0")])
def test_hours_are_timed_on_the_device_of_the_plan(gpus, device, monkeypatch):
    timed = []

    class Loader:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

    class Stepper:
        def __init__(self, config, process) -> None:
            timed.append(str(process.device))

        def fed_by(self, loader, paces):
            return lambda seconds: paces.append(Pace(1000.0, 0.0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("fastbyol.data.build.build_run_loader", lambda *_, **__: Loader())
    monkeypatch.setattr("fastbyol.tuning.stepper.Stepper", Stepper)
    fit_hours(suggest("images", _sample(), gpus=gpus), 1.0, gpus=gpus, announce=lambda _: None)
    assert timed == [device]


@pytest.mark.parametrize(
    ("images", "gpus", "short_side", "remarked"),
    [(2_000_000, 1, 300, True), (2_000_000, 16, 300, False), (60_000, 1, 300, True), (60_000, 8, 300, False), (4000, 1, 300, False),
     (4000, 0, 300, False), (60_000, 1, 32, False), (60_000, 1, 80, True)],
)  # fmt: skip
def test_a_batch_that_one_gpu_may_not_hold_is_remarked(images, gpus, short_side, remarked):
    remarks = suggest("images", _sample(images=images, short_side=short_side), gpus=gpus).remarks
    assert (
        any("may not fit into a GPU's memory: python -m fastbyol tune finds the largest rank_batch" in each for each in remarks) == remarked
    )


@pytest.mark.parametrize(
    ("gpus", "command"),
    [
        (8, "torchrun --nproc-per-node 8 -m fastbyol train --config my.yaml --out runs/mine"),
        (
            16,
            "on each of 2 machines with 8 GPUs, HOST being one of them: NODES=2 GPUS=8 HOST=HOST bash scripts/several_nodes.sh --config my.yaml",
        ),
        (12, "on each of 2 machines with 6 GPUs"),
    ],
)
def test_more_ranks_than_a_machine_has_gpus_are_started_on_several(gpus, command):
    assert suggest("images", _sample(images=2_000_000), gpus=gpus).command(Path("my.yaml")).startswith(command)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "none"], "none: no such file or folder"),
        (["--data", "{empty}"], "has no images|no image"),
        (["--data", "{broken}"], "none of 3 images decodes: "),
        (["--data", "{one}"], "1 image for 1 device; BYOL needs some hundreds"),
        (["--data", "{colour}", "--devices", "-1"], "--devices = -1: must be"),
        (["--data", "{colour}", "--devices", "100"], "40 images for 100 devices"),
        (["--data", "{colour}", "--hours", "0"], "--hours = 0.0: must be"),
        (
            ["--data", "{colour}", "--devices", "2", "--hours", "1"],
            "--hours: steps of a GPU cannot be timed on this machine, which has none",
        ),
        (["--data", "{colour}", "--out", "{empty}/x.txt"], "must be a file that ends in .yaml"),
        (["--data", "{colour}", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_mistakes_end_in_one_line(arguments, says, colour, tmp_path, capsys):
    write_files(tmp_path, {f"broken/{i}.jpg": b"\xff\xd8 no image" for i in range(3)} | {"one/a.jpg": smooth_image(0, 40, 40)})
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("empty", "broken", "one")} | {"colour": colour}
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "new.yaml")]
    with pytest.raises(SystemExit) as caught:
        main(["suggest", *(argument.format(**places) for argument in arguments), *out])
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("...")]
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines
    assert not (tmp_path / "new.yaml").exists()
