"""Linear and kNN evaluation, their baselines and the passes over the images, against closed forms, loops and scikit-learn."""

from __future__ import annotations

import json
import math
import weakref

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ImageBatch
from fastbyol.evaluation.features import Features, extract_features, pixel_features
from fastbyol.evaluation.knn import knn_predict, nearest
from fastbyol.evaluation.linear import fit_linear, held_out_mask
from fastbyol.evaluation.protocols import DEFAULT_SETTINGS, evaluate_knn, evaluate_linear, top_k_accuracy
from fastbyol.evaluation.result_file import read_current, read_result, write_or_say, write_result
from fastbyol.evaluation.splits import Split, Splits, common_classes, split_paths, why_unscored
from fastbyol.evaluation.subjects import FeatureBank, pca_features, set_batchnorm_statistics, untrained_encoder

NUM_CLASSES = 3
SIZE_PX = 8


def clusters(*, num: int, dim: int = 5, seed: int = 0, spread: float = 1.0) -> Features:
    """Points around one random centre for each class; the centres do not depend on the seed."""
    centres = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(99)) * 2
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num) % NUM_CLASSES
    return Features(centres[label] + spread * torch.randn(num, dim, generator=generator), label, torch.arange(num))


class StoredImages:
    """An image loader over tensors, which counts its passes."""

    def __init__(self, num: int, *, seed: int = 0, batch: int = 4, class_names: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.num_samples, self.class_names, self.passes, self.batch = num, class_names, 0, batch
        self.label = torch.arange(num) % len(class_names)
        noise = torch.randn(num, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(seed))
        self.image = noise * 0.1 + nn.functional.one_hot(self.label, 3).view(num, 3, 1, 1)  # a colour for each class

    def __iter__(self):
        return self.batches_of(np.arange(self.num_samples))

    def batches_of(self, index):
        self.passes += 1
        for rows in torch.from_numpy(index).split(self.batch):
            yield ImageBatch(self.image[rows], self.label[rows], rows)

    def image_names(self) -> list[str]:
        return [f"{number}.jpg" for number in range(self.num_samples)]

    def close(self) -> None:
        pass


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.training_seen: list[bool] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.training_seen.append(self.training)
        return self.bn(image).mean(dim=(2, 3))


def test_features_hold_every_image_once_in_order_and_leave_the_encoder_as_it_was():
    loader, encoder = StoredImages(10), Encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = extract_features(encoder, loader)
    assert features.index.tolist() == list(range(10))
    assert features.label.tolist() == loader.label.tolist()
    expected = loader.image.double().mean(dim=(2, 3)) / math.sqrt(1 + encoder.bn.eps)
    torch.testing.assert_close(features.feature.double(), expected, rtol=1e-5, atol=1e-6)
    assert encoder.training
    assert not any(encoder.training_seen)
    assert not features.feature.requires_grad
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_images_are_let_go_once_their_features_are_there():
    """All of ImageNet would not fit into memory."""

    def images(extract) -> None:
        alive: list[weakref.ref] = []

        def batches():
            for batch in StoredImages(12):
                assert sum(ref() is not None for ref in alive) <= 1
                alive.append(weakref.ref(batch.image))
                yield batch
                del batch

        extract(batches())
        assert len(alive) > 2

    images(lambda batches: extract_features(Encoder(), batches))
    images(pixel_features)


def test_a_loader_that_repeats_or_skips_an_image_is_refused():
    batch = ImageBatch(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="exactly once"):
        pixel_features([batch])
    with pytest.raises(UserError, match="no images"):
        pixel_features([])


def test_features_that_are_not_finite_are_a_one_line_error():
    class Diverged(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean(dim=(2, 3)) * torch.nan

    with pytest.raises(UserError, match="not finite"):
        extract_features(Diverged(), StoredImages(4))


def test_pixel_features_are_the_pixels_and_average_larger_images():
    loader = StoredImages(5)
    assert torch.equal(pixel_features(loader).feature, loader.image.flatten(1))
    small = pixel_features(loader, side_px=4).feature.view(5, 3, 4, 4)
    expected = loader.image[2, 1, 2:4, 4:6].double().mean()
    assert small[2, 1, 1, 2].item() == pytest.approx(expected.item(), abs=1e-6)


def test_top_k_counts_hits_and_never_a_class_without_support():
    score = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, -torch.inf, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    label = torch.tensor([0, 1, 0, 1])
    assert top_k_accuracy(score, label, k=1) == 0.5
    assert top_k_accuracy(score, label, k=2) == 0.75
    assert top_k_accuracy(score, label, k=5) == 0.75


def loop_knn(train: Features, val: torch.Tensor, *, k: int, temperature: float) -> np.ndarray:
    """Reference in float64: one query, one neighbour, one vote at a time."""
    keys, votes = train.feature.double().numpy(), np.zeros((len(val), NUM_CLASSES))
    for row, query in enumerate(val.double().numpy()):
        cosine = [float(query @ key / math.sqrt(query @ query) / math.sqrt(key @ key)) for key in keys]
        for place in sorted(range(len(keys)), key=lambda i: -cosine[i])[:k]:
            votes[row, train.label[place]] += math.exp(cosine[place] / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (12, 1.0)])
def test_knn_votes_as_a_float64_loop(k, temperature, monkeypatch):
    monkeypatch.setattr("fastbyol.evaluation.knn.SIMILARITIES_AT_ONCE", 50)  # several chunks
    train, val = clusters(num=30, spread=3.0), clusters(num=11, seed=1, spread=3.0).feature
    votes = loop_knn(train, val, k=k, temperature=temperature)
    score = knn_predict(train, val, num_classes=NUM_CLASSES, k=k, temperature=temperature).exp().numpy()
    np.testing.assert_allclose(score / score.sum(1, keepdims=True), votes / votes.sum(1, keepdims=True), rtol=1e-4, atol=1e-9)


def test_knn_is_right_on_separable_data_at_any_temperature():
    train, val = clusters(num=60, spread=0.05), clusters(num=21, seed=1, spread=0.05)
    for temperature in (1e-4, 0.07, 10.0):
        score = knn_predict(train, val.feature, num_classes=NUM_CLASSES, k=20, temperature=temperature)
        assert top_k_accuracy(score, val.label, k=1) == 1.0


def test_knn_with_more_neighbours_than_images_names_the_way_out():
    train = clusters(num=6)
    with pytest.raises(UserError, match="k = 7: the training set has only 6 images"):
        nearest(train.feature, train.feature, k=7)
    with pytest.raises(UserError, match="temperature"):
        knn_predict(train, train.feature, num_classes=NUM_CLASSES, k=3, temperature=0.0)


def test_linear_gives_scikit_learns_classifier_of_the_chosen_penalty():
    train, val = clusters(num=90, spread=3.0), clusters(num=40, seed=1, spread=3.0)
    fitted = fit_linear(train, num_classes=NUM_CLASSES, l2_grid=(0.03,))
    feature = train.feature.double().numpy()
    mean, std = feature.mean(0), feature.std(0)
    model = LogisticRegression(C=1 / (0.03 * 90), tol=1e-8, max_iter=10_000).fit((feature - mean) / std, train.label.numpy())
    expected = torch.from_numpy(model.predict_log_proba((val.feature.double().numpy() - mean) / std))
    torch.testing.assert_close(fitted.scores(val.feature).log_softmax(1).double(), expected, rtol=1e-3, atol=1e-3)


def test_linear_keeps_the_penalty_that_is_best_on_held_out_training_images():
    train = clusters(num=60, spread=2.0)
    fitted = fit_linear(train, num_classes=NUM_CLASSES, l2_grid=(100.0, 0.01))
    held_out = held_out_mask(train.label.numpy(), share=0.2, seed=0)
    feature = ((train.feature - train.feature.mean(0)) / train.feature.std(0, correction=0)).numpy()
    for l2, top1 in fitted.held_out_top1.items():
        model = LogisticRegression(C=1 / (l2 * (~held_out).sum()), max_iter=1000).fit(feature[~held_out], train.label[~held_out])
        assert top1 == pytest.approx(model.score(feature[held_out], train.label[held_out]), abs=1 / held_out.sum())
    assert fitted.held_out_top1[fitted.l2] == max(fitted.held_out_top1.values())


def test_two_classes_a_constant_feature_and_an_unseen_class_are_handled():
    label = torch.arange(20) % 2 * 2  # classes 0 and 2 of three
    feature = torch.stack([label - 1.0 + 0.01 * torch.arange(20), torch.full((20,), 7.0)], dim=1)
    fitted = fit_linear(Features(feature, label, torch.arange(20)), num_classes=NUM_CLASSES)
    score = fitted.scores(feature)
    assert top_k_accuracy(score, label, k=1) == 1.0
    assert torch.isneginf(score[:, 1]).all()


def test_the_held_out_part_takes_its_share_of_every_class_and_never_a_whole_class():
    label = np.array([0] * 10 + [1] * 5 + [2] * 2 + [3])
    mask = held_out_mask(label, share=0.2, seed=3)
    assert [int(mask[label == c].sum()) for c in range(4)] == [2, 1, 1, 0]
    assert (mask == held_out_mask(label, share=0.2, seed=3)).all()
    assert (mask != held_out_mask(label, share=0.2, seed=4)).any()
    with pytest.raises(UserError, match="single image"):
        held_out_mask(np.arange(4), share=0.2, seed=0)
    with pytest.raises(UserError, match="at least 2"):
        fit_linear(Features(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), torch.arange(4)), num_classes=1)


def test_pca_features_are_the_singular_value_decomposition_of_the_training_pixels():
    train, val = clusters(num=40, dim=6), clusters(num=9, dim=6, seed=1)
    projected_train, projected_val = pca_features(train, val, components=3)
    mean = train.feature.double().mean(0)
    _, _, axes = torch.linalg.svd(train.feature.double() - mean, full_matrices=False)
    for projected, original in ((projected_train, train), (projected_val, val)):
        expected = (original.feature.double() - mean) @ axes[:3].T
        torch.testing.assert_close(projected.feature.double().abs(), expected.abs(), rtol=1e-4, atol=1e-4)
    assert pca_features(train, val)[0].feature.shape == (40, 6)


def test_batchnorm_statistics_are_the_average_over_equal_batches():
    images, encoder = torch.randn(12, 3, 5, 5) * 3 + 2, Encoder()
    set_batchnorm_statistics(encoder, images, batch=4)
    parts, statistics = images.double().view(3, 4, 3, 5, 5), encoder.bn.state_dict()
    torch.testing.assert_close(statistics["running_mean"].double(), parts.mean(dim=(1, 3, 4)).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics["running_var"].double(), parts.var(dim=(1, 3, 4)).mean(0), rtol=1e-5, atol=1e-5)
    assert encoder.bn.momentum == 0.1


def tiny_config() -> TrainConfig:
    model = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)
    return TrainConfig(epochs=1, global_batch=4, model=model, views=ViewPair(size_px=SIZE_PX))


def test_the_untrained_encoder_has_the_runs_first_weights_and_touches_no_global_generator():
    from fastbyol.byol import build_byol

    config = tiny_config()
    torch.manual_seed(config.seed)
    first = dict(build_byol(config.model, num_classes=3).online.encoder.named_parameters())
    images = torch.randn(8, 3, SIZE_PX, SIZE_PX)
    before = torch.random.get_rng_state()
    encoder = untrained_encoder(config, images)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in encoder.named_parameters():
        assert torch.equal(value, first[name]), name
    assert not encoder.training


def make_bank(*, val_label: torch.Tensor | None = None) -> tuple[FeatureBank, StoredImages]:
    train, val = StoredImages(30), StoredImages(12, seed=1)
    if val_label is not None:
        val.label = val_label
    splits = Splits(train=Split(train, size_px=SIZE_PX), val=Split(val, size_px=SIZE_PX))
    return FeatureBank(Encoder(), config=tiny_config(), splits=splits), train


def test_protocols_score_every_subject_and_share_one_pass_over_the_images(tmp_path):
    bank, loader = make_bank()
    linear, knn = evaluate_linear(bank), evaluate_knn(bank, k=5)
    assert loader.passes == 1
    for result in (linear, knn):
        assert list(result.scores) == ["byol", "untrained", "pca"]
        assert result.scores["byol"].top1 == 1.0  # the mean colour tells the class
        assert (result.num_train, result.num_val, result.num_classes) == (30, 12, 3)
        assert result.chance_top1 == pytest.approx(1 / 3)
    path = write_result(linear, tmp_path, step=7, data="d", inputs="w", command="c")
    assert read_result(path) == (linear, {"step": 7, "data": "d", "inputs": "w", "command": "c"})
    settings = DEFAULT_SETTINGS["linear"]
    assert linear.settings == settings
    assert read_current(tmp_path, "linear", step=7, data="d", inputs="w", settings=settings) is not None
    assert read_current(tmp_path, "linear", step=8, data="d", inputs="w", settings=settings) is None
    assert read_current(tmp_path, "knn", step=7, data="d", inputs="w", settings=settings) is None
    path.write_text("{}")
    with pytest.raises(UserError, match="evaluate again"):
        read_result(path)
    assert read_current(tmp_path, "linear", step=7, data="d", inputs="w", settings=settings) is None, "a report evaluates anew"


def test_the_choice_of_penalty_does_not_see_the_val_labels():
    honest = evaluate_linear(make_bank()[0])
    shuffled = evaluate_linear(make_bank(val_label=torch.arange(12).flip(0) % 3)[0])
    assert honest.scores["byol"].top1 != shuffled.scores["byol"].top1
    for subject, score in honest.scores.items():
        assert score.chosen == shuffled.scores[subject].chosen


def test_a_split_too_large_for_memory_is_read_again_and_gives_the_same():
    loader = StoredImages(10)
    split = Split(loader, size_px=SIZE_PX, held_bytes=0)
    wanted = torch.tensor([7, 2, 7])
    for _ in range(2):
        assert torch.equal(split.pick(wanted), loader.image[wanted])
    assert loader.passes == 2


def test_a_split_of_some_images_numbers_them_from_0_and_asks_for_no_others():
    loader = StoredImages(10)
    split = Split(loader, size_px=SIZE_PX, held_bytes=0, positions=np.array([2, 5, 9]))
    features = pixel_features(split)
    assert features.index.tolist() == [0, 1, 2]
    assert features.label.tolist() == loader.label[[2, 5, 9]].tolist()
    assert torch.equal(features.feature, loader.image[[2, 5, 9]].flatten(1))
    assert torch.equal(split.pick(torch.tensor([2, 0, 2])), loader.image[[9, 2, 9]])
    assert [split.name(row) for row in range(3)] == ["2.jpg", "5.jpg", "9.jpg"]


def test_a_loader_that_yields_other_images_than_it_was_asked_for_is_refused():
    loader = StoredImages(10)
    loader.batches_of = lambda index: StoredImages.batches_of(loader, index[::-1].copy())
    with pytest.raises(RuntimeError, match="in that order"):
        list(Split(loader, size_px=SIZE_PX))


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        ({"a": 2, "b": 1}, {"b": 1, "a": 1}, ""),
        ({}, {"a": 1}, "train has no labels"),
        ({"a": 2, "b": 1}, {"a": 0}, "val has no labels"),
        ({"a": 2, "b": 0}, {"a": 1, "b": 1}, "all labelled images of train are of one class, 'a'"),
        ({"a": 2, "b": 1}, {"c": 1, "d": 1}, "no class is in both train and val, such as ['a', 'b', 'c', 'd']"),
        ({"a": 2, "b": 1}, {"b": 1, "d": 1}, "only the class 'b' is in both train and val"),
    ],
)
def test_accuracy_needs_two_classes_with_images_in_both_splits(train, val, says):
    assert why_unscored(train, val) == says


def test_splits_are_found_as_files_or_folders_and_a_missing_one_names_both_places(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val.beton").write_bytes(b"x")
    assert split_paths(tmp_path) == (str(tmp_path / "train"), str(tmp_path / "val.beton"))
    (tmp_path / "train").rename(tmp_path / "photos")
    with pytest.raises(UserError) as error:
        split_paths(tmp_path)
    assert str(tmp_path / "train") in str(error.value)
    assert str(tmp_path / "train.beton") in str(error.value)
    (tmp_path / "val.beton").unlink()
    assert split_paths(tmp_path) == (str(tmp_path), ""), "a folder of neither is the images themselves"


def test_train_and_val_of_different_classes_are_refused():
    train, val = (Split(StoredImages(6, class_names=names), size_px=SIZE_PX) for names in (("a", "b"), ("a", "c")))
    with pytest.raises(UserError, match=r"\['b', 'c'\]"):
        Splits(train=train, val=val)


def test_unlabelled_images_are_not_used_in_any_figure():
    bank, train = make_bank()
    whole = {
        name: evaluate(bank, **options) for name, evaluate, options in (("linear", evaluate_linear, {}), ("knn", evaluate_knn, {"k": 5}))
    }
    bank, train = make_bank(val_label=torch.tensor([-1, 1, 2] * 4))
    train.label[::5] = -1
    for name, evaluate, options in (("linear", evaluate_linear, {}), ("knn", evaluate_knn, {"k": 5})):
        result = evaluate(bank, **options)
        assert (result.num_train, result.num_val, result.chance_top1) == (24, 8, 0.5)
        assert result.scores["byol"].top1 == whole[name].scores["byol"].top1 == 1.0
    bank, _ = make_bank(val_label=torch.full((12,), -1))
    with pytest.raises(UserError, match="val has no image with a label"):
        evaluate_knn(bank, k=5)


def test_splits_are_evaluated_on_the_classes_that_both_have_and_the_others_are_reported(caplog):
    names = common_classes(("a", "b", "c"), ("b", "c", "d"))
    assert names == ("b", "c")
    assert "1 classes are in train only, their images are left out of the figures: 'a'" in caplog.text
    assert "1 classes are in val only, their images are left out of the figures: 'd'" in caplog.text
    train = Split(StoredImages(30), size_px=SIZE_PX, class_names=names)
    val = Split(StoredImages(12, seed=1, class_names=("b", "c", "d")), size_px=SIZE_PX, class_names=names)
    assert [int(label) for batch in train for label in batch.label][:4] == [-1, 0, 1, -1]
    assert [int(label) for batch in val for label in batch.label][:4] == [0, 1, -1, 0]
    result = evaluate_knn(FeatureBank(Encoder(), config=tiny_config(), splits=Splits(train=train, val=val)), k=5)
    assert (result.num_train, result.num_val, result.num_classes) == (20, 8, 2)
    with pytest.raises(UserError, match="none is in both"):
        common_classes(("a",), ("b",))


def test_each_data_set_and_settings_have_a_file_of_their_own_and_a_later_result_on_them_replaces_the_earlier_one(tmp_path, capsys):
    bank = make_bank()[0]
    five, seven = evaluate_knn(bank, k=5), evaluate_knn(bank, k=7)
    writes = [(five, "a", 1), (five, "b", 1), (five, "a", 2), (seven, "a", 2), (five, "b", 1), (seven, "a", 3)]
    paths = [write_result(result, tmp_path, data=data, step=step, inputs="w") for result, data, step in writes]
    assert [path.name for path in paths] == ["knn.json", "knn-2.json", "knn.json", "knn-3.json", "knn-2.json", "knn-3.json"]

    def current(step: int, data: str, settings: dict, inputs: str = "w") -> object:
        return read_current(tmp_path, "knn", step=step, data=data, inputs=inputs, settings=settings)

    assert current(1, "b", five.settings) == (five, {"data": "b", "step": 1, "inputs": "w"})
    assert current(1, "b", seven.settings) == (five, {"data": "b", "step": 1, "inputs": "w"}), "the only one"
    assert current(1, "b", five.settings, inputs="other weights or images") is None
    assert current(1, "a", five.settings) is None
    write_result(seven, tmp_path, data="a", step=2, inputs="w")
    assert current(2, "a", seven.settings) == (seven, {"data": "a", "step": 2, "inputs": "w"})
    (tmp_path / "knn.json").write_text("damaged")
    assert write_result(five, tmp_path, data="d", step=1).name == "knn.json"


def test_a_result_of_an_earlier_version_is_read_but_computed_anew(tmp_path):
    result = evaluate_knn(make_bank()[0], k=5)
    path = write_result(result, tmp_path, data="a", step=1, inputs="w")
    record = json.loads(path.read_text())
    del record["comparisons"]
    path.write_text(json.dumps(record))
    assert read_result(path)[0].scores == result.scores
    assert read_current(tmp_path, "knn", step=1, data="a", inputs="w", settings=result.settings) is None
    assert write_result(result, tmp_path, data="a", step=1) == path


def test_figures_that_cannot_be_written_are_still_shown(tmp_path, capsys):
    (tmp_path / "evaluation").write_text("a file in the folder's place")
    write_or_say(evaluate_knn(make_bank()[0], k=5), tmp_path / "evaluation", data="a", step=1)
    assert "cannot be written (File exists), so the knn figures are only shown; use --out to save them elsewhere" in capsys.readouterr().err
