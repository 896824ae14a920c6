"""evaluate segmentation: the paper's network, loss and score, VOC's layout with SBD, what is refused, and the whole command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.views import PAPER
from fastbyol.data.demo.scene_layouts import voc_palette
from fastbyol.evaluation.subjects import set_batchnorm_statistics
from fastbyol.evaluation.tasks import segmentation
from fastbyol.evaluation.tasks.dense.pictures import sample_rows
from fastbyol.evaluation.tasks.dense.trials import rate_at
from fastbyol.evaluation.tasks.dense.voc import VOC_CLASSES, LabelledImage, class_names, labelled_images, voc_folder
from fastbyol.evaluation.tasks.job import Images, Subject
from fastbyol.evaluation.tasks.segmentation import (
    QUICK,
    SegmentationImages,
    SegmentationNetwork,
    SegmentationSettings,
    confusion_of,
    mean_iou,
    pixel_accuracy,
    pixel_loss,
)
from fastbyol.evaluation.tasks.training import TaskStopped
from fastbyol.models import build_encoder
from fastbyol.models.backbone import backbone_of
from tests.dense_jobs import TINY, make_job, scenes, tiny_encoder
from tests.test_report import call

GOLDEN = Path(__file__).parent / "golden"
SMALL = dataclasses.replace(QUICK, steps=4, batch_images=4, test_images=6, head_channels=8, crop_px=32)


# ---- the paper's protocol


def test_the_defaults_are_the_papers_settings() -> None:
    paper = SegmentationSettings()
    assert segmentation.TASKS["segmentation"].versions["paper"] == paper
    # Appendix D.4: R50, conv5 dilated, two 3x3 of 256 channels with dilation 6, train_aug2012 -> val2012.
    assert (paper.train_set, paper.test_set, paper.held_out) == ("train_aug", "val", (2119, 0.08))
    assert (paper.head_channels, paper.head_dilation, paper.scale, paper.crop_px, paper.flip_p) == (256, 6, (0.5, 2.0), 513, 0.5)
    assert (paper.batch_images, paper.weight_decay, paper.steps, paper.drop_at, paper.drop) == (16, 1e-4, 30_000, (0.7, 0.9), 0.1)
    assert np.log10(paper.lrs) == pytest.approx([-3, -2.5, -2, -1.5, -1])
    assert (paper.seeds, paper.test_view, paper.test_images) == (5, "crop", 0)
    assert segmentation.PAPER_ROWS["paper, BYOL ResNet-50"] == {"miou": 76.3}


def test_the_rate_falls_tenfold_at_70_and_90_per_cent() -> None:
    rates = [rate_at(step, base=0.02, total_steps=30_000, drop_at=(0.7, 0.9), drop=0.1) for step in (0, 20_999, 21_000, 26_999, 27_000)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])
    assert rate_at(50, base=1.0, total_steps=1000, drop_at=(), drop=0.1, warmup_steps=100) == pytest.approx(0.5005)


def test_the_network_has_the_papers_head_on_a_torchvision_resnet_at_stride_16() -> None:
    encoder = build_encoder("resnet50")
    theirs = torchvision.models.resnet50().state_dict()
    weights = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    assert encoder.load_state_dict(weights) is not None
    network = SegmentationNetwork(backbone_of(encoder, dilate_last=True), classes=21, channels=256, dilation=6).eval()
    own = network.state_dict()
    assert all(torch.equal(own[f"backbone.encoder.{name}"], value) for name, value in weights.items())
    head = 2048 * 256 * 9 + 2 * 256 + 256 * 256 * 9 + 2 * 256 + 256 * 21 + 21
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + head
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 129, 129)).shape == (1, 21, 9, 9)


# ---- loss and score


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator)
    labels[0, :2], labels[1, 3, 3] = 255, 255
    total, count = 0.0, 0
    for image in range(2):
        for y in range(4):
            for x in range(4):
                if labels[image, y, x] != 255:
                    values = [math.exp(v) for v in logits[image, :, y, x].double().tolist()]
                    total -= math.log(values[labels[image, y, x]] / sum(values))
                    count += 1
    assert count == 23
    assert pixel_loss(logits, labels).item() == pytest.approx(total / count, rel=1e-6)
    assert pixel_loss(logits, torch.full((2, 8, 8), 255)).item() == 0


def test_mean_iou_by_hand_leaves_out_ignored_pixels_and_a_class_that_is_nowhere() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [0, 255, 1, 2]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1], [0, 3, 0, 1]], dtype=torch.uint8)
    confusion = confusion_of(prediction, truth, classes=5).numpy()
    assert confusion.sum() == 7
    # 0: 2 of 4 in either; 1: 2 of 5; 2: in the truth only, 0; 3: predicted on an ignored pixel only, so nowhere; 4: nowhere.
    assert mean_iou(confusion) == pytest.approx((2 / 4 + 2 / 5 + 0) / 3)
    assert pixel_accuracy(confusion) == pytest.approx(4 / 7)
    # A class that is only predicted counts with 0.
    prediction[0, 0] = 4
    assert mean_iou(confusion_of(prediction, truth, classes=5).numpy()) == pytest.approx((1 / 4 + 2 / 5 + 0 + 0) / 4)
    assert math.isnan(mean_iou(np.zeros((3, 3))))


def test_mean_iou_equals_torchmetrics_and_weights_count_images_twice() -> None:
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(1)
    truth, prediction = (torch.randint(0, 6, (5, 16, 16), generator=generator) for _ in range(2))
    truth[:, ::5] = 255
    prediction[0] = truth[0].clamp(max=5)
    confusions = np.stack([confusion_of(a, b, classes=6).numpy() for a, b in zip(prediction, truth, strict=True)])
    metric = MulticlassJaccardIndex(num_classes=6, ignore_index=255)
    assert mean_iou(confusions.sum(axis=0)) == pytest.approx(metric(prediction, truth).item(), rel=1e-5)
    weights = np.array([2.0, 1, 0, 1, 1])
    assert mean_iou(confusions, weights) == pytest.approx(mean_iou(confusions[[0, 0, 1, 3, 4]].sum(axis=0)))


@pytest.mark.parametrize(("encoder_rate", "moves"), [(0.0, False), (0.1, True)])
def test_a_rate_of_0_freezes_the_encoder_with_its_statistics_and_another_scales_its_steps(encoder_rate: float, moves: bool) -> None:
    network = SegmentationNetwork(backbone_of(tiny_encoder(), dilate_last=True), classes=3, channels=4, dilation=1)
    optimizer = segmentation._optimizer(network, dataclasses.replace(SMALL, encoder_rate=encoder_rate))
    assert [group.get("lr_factor", 1.0) for group in optimizer.param_groups] == ([1.0, 0.1] if moves else [1.0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    pixel_loss(network.train()(torch.rand(2, 3, 32, 32)), torch.ones(2, 32, 32).long()).backward()
    optimizer.step()
    changed = {name.split(".")[0] for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"backbone", "head"} if moves else {"head"})


# ---- images


def tree(root: Path, *, names: tuple[str, ...] = ("a", "b"), size: tuple[int, int] = (20, 30)) -> Path:
    """Writes VOC2012's layout with one list, train, and label images whose left half is of class 5, with ignored pixels between."""
    folder = root / "VOCdevkit" / "VOC2012"
    for each in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / each).mkdir(parents=True)
    width = size[1]
    labels = np.zeros(size, dtype=np.uint8)
    labels[:, : width // 2] = 5
    labels[:, width // 2] = 255
    for name in names:
        pixels = np.where((labels == 5)[..., None], np.uint8([250, 20, 20]), np.uint8([20, 20, 250]))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
        save_labels(folder / "SegmentationClass" / f"{name}.png", labels)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def save_labels(path: Path, labels: np.ndarray) -> None:
    image = Image.fromarray(labels, mode="P")
    image.putpalette(voc_palette().tobytes())
    image.save(path)


@pytest.mark.parametrize("start", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_vocs_layout_is_found_from_the_devkit_upwards(start: str, tmp_path: Path) -> None:
    folder = tree(tmp_path)
    assert voc_folder(str(tmp_path / start), year="2012").resolve() == folder
    (first, _) = labelled_images(folder, "train", data=str(tmp_path))
    assert sorted(first.read_labels(classes=20).unique().tolist()) == [0, 5, 255]
    assert class_names(folder) == VOC_CLASSES
    assert len(VOC_CLASSES) == 20


def test_train_aug_is_its_list_with_the_extra_label_images_or_sbd_as_downloaded(tmp_path: Path) -> None:
    from scipy.io import savemat

    folder = tree(tmp_path, names=("a", "b", "c", "d"))
    lists = folder / "ImageSets" / "Segmentation"
    with pytest.raises(UserError, match="has no train_aug.txt; put it there with SegmentationClassAug"):
        labelled_images(folder, "train_aug", data=str(tmp_path))
    # SBD: train a, VOC's val c; b and d are annotated by SBD alone.
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("c\n")
    (sbd / "train.txt").write_text("b\nc\n")
    (sbd / "val.txt").write_text("d\n")
    for name in ("b", "d"):
        (folder / "SegmentationClass" / f"{name}.png").unlink()
        savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": np.full((20, 30), 7, dtype=np.uint8)}})
    found = labelled_images(folder, "train_aug", data=str(tmp_path))
    assert [item.image.stem for item in found] == ["a", "b", "d"]
    assert found[1].read_labels(classes=20).unique().tolist() == [7]
    (sbd / "cls" / "b.mat").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"b\.mat: is not a label file of SBD"):
        found[1].check(classes=20)
    (lists / "trainaug.txt").write_text("d\n")
    (folder / "SegmentationClassAug").mkdir()
    Image.fromarray(np.full((20, 30), 9, dtype=np.uint8)).save(folder / "SegmentationClassAug" / "d.png")
    (only,) = labelled_images(folder, "train_aug", data=str(tmp_path))
    assert only.read_labels(classes=20).unique().tolist() == [9]


def test_crops_keep_image_and_labels_together_and_pad_with_ignored_mean_colour(tmp_path: Path) -> None:
    items = tuple(labelled_images(tree(tmp_path), "train", data=str(tmp_path)))
    settings = dataclasses.replace(SMALL, scale=(0.5, 2.0), crop_px=48)
    source = SegmentationImages(items, 20, settings, (124.0, 116.0, 104.0))
    seen, sides = set(), set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, labels = source.train(0)
        assert image.shape == (3, 48, 48)
        red, blue = image[0].int() > 200, image[2].int() > 200
        assert not (red & (labels == 0)).any()
        assert not (blue & (labels == 5)).any()
        padded = (image[0] == 124) & (image[1] == 116)
        assert (labels[padded] == 255).all()
        seen |= set(labels.unique().tolist())
        sides.add(int((labels == 5).any(dim=0).sum()))
    assert seen == {0, 5, 255}
    assert len(sides) > 5
    test, labels = source.test(0)
    assert test.shape == (3, 48, 48)
    assert (labels[:14] == 255).all()
    assert (labels[14:34, 9:24] == 5).all()
    whole = dataclasses.replace(source, settings=dataclasses.replace(settings, test_view="full"))
    assert whole.test(0)[0].shape == (3, 20, 30)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (400, 400)])
def test_images_of_any_shape_are_scaled_by_the_factors_that_were_set(size: tuple[int, int], tmp_path: Path) -> None:
    height, width = size
    Image.fromarray(np.full((height, width, 3), 9, dtype=np.uint8)).save(tmp_path / "a.png")
    save_labels(tmp_path / "labels.png", np.ones((height, width), dtype=np.uint8))
    item = LabelledImage(tmp_path / "a.png", tmp_path / "labels.png")

    def seen(scale: tuple[float, float]) -> tuple[int, int]:
        settings = dataclasses.replace(SMALL, scale=scale, crop_px=1100)
        _, labels = SegmentationImages((item,), 20, settings, (0.0, 0.0, 0.0)).train(0)
        return int((labels == 1).any(dim=1).sum()), int((labels == 1).any(dim=0).sum())

    assert seen((1.0, 1.0)) == (height, width)
    assert seen((2.0, 2.0)) == (2 * height, 2 * width)
    torch.manual_seed(0)
    factors = np.array([np.divide(seen((0.5, 2.0)), size) for _ in range(40)])
    assert np.abs(factors[:, 0] - factors[:, 1]).max() < 0.01
    assert 0.5 <= factors.min() < 0.65
    assert 1.8 < factors.max() <= 2.0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "SegmentationClass" / "b.png").unlink(), r"b\.png: no such label image"),
        (lambda folder: (folder / "JPEGImages" / "a.jpg").unlink(), r"a\.jpg: no such image, but it is listed"),
        (lambda folder: save_labels(folder / "SegmentationClass" / "b.png", np.full((20, 30), 21, dtype=np.uint8)), "pixels of class 21"),
        (
            lambda folder: [save_labels(folder / "SegmentationClass" / f"{n}.png", np.zeros((9, 9), dtype=np.uint8)) for n in "ab"],
            r"a\.png: has 9 x 9 px, but its image 30 x 20 \(2 of 2 label images of train have such a fault\)",
        ),
        (lambda folder: Image.new("RGB", (30, 20)).save(folder / "SegmentationClass" / "b.png"), "mode RGB; a label image has a palette"),
        (lambda folder: (folder / "SegmentationClass" / "b.png").write_bytes(b"x"), r"b\.png: cannot be read as an image"),
        (lambda folder: (folder / "ImageSets/Segmentation/train.txt").write_text("../a\n"), "is not a name of an image"),
        (lambda folder: (folder / "ImageSets/Segmentation/train.txt").write_text("\n"), "names no image"),
        (lambda folder: (folder / "ImageSets/Segmentation/train.txt").unlink(), r"train\.txt: no such list"),
        (lambda folder: (folder / "classes.txt").write_text("cat\ncat\n"), "2 names, 1 different"),
    ],
)
def test_bad_data_is_one_line_that_names_and_counts_it(damage, says: str, tmp_path: Path) -> None:
    damage(tree(tmp_path))
    settings = dataclasses.replace(SMALL, test_set="train")
    with pytest.raises(UserError, match=says):
        segmentation.run(make_job("segmentation", settings, data=tmp_path, folder=tmp_path), settings)


def test_a_folder_of_another_layout_is_told_what_must_lie_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected JPEGImages, Annotations, SegmentationClass and ImageSets"):
        voc_folder(str(tmp_path), year="2012")


def test_another_years_folder_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    """Their lists have the same names: VOC2007 would be trained on twice for 07+12."""
    (tmp_path / "VOC2007" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(UserError, match="is VOC2007, and VOC2012 is needed; put that beside it, or give the folder that holds both"):
        voc_folder(str(tmp_path / "VOC2007"), year="2012")
    (tmp_path / "VOC2012" / "JPEGImages").mkdir(parents=True)
    assert voc_folder(str(tmp_path / "VOC2007"), year="2012") == tmp_path / "VOC2012"


# ---- the whole task


def test_a_stopped_training_goes_on_to_the_same_scores_and_the_grid_picks_the_best_rate(scene_folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, lrs=(1e-3, 1e-1), held_out=(8,))
    whole = segmentation.run(make_job("segmentation", settings, data=scene_folder, folder=tmp_path / "whole"), settings)
    stopped = make_job("segmentation", settings, data=scene_folder, folder=tmp_path / "part", stop=10)
    with pytest.raises(TaskStopped, match=r"stopped after step 2 of 4 of byol seed 0"):
        segmentation.run(stopped, settings)
    again = segmentation.run(make_job("segmentation", settings, data=scene_folder, folder=tmp_path / "part"), settings)
    for name, subject in whole.subjects.items():
        assert again.subjects[name].scores == subject.scores
        rates = {float(rate): value for rate, value in subject.details["held_out"].items()}
        assert set(rates) == {1e-3, 1e-1}
        assert subject.chosen["lr"] == max(rates, key=lambda rate: rates[rate])
    assert again.comparisons.keys() == {"untrained"}


def test_the_command_writes_scores_a_picture_and_a_row_beside_the_papers_and_knows_them_again(
    scene_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_encoder().state_dict(), tmp_path / "weights.pt")
    command = ["evaluate", "segmentation", "--checkpoint", str(tmp_path / "weights.pt"), "--data", str(scene_folder)]
    small = ["--steps", "2", "--batch_images", "2", "--test_images", "4", "--head_channels", "8", *TINY]
    code, out, err = call([*command, *small, "--dry_run"], capsys)
    assert code == 0, err
    assert "2 trainings of 2 steps of 2 images" in out
    assert not list(tmp_path.glob("*.evaluation"))
    code, out, err = call([*command, *small], capsys)
    assert code == 0, err
    assert "76.3" in out
    (file,) = tmp_path.rglob("segmentation.json")
    record = json.loads(file.read_text())
    assert record["sizes"] == {"train": 32, "test": 4}
    assert len(record["subjects"]["byol"]["details"]["iou"]) == 17
    (picture,) = file.parent.glob("segmentation-*.png")
    # Image, truth and two encoders, four rows.
    assert Image.open(picture).width > 2 * Image.open(picture).height / 3
    assert len(sample_rows(4, ranks=1)) == 4
    assert not list(file.parent.glob("*.work-*"))
    code, _, err = call([*command, *small], capsys)
    assert "already evaluated with these settings" in err


def test_a_pre_trained_encoder_segments_scenes_better_than_an_untrained_one(tmp_path: Path) -> None:
    # Pre-trained for 2,500 steps on other scenes (tests/golden/README.md); both are frozen, and the same head is trained.
    trained = torch.load(GOLDEN / "scenes_encoder.pt", weights_only=True)

    def pre_trained(_: Images) -> torch.nn.Module:
        encoder = tiny_encoder()
        encoder.load_state_dict(trained)
        return encoder.eval()

    def untrained(images: Images) -> torch.nn.Module:
        encoder = tiny_encoder()
        set_batchnorm_statistics(encoder, images())
        return encoder.eval()

    subjects = tuple(Subject(name, name, PAPER, name, build) for name, build in (("byol", pre_trained), ("untrained", untrained)))
    settings = dataclasses.replace(QUICK, steps=60, test_images=0)
    job = make_job("segmentation", settings, data=scenes(tmp_path, train=12, val=6), folder=tmp_path, subjects=subjects)
    result = segmentation.run(job, settings)
    assert result.comparisons["untrained"].low > 0.01
    assert result.subjects["byol"].scores["miou"] > result.subjects["untrained"].scores["miou"] + 0.02
