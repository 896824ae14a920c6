"""Transfer: metrics by hand, L-BFGS against scikit-learn, splits of the paper's sizes, every set in its real layout, settings of the paper."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.augment.parameters import CROP_H, CROP_W, CROP_X, CROP_Y, centre_crop_parameters
from fastbyol.config.errors import UserError
from fastbyol.evaluation.tasks.job import Subject
from fastbyol.evaluation.tasks.transfer import metrics
from fastbyol.evaluation.tasks.transfer.finetune import TEST_SHARE, _binary_loss, bn_momentum
from fastbyol.evaluation.tasks.transfer.opening import VOC_CLASSES, open_set
from fastbyol.evaluation.tasks.transfer.regression import LogisticRegression
from fastbyol.evaluation.tasks.transfer.sets import BY_NAME, PAPER_FINETUNE, PAPER_LINEAR, SETS
from fastbyol.evaluation.tasks.transfer.split import held_out_count, hold_out, hold_out_of_each
from fastbyol.evaluation.tasks.transfer.tasks import TASKS, _scratch_notes
from tests.dense_jobs import subject

CPU = torch.device("cpu")

# ---- metrics


def test_mean_per_class_counts_a_rare_class_as_much_as_a_frequent_one() -> None:
    label = torch.tensor([0, 0, 0, 0, 1, 3])
    score = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 0]), 4).double()
    assert metrics.top1(score, label) == pytest.approx(4 / 6)
    # Class 0: 3 of 4; class 1: 1 of 1; class 2 has no image and does not count; class 3: 0 of 1.
    assert metrics.mean_per_class(score, label) == pytest.approx((0.75 + 1 + 0) / 3)


def test_11_point_average_precision_is_that_of_a_table_made_by_hand() -> None:
    # In the order of the scores: right, wrong, difficult, right, wrong, right, wrong. Without the difficult one the precisions at the right
    # ones are 1/1, 2/3 and 3/5, at recalls 1/3, 2/3 and 1. Recall 0 .. 0.3: 1 (4 points), 0.4 .. 0.6: 2/3 (3), 0.7 .. 1: 3/5 (4).
    score = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    truth = torch.tensor([1, -1, 0, 1, -1, 1, -1])
    expected = (4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11
    assert metrics.average_precision(score, truth) == pytest.approx(expected)
    shuffled = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    assert metrics.average_precision(score[shuffled], truth[shuffled]) == pytest.approx(expected)
    assert metrics.average_precision(score, torch.where(truth == 0, -1, truth)) < expected
    perfect = torch.tensor([1, 1, 1, -1, -1, -1, -1])
    both = metrics.mean_ap(torch.stack([score, score], 1), torch.stack([truth, perfect], 1))
    assert both == pytest.approx((expected + 1) / 2)


def test_recall_of_three_tenths_reaches_the_point_0_3_although_the_two_numbers_differ() -> None:
    # Ten right images: three before a wrong one, seven after nine wrong ones; 0.3 <= 3/10 must hold for the fourth point.
    truth = torch.tensor([1] * 3 + [-1] * 9 + [1] * 7)
    score = torch.arange(len(truth), 0, -1).double()
    late = max((3 + k) / (12 + k) for k in range(1, 8))
    assert metrics.average_precision(score, truth) == pytest.approx((4 * 1 + 7 * late) / 11)


def test_images_of_equal_score_enter_together_in_any_order() -> None:
    truth = torch.tensor([1, -1, 1, -1])
    score = torch.tensor([0.5, 0.5, 0.5, 0.1])
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [2, 1, 0, 3]):
        assert metrics.average_precision(score[order], truth[order]) == pytest.approx(2 / 3)


def test_a_class_that_no_image_has_is_refused() -> None:
    with pytest.raises(UserError, match="in no image"):
        metrics.average_precision(torch.rand(3), torch.tensor([-1, 0, -1]))


# ---- regression


def scaled_features(num: int, dims: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features whose directions differ in scale by three orders and that have a large mean, as those of an encoder do."""
    generator = torch.Generator().manual_seed(num)
    label = torch.arange(num) % classes
    means = torch.randn(classes, dims, generator=generator)
    spread = torch.logspace(0.5, -2.5, dims)
    return torch.randn(num, dims, generator=generator) * spread + 0.1 * means[label] + 2, label


@pytest.mark.parametrize(("num", "dims", "classes"), [(300, 20, 5), (80, 120, 3)])
def test_l_bfgs_finds_scikit_learns_coefficients_for_strong_and_weak_penalties_in_turn(num: int, dims: int, classes: int) -> None:
    from sklearn.linear_model import LogisticRegression as Oracle

    feature, label = scaled_features(num, dims, classes)
    regression = LogisticRegression(feature, label, num_classes=classes, device=CPU)
    for l2 in (1000.0, 1.0, 0.05):
        fitted = regression.fit(l2, max_steps=3000)
        # newton-cg reaches the minimum of the same objective more closely than scikit-learn's own L-BFGS.
        oracle = Oracle(C=1 / l2, solver="newton-cg", tol=1e-9, max_iter=1000).fit(feature.double().numpy(), label.numpy())
        assert fitted.converged
        np.testing.assert_allclose(fitted.weight.numpy().T, oracle.coef_, rtol=0, atol=1e-4)
        np.testing.assert_allclose(fitted.bias.numpy(), oracle.intercept_, rtol=0, atol=1e-3)
        np.testing.assert_allclose(fitted.scores(feature), oracle.decision_function(feature.double().numpy()), rtol=0, atol=1e-4)


def test_binary_problems_a_class_are_scikit_learns_without_the_images_that_do_not_count() -> None:
    from sklearn.linear_model import LogisticRegression as Oracle

    feature, label = scaled_features(200, 12, 4)
    truth = torch.where(torch.arange(4) == label[:, None], 1, -1)
    truth[torch.arange(200) % 7 == 3, 2] = 0
    fitted = LogisticRegression(feature, truth, num_classes=4, device=CPU).fit(0.5, max_steps=2000)
    assert fitted.converged
    for k in range(4):
        counted = (truth[:, k] != 0).numpy()
        oracle = Oracle(C=2.0, solver="newton-cg", tol=1e-9).fit(feature.double().numpy()[counted], truth[:, k].numpy()[counted])
        np.testing.assert_allclose(fitted.weight[:, k].numpy(), oracle.coef_[0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(fitted.bias[k].numpy(), oracle.intercept_[0], rtol=0, atol=1e-3)


def test_a_feature_that_never_varies_gets_no_weight_and_rows_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    feature, label = scaled_features(90, 8, 3)
    feature[:, 5] = 7.0
    whole = LogisticRegression(feature, label, num_classes=3, device=CPU).fit(0.1, max_steps=2000)
    assert whole.weight[5].abs().max() < 1e-9
    monkeypatch.setattr("fastbyol.evaluation.tasks.transfer.regression._CHUNK_VALUES", 100)
    blocks = LogisticRegression(feature, label, num_classes=3, device=CPU).fit(0.1, max_steps=2000)
    torch.testing.assert_close(blocks.weight, whole.weight, rtol=0, atol=1e-6)


def test_a_fit_that_may_not_take_enough_steps_says_that_it_has_not_converged() -> None:
    feature, label = scaled_features(120, 20, 3)
    assert not LogisticRegression(feature, label, num_classes=3, device=CPU).fit(1e-6, max_steps=2).converged


# ---- splits


def real_labels(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def caltech_counts() -> list[int]:
    """Returns 102 class sizes as Caltech-101's: 9,144 images, from 31 to 800 a class."""
    counts = [31, 800, 467] + [79] * 99
    counts[3] += 9144 - sum(counts)
    return counts


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("food101", [750] * 101),
        ("cifar10", [5000] * 10),
        ("cifar100", [500] * 100),
        ("birdsnap", [95] * 386 + [94] * 114),
        ("sun397", [50] * 397),
        ("cars", [42] * 108 + [41] * 88),
        ("pets", [100] * 17 + [99] * 20),
    ],
)
def test_the_held_out_images_are_as_many_as_the_papers_for_the_real_number_of_training_images(name: str, counts: list[int]) -> None:
    one, labels = BY_NAME[name], real_labels(counts)
    assert len(labels) == sum(one.sizes[:2])
    rows = np.arange(len(labels))
    if isinstance(one.held_out, int):
        train, valid = hold_out_of_each(rows, labels, one.held_out, class_names=list(map(str, range(one.classes))), seed=0)
        assert set(np.bincount(labels[valid]).tolist()) == {one.held_out}
    else:
        train, valid = hold_out(rows, held_out_count(one.sizes, len(rows)), seed=0)
    assert (len(train), len(valid)) == one.sizes[:2]
    assert np.array_equal(np.sort(np.concatenate([train, valid])), rows)
    again = hold_out(rows, len(valid), seed=0)[1]
    assert not np.array_equal(again, hold_out(rows, len(valid), seed=1)[1])


def test_caltechs_sizes_are_the_papers_with_the_background_as_a_class() -> None:
    labels, names = real_labels(caltech_counts()), list(map(str, range(102)))
    test, rest = hold_out_of_each(np.arange(len(labels)), labels, 30, class_names=names, seed=0)
    train, valid = hold_out_of_each(rest, labels, 5, class_names=names, seed=1)
    assert (len(train), len(valid), len(test)) == BY_NAME["caltech101"].sizes == (2550, 510, 6084)


def test_the_sets_are_those_of_the_papers_table_10() -> None:
    # protocol.md section 8: classes, train, valid, test, metric.
    table = {
        "food101": (101, 68175, 7575, 25250, "top1"),
        "cifar10": (10, 45000, 5000, 10000, "top1"),
        "cifar100": (100, 44933, 5067, 10000, "top1"),
        "birdsnap": (500, 42405, 4981, 2443, "top1"),
        "sun397": (397, 15880, 3970, 19850, "top1"),
        "cars": (196, 6494, 1650, 8041, "top1"),
        "aircraft": (100, 3334, 3333, 3333, "mean_per_class"),
        "voc2007": (20, 2501, 2510, 4952, "map11"),
        "dtd": (47, 1880, 1880, 1880, "top1"),
        "pets": (37, 2940, 740, 3669, "mean_per_class"),
        "caltech101": (102, 2550, 510, 6084, "mean_per_class"),
        "flowers102": (102, 1020, 1020, 6149, "mean_per_class"),
        "places365": (365, 1803460 - 36500, 36500, 36500, "top1"),
    }
    assert {one.name: (one.classes, *one.sizes, one.metric) for one in SETS} == table
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_the_papers_rows_are_those_of_table_3() -> None:
    linear = [75.3, 91.3, 78.4, 57.2, 62.2, 67.8, 60.6, 82.5, 75.5, 90.4, 94.2, 96.1, 51.0]
    assert list(PAPER_LINEAR["paper: BYOL"].items()) == [(one.name, value) for one, value in zip(SETS, linear, strict=True)]
    tuned = [88.5, 97.8, 86.1, 76.3, 63.7, 91.6, 88.1, 85.4, 76.2, 91.7, 93.8, 97.0]
    assert list(PAPER_FINETUNE["paper: BYOL"].items()) == [(one.name, value) for one, value in zip(SETS, tuned, strict=False)]
    assert PAPER_LINEAR["paper: Supervised"]["cars"] == 66.7
    assert PAPER_FINETUNE["paper: Random init"] == dict(
        food101=86.9, cifar10=95.9, cifar100=80.2, birdsnap=76.1, sun397=53.6, cars=91.4, aircraft=85.9, voc2007=67.3, dtd=64.8, pets=81.5,
        caltech101=72.6, flowers102=92.0,
    )  # fmt: skip
    assert [len(row) for row in PAPER_FINETUNE.values()] == [12] * 5


# ---- settings


def test_the_paper_settings_of_the_linear_transfer_are_those_of_appendix_d_2() -> None:
    settings = TASKS["transfer linear"].versions["paper"]
    assert (settings.penalties, settings.lowest, settings.highest, settings.sets) == (45, 1e-6, 1e5, ("all",))
    assert settings.download is False
    grid = settings.grid
    assert len(grid) == 45
    assert (grid[0], grid[-1]) == pytest.approx((1e5, 1e-6))
    np.testing.assert_allclose(np.diff(np.log10(grid)), -0.25)


def test_the_paper_settings_of_fine_tuning_are_those_of_appendix_d_3() -> None:
    settings = TASKS["transfer finetune"].versions["paper"]
    assert (settings.steps, settings.global_batch, settings.momentum, settings.sets) == (20_000, 256, 0.9, ("all",))
    assert settings.smallest_crop == 0.08
    np.testing.assert_allclose(settings.rates, [10 ** (-4 + k / 2) for k in range(7)], rtol=1e-5)
    assert settings.decays[-1] == 0.0
    np.testing.assert_allclose(settings.decays[:-1], [10 ** (-6 + k / 2) for k in range(7)], rtol=1e-5)
    # Random weights: SimCLR's appendix B.8.
    assert settings.scratch_steps == 40_000
    np.testing.assert_allclose(settings.scratch_rates, [10 ** (-3 + k / 2) for k in range(7)], rtol=1e-5)
    np.testing.assert_allclose(settings.scratch_decays, [10 ** (-5 + k / 2) for k in range(8)], rtol=1e-5)
    trained, untrained = (Subject(name, "", None, "", None) for name in ("byol", "untrained"))  # type: ignore[arg-type]
    assert (len(settings.grid(trained)), settings.steps_for(trained)) == (56, 20_000)
    assert (len(settings.grid(untrained)), settings.steps_for(untrained)) == (56, 40_000)


def test_the_batch_norm_momentum_is_one_minus_the_papers_decay() -> None:
    # decay max(1 - 10 / s, 0.9): 0.9 up to a hundred steps an epoch, 0.96 at 250.
    assert [bn_momentum(steps) for steps in (1, 5, 100)] == [0.1] * 3
    assert bn_momentum(250) == pytest.approx(0.04)
    assert bn_momentum(1000) == pytest.approx(1 - max(1 - 10 / 1000, 0.9))


def test_the_binary_loss_leaves_out_what_is_difficult() -> None:
    logits, truth = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[1, -1], [0, 1]])
    by_hand = [np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-2.0)), np.log1p(np.exp(-3.0))]
    assert _binary_loss(logits, truth).item() == pytest.approx(np.mean(by_hand))


# ---- the sets in their real layouts, as torchvision's classes and the authors' archives have them


def colour(label: int, number: int) -> Image.Image:
    return Image.fromarray(np.full((20 + number % 3, 24, 3), (40 * label % 256, number % 256, 90), dtype=np.uint8))


def put(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour(label, number).save(path)


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def make_food101(root: Path) -> None:
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(("apple_pie", "waffles")):
        for split, first, count in (("train", 0, 80), ("test", 80, 5)):
            splits[split][name] = [f"{name}/{1000 + number}" for number in range(first, first + count)]
            for number, file in enumerate(splits[split][name]):
                put(root / "food-101" / "images" / f"{file}.jpg", label, number)
    for split, named in splits.items():
        lines(root / "food-101" / "meta" / f"{split}.json", json.dumps(named))


def make_cifar(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes pickles in the layout of the published ones, and gives torchvision their digests instead."""
    from torchvision import datasets

    rng, folder = np.random.default_rng(0), root / getattr(datasets, kind).base_folder
    folder.mkdir(parents=True)
    of = {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[kind]
    cls = getattr(datasets, kind)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute, each in (("train_list", 20), ("test_list", 10)):
        files = []
        for name, _ in getattr(cls, attribute):
            labels = rng.integers(0, 3, each).tolist()
            data = np.stack([np.asarray(colour(label, 0).resize((32, 32))).transpose(2, 0, 1).reshape(-1) for label in labels])
            content = {"data": data, of: labels}
            files.append([name, write(name, content)])
        monkeypatch.setattr(cls, attribute, files)
    names = ["cat", "dog", "owl"]
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": write(cls.meta["filename"], {cls.meta["key"]: names})})


def make_birdsnap(root: Path) -> None:
    for label, name in enumerate(("Acadian_Flycatcher", "Yellow_Warbler")):
        for number in range(12):
            put(root / "birdsnap" / "images" / name / f"{number}.jpg", label, number)
    lines(root / "birdsnap" / "test.txt", "Acadian_Flycatcher/3.jpg", "Yellow_Warbler/7.jpg")


def make_sun397(root: Path) -> None:
    names, folder = ("/a/abbey", "/b/bow_window/indoor"), root / "SUN397"
    lines(folder / "ClassName.txt", *names)
    files = {
        split: [f"{name}/sun_{split}{number:03d}.jpg" for name in names for number in range(count)]
        for split, count in (("a", 14), ("b", 3))
    }
    for split, partition in (("a", "Training_01.txt"), ("b", "Testing_01.txt")):
        for number, file in enumerate(files[split]):
            put(folder / file.lstrip("/"), int("bow" in file), number)
        lines(folder / partition, *files[split])
    put(folder / "a" / "abbey" / "sun_unused.jpg", 0, 0)


def make_cars(root: Path) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi TT", "BMW M3"], dtype=object)})
    for split, where, count in (("train", "devkit/cars_train_annos.mat", 20), ("test", "cars_test_annos_withlabels.mat", 6)):
        kind = [("class", "O"), ("fname", "O")]
        rows = np.array([(number % 2 + 1, f"{number:05d}.jpg") for number in range(count)], dtype=kind)
        savemat(folder / where, {"annotations": rows})
        for number in range(count):
            put(folder / f"cars_{split}" / f"{number:05d}.jpg", number % 2, number)


def make_aircraft(root: Path) -> None:
    data, names, number = root / "fgvc-aircraft-2013b" / "data", ("707-320", "An-12"), 0
    lines(data / "variants.txt", *names)
    for split, count in (("train", 6), ("val", 5), ("test", 4)):
        rows = []
        for _ in range(count):
            number += 1
            rows.append(f"{number:07d} {names[number % 2]}")
            put(data / "images" / f"{number:07d}.jpg", number % 2, number)
        lines(data / f"images_variant_{split}.txt", *rows)


def make_voc2007(root: Path) -> None:
    folder, number = root / "VOCdevkit" / "VOC2007", 0
    for split, count in (("train", 20), ("val", 20), ("test", 20)):
        ids = [f"{number + i:06d}" for i in range(count)]
        number += count
        lines(folder / "ImageSets" / "Main" / f"{split}.txt", *ids)
        for label, name in enumerate(VOC_CLASSES):
            # Image i has class i, and the next class as a difficult object.
            flags = [1 if i == label else 0 if (i + 1) % 20 == label else -1 for i in range(count)]
            lines(
                folder / "ImageSets" / "Main" / f"{name}_{split}.txt", *(f"{one} {flag:2d}" for one, flag in zip(ids, flags, strict=True))
            )
        for i, one in enumerate(ids):
            put(folder / "JPEGImages" / f"{one}.jpg", i, i)


def make_dtd(root: Path) -> None:
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        files = [f"{name}/{name}_{split}{number}.jpg" for name in ("banded", "zigzagged") for number in range(count)]
        for number, file in enumerate(files):
            put(root / "dtd" / "dtd" / "images" / file, int(file.startswith("z")), number)
        lines(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", *files)


def make_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, each in (("trainval", 23), ("test", 3)):
        rows = []
        for label, name in enumerate(("Abyssinian", "yorkshire_terrier")):
            for number in range(each):
                one = f"{name}_{split}{number}"
                put(folder / "images" / f"{one}.jpg", label, number)
                rows.append(f"{one} {label + 1} {label + 1} 1")
        lines(folder / "annotations" / f"{split}.txt", *rows)


def make_caltech101(root: Path) -> None:
    for label, (name, count) in enumerate((("BACKGROUND_Google", 33), ("Faces", 34), ("accordion", 31))):
        for number in range(count):
            put(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number + 1:04d}.jpg", label, number)
    (root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "tmp").write_bytes(b"")


def make_flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    per_split, files = {"trnid": [], "valid": [], "tstid": []}, 0
    labels: list[int] = []
    for split, each in (("trnid", 1), ("valid", 1), ("tstid", 2)):
        for label in range(102):
            for _ in range(each):
                files += 1
                labels.append(label + 1)
                per_split[split].append(files)
                put(folder / "jpg" / f"image_{files:05d}.jpg", label, files)
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(folder / "setid.mat", per_split)
    digests = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | digests)


def make_places365(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Places365

    folder = root / "places365"
    lines(folder / "categories_places365.txt", "/a/airfield 0", "/z/zen_garden 1")
    train = [(f"/{'az'[number % 2]}/{['airfield', 'zen_garden'][number % 2]}/{number:08d}.jpg", number % 2) for number in range(200)]
    val = [(f"Places365_val_{number:08d}.jpg", number % 2) for number in range(4)]
    for rows, where, file in ((train, "data_256_standard", "places365_train_standard.txt"), (val, "val_256", "places365_val.txt")):
        for number, (name, label) in enumerate(rows):
            put(folder / where / name.lstrip("/"), label, number)
        lines(folder / file, *(f"{name} {label}" for name, label in rows))

    def digest(name: str) -> tuple[str, str]:
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(Places365, "_CATEGORIES_META", digest("categories_places365.txt"))
    lists = {"train-standard": digest("places365_train_standard.txt"), "val": digest("places365_val.txt")}
    monkeypatch.setattr(Places365, "_FILE_LIST_META", Places365._FILE_LIST_META | lists)


MADE = {
    "food101": (make_food101, ("apple_pie", "waffles"), (10, 150, 10)),
    "cifar10": (lambda root, patch: make_cifar(root, "CIFAR10", patch), ("cat", "dog", "owl"), (90, 10, 10)),
    "cifar100": (lambda root, patch: make_cifar(root, "CIFAR100", patch), ("cat", "dog", "owl"), (18, 2, 10)),
    "birdsnap": (make_birdsnap, ("Acadian_Flycatcher", "Yellow_Warbler"), (20, 2, 2)),
    "sun397": (make_sun397, ("abbey", "bow_window/indoor"), (8, 20, 6)),
    "cars": (make_cars, ("Audi TT", "BMW M3"), (16, 4, 6)),
    "aircraft": (make_aircraft, ("707-320", "An-12"), (6, 5, 4)),
    "voc2007": (make_voc2007, VOC_CLASSES, (20, 20, 20)),
    "dtd": (make_dtd, ("banded", "zigzagged"), (8, 6, 4)),
    "pets": (make_pets, ("Abyssinian", "Yorkshire Terrier"), (6, 40, 6)),
    "caltech101": (make_caltech101, ("BACKGROUND_Google", "Faces", "accordion"), (75, 15, 8)),
    "flowers102": (make_flowers102, None, (102, 102, 204)),
    "places365": (make_places365, ("/a/airfield", "/z/zen_garden"), (196, 4, 4)),
}


@pytest.mark.parametrize("name", MADE)
def test_each_set_is_read_in_its_real_layout_with_every_image_and_its_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, class_names, sizes = MADE[name]
    make(tmp_path, monkeypatch) if name in ("cifar10", "cifar100", "flowers102", "places365") else make(tmp_path)
    images = open_set(BY_NAME[name], tmp_path, download=False, seed=0)
    assert (len(images.train), len(images.valid), len(images.test)) == sizes
    if class_names is not None:
        assert images.class_names == class_names
    rows = np.concatenate([images.train, images.valid, images.test])
    assert len(set(rows.tolist())) == len(rows) == sum(sizes)
    assert f"{name}: its classes" in images.notes[0]  # the paper's sizes are others
    source = images.open_source()
    heights, widths = source.sizes(rows[:20])
    for row, image, height, width in zip(rows[:20].tolist(), source.decode(rows[:20]), heights, widths, strict=True):
        assert image.shape == (height, width, 3)
        label = int(np.flatnonzero(images.labels[row] == 1)[0]) if name == "voc2007" else int(images.labels[row])
        assert abs(int(image[10, 10, 0]) - 40 * label % 256) <= 6  # the colour says the class; JPEG changes it a little


def make_own(root: Path, **counts: int) -> Path:
    """Writes a folder of two classes in each split, with so many images of each."""
    for split, count in counts.items():
        for label, name in enumerate(("left", "right")):
            for number in range(count):
                put(root / split / name / f"{number}.jpg", label, number)
    return root


def test_a_folder_of_ones_own_keeps_its_three_splits_and_without_test_holds_a_fifth_of_each_class_out(tmp_path: Path) -> None:
    three = open_set(make_own(tmp_path / "three", train=6, val=3, test=2), tmp_path, download=False, seed=0)
    assert three.sizes == {"train": 12, "valid": 6, "test": 4}
    assert three.labels[three.valid].tolist() == [0] * 3 + [1] * 3
    two = open_set(make_own(tmp_path / "two", train=10, val=3), tmp_path, download=False, seed=0)
    assert two.sizes == {"train": 16, "valid": 4, "test": 6}
    assert np.bincount(two.labels[two.valid]).tolist() == [2, 2]
    source = two.open_source()
    assert {source.image_name(row).split("/")[0] for row in two.test.tolist()} == {"val"}
    assert {source.image_name(row).split("/")[0] for row in [*two.train.tolist(), *two.valid.tolist()]} == {"train"}


def test_split_files_say_which_images_are_for_validation_and_test(tmp_path: Path) -> None:
    make_own(tmp_path / "own", images=6)
    lines(tmp_path / "own" / "test.txt", "left/0.jpg", "right/5.jpg")
    lines(tmp_path / "own" / "valid.txt", "left/1.jpg", "right/1.jpg", "right/2.jpg")
    images = open_set(tmp_path / "own", tmp_path, download=False, seed=0)
    assert images.sizes == {"train": 7, "valid": 3, "test": 2}
    names = [images.open_source().image_name(row) for row in images.valid.tolist()]
    assert names == ["left/1.jpg", "right/1.jpg", "right/2.jpg"]
    lines(tmp_path / "own" / "valid.txt", "left/0.jpg", "right/1.jpg")
    with pytest.raises(UserError, match="left/0.jpg is a test image too"):
        open_set(tmp_path / "own", tmp_path, download=False, seed=0)


def test_a_set_of_the_paper_may_lie_as_folders_of_its_name_with_the_papers_way_of_holding_out(tmp_path: Path) -> None:
    make_own(tmp_path / "pets", train=22, test=3)
    images = open_set(BY_NAME["pets"], tmp_path, download=False, seed=0)
    assert images.sizes == {"train": 4, "valid": 40, "test": 6}
    assert images.metric == "mean_per_class"


def test_lists_that_name_files_elsewhere_or_classes_that_are_not_there_are_refused(tmp_path: Path) -> None:
    make_food101(tmp_path)
    meta = tmp_path / "food-101" / "meta" / "train.json"
    named = json.loads(meta.read_text())
    meta.write_text(json.dumps(named | {"waffles": ["../../../secret"]}))
    with pytest.raises(UserError, match="names .*secret.jpg, outside of it"):
        open_set(BY_NAME["food101"], tmp_path, download=False, seed=0)
    make_pets(tmp_path)
    lines(tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt", "Abyssinian_test0 7 1 1")
    with pytest.raises(UserError, match="a label is 0 or 6, and there are 2 classes"):
        open_set(BY_NAME["pets"], tmp_path, download=False, seed=0)


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import DTD

    monkeypatch.setattr(DTD, "_URL", "http://127.0.0.1:9/dtd.tar.gz")
    with pytest.raises(UserError, match=r"dtd: cannot be opened \(.*refused.*expected dtd/dtd/images"):
        open_set(BY_NAME["dtd"], tmp_path, download=True, seed=0)
    with pytest.raises(UserError, match="cars: not in"):
        open_set(BY_NAME["cars"], tmp_path, download=True, seed=0)


def test_the_linear_transfer_sees_the_whole_short_side_and_the_test_of_fine_tuning_seven_eighths() -> None:
    height, width = np.array([300, 40]), np.array([500, 32])
    whole = centre_crop_parameters(height=height, width=width, share=1.0)
    columns = [CROP_Y, CROP_X, CROP_H, CROP_W]
    assert whole[:, 0, columns].tolist() == [[0, 100, 300, 300], [4, 0, 32, 32]]
    seven_eighths = centre_crop_parameters(height=height, width=width, share=TEST_SHARE)
    assert seven_eighths[:, 0, CROP_H].tolist() == [262, 28]


def test_simclrs_settings_are_noted_only_where_an_untrained_network_has_them() -> None:
    paper, quick = (TASKS["transfer finetune"].versions[name] for name in ("paper", "quick"))
    both, trained = SimpleNamespace(subjects=(subject(), subject("untrained"))), SimpleNamespace(subjects=(subject(),))
    (note,) = _scratch_notes(both, paper)
    assert "SimCLR's settings for random weights (appendix B.8)" in note
    assert _scratch_notes(trained, paper) == _scratch_notes(both, quick) == []
    (own,) = _scratch_notes(both, replace(paper, scratch_steps=9))
    assert "SimCLR" not in own
