"""kNN during training: the figure equals an evaluation's, and training is the same without it."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol import load_encoder
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, ModelConfig, MonitorsConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader
from fastbyol.evaluation.features import extract_features
from fastbyol.evaluation.knn import knn_predict
from fastbyol.evaluation.online_knn import OnlineKnn, build_online_knn, choose_images
from fastbyol.models import build_encoder, encoder_from
from fastbyol.ranks.process_group import Process
from fastbyol.run.log import read_metrics
from fastbyol.train import main
from tests.commands import SMALL_RUN, state_digest
from tests.images import write_files

MAIN = Process(rank=0, world_size=1, device=torch.device("cpu"))
SMALL = (*SMALL_RUN, "--epochs", "2", "--checkpoint_every", "100", "--precision.autocast", "off")
NUM_IMAGES = 25


def _config(train: Path, val: Path, **monitors: object) -> TrainConfig:
    return TrainConfig(
        global_batch=8,
        model=ModelConfig(encoder="resnet8", stem="small2"),
        views=ViewPair(size_px=32),
        data=DataConfig(train=str(train), val=str(val), workers=1),
        monitors=MonitorsConfig(**{"knn_every_epochs": 1.0, **monitors}),  # type: ignore[arg-type]
    )


def _both(train: Path, val: Path) -> closing[OnlineKnn]:
    return closing(_online_knn(_config(train, val)))


def _online_knn(config: TrainConfig, *, first_step: int = 0, total_steps: int = 6) -> OnlineKnn:
    return OnlineKnn(config, MAIN, num_samples=NUM_IMAGES, first_step=first_step, total_steps=total_steps)


@pytest.fixture(scope="module")
def runs(data_paths, tmp_path_factory) -> tuple[Path, Path]:
    """Runs the same training without kNN and with kNN on every step."""
    without, with_knn = (tmp_path_factory.mktemp("runs") / name for name in ("without", "with"))
    main([*SMALL, "--data.train", str(data_paths["ffcv"]), "--out", str(without)])
    main([*SMALL, *_with_knn(data_paths), "--out", str(with_knn)])
    return without, with_knn


def _with_knn(data_paths: dict[str, Path]) -> tuple[str, ...]:
    data = ("--data.train", str(data_paths["ffcv"]), "--data.val", str(data_paths["folder"]))
    return (*data, "--monitors.knn_every_epochs", "0.01")


def test_training_is_bitwise_the_same_with_and_without_online_knn(runs):
    losses = [[record["loss"] for record in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1]
    assert state_digest(runs[0]) == state_digest(runs[1]), "weights and BN statistics"


def test_the_last_record_holds_what_an_evaluation_of_the_last_checkpoint_says(runs, data_paths):
    assert ["knn_top1" in record for record in read_metrics(runs[0])] == [False] * 6
    records = read_metrics(runs[1])
    assert all(0 <= record["knn_top1"] <= 1 for record in records)
    views = ViewPair(size_px=32)
    encoder = load_encoder(runs[1])
    train, val = (extract_features(encoder, build_image_loader(data_paths[b], views=views, batch=4)) for b in ("ffcv", "folder"))
    scores = knn_predict(train, val.feature, num_classes=3, k=20)
    assert records[-1]["knn_top1"] == pytest.approx(float((scores.argmax(dim=1) == val.label).double().mean()))


def test_val_may_be_converted_where_train_has_its_labels_from_folders(data_paths):
    config = _config(data_paths["folder"], data_paths["ffcv"])
    with closing(_online_knn(replace(config, data=replace(config.data, labels="folders")))) as knn:
        assert knn.num_classes == 3


def test_a_rank_without_val_images_counts_none(data_paths):
    config = _config(data_paths["folder"], data_paths["ffcv"])
    with closing(_online_knn(config)) as knn:
        knn._val_index = knn._val_index[:0]
        assert knn.top1(build_encoder("resnet8", stem="small2")) == 0.0


def test_a_run_may_be_continued_with_online_knn(runs, data_paths):
    main([*SMALL, *_with_knn(data_paths), "--monitors.stop_on_collapse", "false", "--out", str(runs[0])])
    assert len(read_metrics(runs[0])) == 6


@pytest.mark.distributed
def test_two_ranks_share_the_work_and_find_what_one_process_finds(data_paths, two_ranks):
    """25 images do not split evenly over two ranks; and without cross-replica BN each rank has statistics of its own."""
    run = two_ranks["own statistics"]
    records = read_metrics(run)
    assert ["knn_top1" in record for record in records] == [False, False, False, True, False, True]  # epoch 1 ends within step 4
    with _both(data_paths["ffcv"], data_paths["folder"]) as one:
        assert records[-1]["knn_top1"] == pytest.approx(one.top1(load_encoder(run)))


def test_it_is_due_after_each_period_and_at_the_end_even_if_steps_in_between_are_skipped(data_paths):
    config = _config(data_paths["folder"], data_paths["folder"])  # 25 / 8 = 3.125 steps an epoch
    online_knn = _online_knn(config, total_steps=11)
    assert [done for done in range(1, 12) if online_knn.due(done)] == [4, 7, 10, 11]
    resumed = _online_knn(config, first_step=5, total_steps=11)
    assert [done for done in (6, 9, 11) if resumed.due(done)] == [9, 11]
    for one in (online_knn, resumed):
        one.close()


def test_the_encoder_is_left_as_it_was(data_paths):
    online_knn = _online_knn(_config(data_paths["ffcv"], data_paths["folder"], knn_images=10))
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    online_knn.top1(encoder)
    online_knn.close()
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_choice_of_images_is_always_the_same_and_covers_the_whole_set():
    chosen = choose_images(10_000, at_most=500)
    assert np.array_equal(chosen, choose_images(10_000, at_most=500))
    assert len(set(chosen.tolist())) == 500
    assert (np.diff(chosen) > 0).all()
    # The mean of 500 of them has a standard deviation of 10,000 / sqrt(12 * 500) = 129.
    assert abs(chosen.mean() - 5000) < 4 * 129
    assert choose_images(7, at_most=500).tolist() == list(range(7))


def test_no_period_means_no_knn(data_paths):
    config = TrainConfig(data=DataConfig(train=str(data_paths["folder"])))
    assert build_online_knn(config, MAIN, num_samples=25, first_step=0, total_steps=6) is None


def test_val_with_other_classes_or_missing_is_refused_by_its_name(data_paths, tmp_path):
    other = write_files(tmp_path / "other", {f"{name}/1.jpg": Image.new("RGB", (32, 32)) for name in ("dog", "eel")})
    with pytest.raises(UserError, match=r"data.val = .*classes differ from data.train's in \['ant', 'bee', 'cat', 'dog', 'eel'\]"):
        _online_knn(_config(data_paths["folder"], other))
    with pytest.raises(UserError, match="data.val = none: no such file or folder"):
        _online_knn(_config(data_paths["folder"], Path("none")))


def test_classes_that_one_split_lacks_and_images_without_a_label_are_left_out(data_paths, tmp_path):
    shutil.copytree(data_paths["folder"], tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "ant")
    with _both(data_paths["folder"], tmp_path / "val") as knn:
        torch.manual_seed(0)
        encoder = encoder_from(ModelConfig(encoder="resnet8", stem="small2"))
        assert 0.0 <= knn.top1(encoder) <= 1.0
        features = knn._all_features(encoder)
        assert (features.label == -1).sum() == 8, "ants"
        assert len(features.labelled().label) == 17
        knn._val._labels = np.full_like(knn._val._labels, -1)
        assert knn.top1(encoder) == 0.0


@pytest.mark.parametrize(
    ("data", "monitors", "says"),
    [
        ({"val": "x"}, {}, "data.val = 'x': has no effect without monitors.knn_every_epochs"),
        ({}, {"knn_every_epochs": 2.0}, "monitors.knn_every_epochs = 2: needs data.val"),
        ({}, {"knn_every_epochs": -1.0}, "monitors.knn_every_epochs = -1"),
        ({}, {"knn_every_epochs": float("nan")}, "monitors.knn_every_epochs = nan"),
        ({}, {"knn_images": 0}, "monitors.knn_images = 0"),
        ({}, {"collapse_patience": 0}, "monitors.collapse_patience = 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, monitors, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(data=DataConfig(**data), monitors=MonitorsConfig(**monitors))
