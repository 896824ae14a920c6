"""evaluate detection: the paper's and MoCo's networks, average precision by hand, VOC's boxes, what is refused, and the whole command."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig
from fastbyol.evaluation.tasks import detection
from fastbyol.evaluation.tasks.dense.average_precision import (
    Detections,
    Objects,
    average_precision,
    coco_scores,
    match_class,
    mean_average_precision,
)
from fastbyol.evaluation.tasks.dense.voc import boxed_images, read_boxes
from fastbyol.evaluation.tasks.detection import MOCO, QUICK, DetectionImages, DetectionSettings
from fastbyol.evaluation.tasks.training import TaskStopped
from fastbyol.models import build_encoder, encoder_from
from fastbyol.models.backbone import backbone_of
from fastbyol.models.faster_rcnn import Detector, build_detector
from tests.dense_jobs import TINY, make_job, tiny_encoder
from tests.test_report import call

SMALL = dataclasses.replace(QUICK, steps=4, batch_images=2, test_images=6, rpn_images=16, box_images=8)


# ---- the papers' protocols


def test_the_defaults_are_the_papers_settings_as_far_as_it_states_them() -> None:
    paper = DetectionSettings()
    assert detection.TASKS["detection"].versions["paper"] == paper
    # Appendix D.5: longest edge 480 to 1024, no flip, 1.5M steps, 1e-3 -> 1e-4 at 1M -> 1e-5 at 1.2M, frozen.
    assert (paper.train_sets, paper.test_set, paper.head, paper.frozen) == (("2007_trainval",), "2007_test", "c4", "backbone")
    assert (paper.edge, min(paper.train_px), max(paper.train_px), paper.flip_p) == ("longest", 480, 1024, 0.0)
    assert (paper.steps, paper.lr, paper.drop) == (1_500_000, 1e-3, 0.1)
    assert [round(share * paper.steps) for share in paper.drop_at] == [1_000_000, 1_200_000]
    assert detection.PAPER_ROWS["paper, BYOL ResNet-50"] == {"voc_ap50": 77.5}


def test_moco_is_its_own_version_of_the_settings() -> None:
    assert detection.TASKS["detection"].versions["moco"] == MOCO
    assert (MOCO.train_sets, MOCO.steps, MOCO.batch_images, MOCO.lr) == (("2007_trainval", "2012_trainval"), 24_000, 16, 0.02)
    assert [round(share * MOCO.steps) for share in MOCO.drop_at] == [18_000, 22_000]
    assert (MOCO.warmup_steps, MOCO.frozen, MOCO.norms, MOCO.extra_norm, MOCO.head) == (100, "none", "all_ranks", True, "c4")
    assert (MOCO.edge, MOCO.train_px, MOCO.test_px) == ("shortest", (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), 800)
    assert MOCO.proposals[2:] == (6000, 1000)
    assert not MOCO.decay_norms  # detectron2's SOLVER.WEIGHT_DECAY_NORM is 0


def detector(encoder: torch.nn.Module, *, head: str = "c4", classes: int = 20, **options: object) -> Detector:
    default = {
        **{"frozen": "none", "fixed_norms": False, "extra_norm": False, "anchor_px": (32, 64, 128, 256, 512)},
        **{"anchor_aspects": (0.5, 1.0, 2.0), "region_px": 14, "proposals": (100, 20, 50, 10), "rpn_images": 16, "box_images": 8},
        **{"detections": 5, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    }
    return build_detector(backbone_of(encoder), classes=classes, head=head, **(default | options))  # type: ignore[arg-type]


def test_c4_on_a_torchvision_resnet_has_conv5_in_its_box_head_and_the_parameters_counted_by_hand() -> None:
    encoder = build_encoder("resnet50")
    theirs = torchvision.models.resnet50().state_dict()
    weights = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    encoder.load_state_dict(weights)
    network = detector(encoder, extra_norm=True)
    own = {name: value for name, value in network.state_dict().items() if "rpn" not in name and "predictor" not in name}
    for name, value in weights.items():
        part = f"network.roi_heads.box_head.group.{name.removeprefix('layer4.')}" if name.startswith("layer4.") else ""
        assert torch.equal(own[part or f"network.backbone.backbone.encoder.{name}"], value)
    rpn = 1024 * 1024 * 9 + 1024 + 15 * (1024 + 1) + 60 * (1024 + 1)
    predictor = 21 * (2048 + 1) + 84 * (2048 + 1)
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + rpn + predictor + 2 * 2048
    assert network.network.backbone.out_channels == 1024
    # detectron2's R50-C4: 14 x 14 regions at stride 16, 7 x 7 behind conv5.
    with torch.no_grad():
        assert network.eval().network.backbone(torch.zeros(1, 3, 64, 96)).shape == (1, 1024, 4, 6)
        assert network.network.roi_heads.box_head.group(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)


def test_as_in_detectron2_scale_and_offset_of_norms_do_not_decay_in_mocos_protocol() -> None:
    network = detector(build_encoder("resnet50"), extra_norm=True)
    decays = {id(p): group["weight_decay"] for group in detection._optimizer(network, MOCO).param_groups for p in group["params"]}
    assert len(decays) == sum(1 for _ in network.parameters())
    for name, parameter in network.named_parameters():
        of_norm = parameter.dim() == 1 and ("bn" in name or "downsample.1" in name or "norm" in name.rpartition(".")[0].rpartition(".")[2])
        assert decays[id(parameter)] == (0 if of_norm else 1e-4), name
    assert {group["weight_decay"] for group in detection._optimizer(network, DetectionSettings()).param_groups} == {1e-4}


def test_a_pyramid_serves_every_encoder_and_c4_on_timm_is_one_clear_error() -> None:
    timm = encoder_from(ModelConfig(encoder="timm/mobilenetv3_small_050"))
    with pytest.raises(UserError, match="--head c4: its box head is the last group of a ResNet.*--head fpn"):
        detector(timm)
    for encoder, sides in ((timm, (8, 16, 32, 64, 128)), (tiny_encoder(), (8, 16))):
        with pytest.raises(UserError, match="each needs one side"):
            detector(copy.deepcopy(encoder), head="fpn", anchor_px=(8,))
        network = detector(encoder, head="fpn", anchor_px=sides if encoder is timm else (16, 24, 32), region_px=7).eval()
        with torch.no_grad():
            (found,) = network([torch.rand(3, 64, 64)])
        assert set(found) == {"boxes", "labels", "scores"}


def one_step(network: Detector) -> dict[str, torch.Tensor]:
    """Takes a training step and returns the state before it."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},
    ]
    loss = network.train()([torch.rand(3, 48, 48), torch.rand(3, 40, 56)], targets)
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    return before


@pytest.mark.parametrize(
    ("frozen", "fixed", "trunk_moves", "group_moves", "trunk_norms_move"),
    [
        ("none", False, True, True, True),
        ("none", True, True, True, False),
        ("backbone", False, False, True, False),
        ("encoder", False, False, False, False),
    ],
)
def test_frozen_parts_and_fixed_norms_stay_as_they_are(
    frozen: str, fixed: bool, trunk_moves: bool, group_moves: bool, trunk_norms_move: bool
) -> None:
    torch.manual_seed(0)
    network = detector(tiny_encoder(), classes=2, frozen=frozen, fixed_norms=fixed, anchor_px=(24,), region_px=4)
    before = one_step(network)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert any("backbone.encoder.layer1.0.conv1.weight" in name for name in moved) == trunk_moves
    assert any("box_head.group.0.conv1.weight" in name for name in moved) == group_moves
    assert any("backbone.encoder.layer1.0.bn1.running_mean" in name for name in moved) == trunk_norms_move
    assert any("rpn" in name for name in moved)
    assert any("box_predictor" in name for name in moved)


@pytest.mark.parametrize("training", [True, False])
def test_images_keep_their_size_in_training_and_in_tests_and_are_normalised_and_padded(training: bool) -> None:
    network = detector(tiny_encoder(), classes=2, anchor_px=(24,), region_px=4).network.train(training)
    images = [torch.rand(3, 41, 48), torch.rand(3, 44, 40)]
    batch, _ = network.transform(images, None)
    assert batch.image_sizes == [(41, 48), (44, 40)]
    assert batch.tensors.shape == (2, 3, 44, 48)
    expected = (images[0] - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(batch.tensors[0, :, :41], expected)
    assert not batch.tensors[0, :, 41:].any()


# ---- average precision


def found(*rows: tuple[float, ...]) -> Detections:
    """Detections of one image: (x_min, y_min, x_max, y_max, label, score) each."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Detections(values[:, :4], values[:, 4].astype(np.int64), values[:, 5])


def true(*rows: tuple[float, ...]) -> Objects:
    """Objects of one image: (x_min, y_min, x_max, y_max, label, difficult) each."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return Objects(values[:, :4], values[:, 4].astype(np.int64), values[:, 5].astype(bool))


DETECTIONS = [
    # A hit, a second detection of the same object, one on a difficult object, one too far from everything.
    found((0, 0, 10, 10, 1, 0.9), (0, 0, 10, 9, 1, 0.8), (20, 20, 30, 30, 1, 0.95), (50, 50, 60, 60, 1, 0.3)),
    found((0, 0, 10, 10, 1, 0.7), (5, 5, 9, 9, 2, 0.99)),  # an image without objects
    found((2, 0, 12, 10, 1, 0.6)),  # overlap 8/12
    found(),  # an object that nobody finds
]
OBJECTS = [
    true((0, 0, 10, 10, 1, 0), (20, 20, 30, 30, 1, 1)),
    true(),
    true((0, 0, 10, 10, 1, 0)),
    true((0, 0, 10, 10, 1, 0)),
]


def test_matching_counts_duplicates_as_misses_and_difficult_objects_as_nothing() -> None:
    matches = match_class(DETECTIONS, OBJECTS, label=1)
    # By score: difficult (.95), hit (.9), duplicate (.8), the empty image's (.7), hit (.6), far (.3).
    assert matches.image.tolist() == [0, 0, 0, 1, 2, 0]
    assert matches.hit.tolist() == [False, True, False, False, True, False]
    assert matches.counted.tolist() == [False, True, True, True, True, True]
    assert matches.objects.tolist() == [1, 0, 1, 1]
    # With 0.7 the object of the third image is not found.
    assert match_class(DETECTIONS, OBJECTS, label=1, overlap=0.7).hit.sum() == 1


def eleven_points(points: list[tuple[float, float]]) -> float:
    """The definition, in a loop: points are (recall, precision)."""
    return sum(max([p for r, p in points if r >= level / 10 - 1e-9], default=0.0) for level in range(11)) / 11


def test_the_11_point_average_precision_by_hand() -> None:
    matches = match_class(DETECTIONS, OBJECTS, label=1)
    # Three objects; after each counted detection: recall and precision.
    points = [(1 / 3, 1 / 1), (1 / 3, 1 / 2), (1 / 3, 1 / 3), (2 / 3, 2 / 4), (2 / 3, 2 / 5)]
    assert average_precision(matches) == pytest.approx(eleven_points(points))
    assert average_precision(matches) == pytest.approx((4 * 1.0 + 3 * 0.5) / 11)
    # A class without objects is left out of the mean, and one that has only difficult ones too.
    assert math.isnan(average_precision(match_class(DETECTIONS, OBJECTS, label=2)))
    assert mean_average_precision([match_class(DETECTIONS, OBJECTS, label=label) for label in (1, 2)]) == pytest.approx(5.5 / 11)
    only = [true((0, 0, 9, 9, 1, 1))]
    assert math.isnan(average_precision(match_class([found((0, 0, 9, 9, 1, 0.5))], only, label=1)))
    assert average_precision(match_class([found()], [true((0, 0, 9, 9, 1, 0))], label=1)) == 0


def test_weights_count_images_more_than_once_and_random_sets_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    detections, objects = [], []
    for _ in range(30):
        corners = rng.uniform(0, 40, (5, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 20, (5, 2))], axis=1)
        objects.append(true(*((*box, 1, float(rng.random() < 0.2)) for box in boxes[:3])))
        moved = boxes + rng.uniform(-3, 3, boxes.shape)
        detections.append(found(*((*box, 1, rng.random()) for box in moved)))
    matches = match_class(detections, objects, label=1)
    hits, all_found, points = 0, 0, []
    for hit, counted in zip(matches.hit, matches.counted, strict=True):
        hits, all_found = hits + int(hit), all_found + int(counted)
        if counted:
            points.append((hits / matches.objects.sum(), hits / all_found))
    assert 0.1 < average_precision(matches) == pytest.approx(eleven_points(points))
    drawn = rng.integers(0, 30, 30)
    weights = np.bincount(drawn, minlength=30).astype(float)
    # The same image twice is two images, and a tie of scores between them changes nothing.
    again = match_class([detections[at] for at in drawn], [objects[at] for at in drawn], label=1)
    assert average_precision(matches, weights) == pytest.approx(average_precision(again), abs=0.02)


def test_cocos_scores_by_hand() -> None:
    perfect = [found((0, 0, 10, 10, 1, 0.9)), found((0, 0, 20, 20, 1, 0.8))]
    objects = [true((0, 0, 10, 10, 1, 0)), true((0, 0, 20, 20, 1, 0), (30, 30, 40, 40, 1, 1))]
    assert coco_scores(perfect, objects) == pytest.approx({"ap": 1.0, "ap50": 1.0, "ap75": 1.0})
    # Overlap 0.72: found at 0.5, 0.55, 0.6, 0.65 and 0.7, so AP is half.
    near = [found((0, 0, 10, 7.2, 1, 0.9)), found((0, 0, 20, 14.4, 1, 0.8))]
    assert coco_scores(near, objects) == pytest.approx({"ap": 0.5, "ap50": 1.0, "ap75": 0.0})
    assert coco_scores([found(), found()], objects) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_what_is_not_installed_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(UserError, match=r"torchmetrics is not installed; pip install 'fastbyol\[eval\]'"):
        detection.run(None, None)  # type: ignore[arg-type]


# ---- images

XML = """<annotation><size><width>40</width><height>30</height><depth>3</depth></size>{}</annotation>"""
OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
)


def tree(root: Path, *, years: tuple[str, ...] = ("2007",), lists: tuple[str, ...] = ("trainval", "test")) -> Path:
    """Writes VOC's layout of these years with two images each: a dog (and a difficult cat), and one without objects."""
    for year in years:
        folder = root / "VOCdevkit" / f"VOC{year}"
        for each in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / each).mkdir(parents=True)
        for name, objects in (("a", [("dog", 0, 1, 1, 20, 30), ("cat", 1, 5, 6, 40, 30)]), ("b", [])):
            pixels = np.zeros((30, 40, 3), dtype=np.uint8)
            pixels[:, :20] = 200
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            (folder / "Annotations" / f"{name}.xml").write_text(XML.format("".join(OBJECT.format(*each) for each in objects)))
        for each in lists:
            (folder / "ImageSets" / "Main" / f"{each}.txt").write_text("a  1\nb -1\n")
    return root / "VOCdevkit" / "VOC2007"


def test_boxes_count_from_0_with_exclusive_ends_and_parts_are_no_objects(tmp_path: Path) -> None:
    (first, second) = boxed_images(tree(tmp_path), "trainval")
    item = read_boxes(*first, classes=("cat", "dog"))
    assert item.boxes == ((0, 0, 20, 30), (4, 5, 40, 30))
    assert (item.labels, item.difficult, item.size) == ((2, 1), (False, True), (30, 40))
    assert read_boxes(*second, classes=("cat", "dog")).boxes == ()


def test_boxes_follow_their_image_through_resizing_and_mirroring(tmp_path: Path) -> None:
    items = tuple(read_boxes(*pair, classes=("cat", "dog")) for pair in boxed_images(tree(tmp_path), "trainval"))
    settings = dataclasses.replace(DetectionSettings(), train_px=(60, 80), test_px=100, flip_p=0.5)
    source, seen = DetectionImages(items, settings), set()
    for seed in range(16):
        torch.manual_seed(seed)
        image, boxes, labels, _ = source.train(0)
        assert image.shape in ((3, 45, 60), (3, 60, 80))
        x_min, _, x_max, y_max = boxes[0].tolist()
        assert (y_max, x_max - x_min) == (image.shape[1], image.shape[2] / 2)
        # The dog is where the image is bright.
        assert image[0, :, round(x_min) + 2 : round(x_max) - 2].float().mean() > 190
        assert labels.tolist() == [2, 1]
        seen.add((image.shape[2], x_min == 0))
    assert len(seen) == 4
    assert source.test(0).shape == (3, 75, 100)
    shortest = dataclasses.replace(source, settings=dataclasses.replace(settings, edge="shortest", test_px=60, longest_px=64))
    assert shortest.test(0).shape == (3, 48, 64)
    image, boxes, labels, _ = source.train(1)
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


def test_lists_of_two_years_are_put_together_with_each_annotation_read_once_and_images_without_objects_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, years=("2007", "2012"))
    read, read_boxes = [], detection.read_boxes
    monkeypatch.setattr(detection, "read_boxes", lambda *files, **more: [read.append(files), read_boxes(*files, **more)][1])
    settings = dataclasses.replace(SMALL, train_sets=("2007_trainval", "2012_trainval"), test_set="2007_test")
    job, said = make_job("detection", settings, data=tmp_path, folder=tmp_path), []
    data = detection._open(dataclasses.replace(job, announce=said.append), settings)
    assert (len(data.train), len(data.test)) == (4, 2)
    assert len(read) == 6  # three lists of two images; 2007's two lists are of the same ones here
    assert data.train.images[2].image.parts[-3] == "VOC2012"
    assert said == [f"3 images have no objects and count as background, such as {tmp_path}/VOCdevkit/VOC2007/Annotations/b.xml"]
    assert list(data.notes) == said


def write_xml(folder: Path, *objects: tuple[object, ...], name: str = "a") -> None:
    (folder / "Annotations" / f"{name}.xml").write_text(XML.format("".join(OBJECT.format(*each) for each in objects)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: write_xml(f, ("dog", 0, 1, 1, 41, 30)), r"a\.xml: the box of dog 1, 1, 41, 30 is not in its image of 40 x 30 px"),
        (lambda f: write_xml(f, ("dog", 0, 0, 1, 10, 10)), "the box of dog 0, 1, 10, 10 is not in its image"),
        (lambda f: write_xml(f, ("dog", 0, 9, 1, 8, 10)), "the box of dog 9, 1, 8, 10"),
        (
            lambda f: [write_xml(f, ("dog", 0, 9, 1, 99, 10), name=n) for n in "ab"],
            r"2 of 2 annotations of 2007_trainval have such a fault",
        ),
        (lambda f: write_xml(f, ("unicorn", 0, 1, 1, 9, 9)), "an object of class 'unicorn'; the classes are aeroplane"),
        (lambda f: write_xml(f, ("dog", 0, "x", 1, 9, 9)), "without the four corners"),
        (lambda f: write_xml(f, name="a"), "no training image has an object"),
        (lambda f: (f / "Annotations" / "a.xml").write_text("<annotation>"), "cannot be read as an annotation"),
        (lambda f: (f / "Annotations" / "a.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><a/>'), "declares entities"),
        (lambda f: (f / "Annotations" / "b.xml").unlink(), r"b\.xml: no such file, but it is listed"),
        (lambda f: (f / "ImageSets/Main/test.txt").unlink(), r"test\.txt: no such list"),
    ],
)
def test_bad_annotations_are_one_line_that_names_and_counts_them(damage, says: str, tmp_path: Path) -> None:
    damage(tree(tmp_path))
    settings = dataclasses.replace(SMALL, train_sets=("2007_trainval",), test_set="2007_test")
    with pytest.raises(UserError, match=says):
        detection.run(make_job("detection", settings, data=tmp_path, folder=tmp_path), settings)


# ---- the whole task


def test_a_stopped_training_goes_on_to_the_same_scores(scene_folder: Path, tmp_path: Path) -> None:
    # A high rate, so that four steps find something.
    settings = dataclasses.replace(SMALL, lr=0.05, warmup_steps=0, frozen="none", detections=30)
    whole = detection.run(make_job("detection", settings, data=scene_folder, folder=tmp_path / "whole"), settings)
    with pytest.raises(TaskStopped, match="stopped after step 3 of 4 of byol seed 0"):
        detection.run(make_job("detection", settings, data=scene_folder, folder=tmp_path / "part", stop=3), settings)
    again = detection.run(make_job("detection", settings, data=scene_folder, folder=tmp_path / "part"), settings)
    assert {name: each.scores for name, each in again.subjects.items()} == {name: each.scores for name, each in whole.subjects.items()}
    assert again.comparisons["untrained"] == whole.comparisons["untrained"]


def test_the_command_writes_scores_and_a_picture_with_a_row_beside_the_papers(
    scene_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_encoder().state_dict(), tmp_path / "weights.pt")
    command = ["evaluate", "detection", "--checkpoint", str(tmp_path / "weights.pt"), "--data", str(scene_folder)]
    small = ["--steps", "2", "--batch_images", "2", "--test_images", "4", "--box_images", "8", *TINY]
    code, out, err = call([*command, *small, "--dry_run"], capsys)
    assert code == 0, err
    assert "2 trainings of 2 steps of 2 images" in out
    code, out, err = call([*command, *small], capsys)
    assert code == 0, err
    assert "77.5" in out
    (file,) = tmp_path.rglob("detection.json")
    record = json.loads(file.read_text())
    assert record["sizes"] == {"train": 32, "test": 4}
    assert set(record["subjects"]["byol"]["scores"]) == {"voc_ap50", "ap", "ap50", "ap75"}
    assert Image.open(next(file.parent.glob("detection-*.png"))).width > 300
    code, _, err = call([*command, *small, "--settings", "moco", "--head", "fpn"], capsys)
    assert code == 2
    assert "--extra_norm" in err
