"""evaluate depth: up-projections against unpooling with zeros, the loss and scores by hand, NYU v2's layout, what is refused, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.io import savemat

from fastbyol.config.errors import UserError
from fastbyol.evaluation.tasks import depth, segmentation
from fastbyol.evaluation.tasks.dense.nyu import LABELLED, open_frames
from fastbyol.evaluation.tasks.depth import (
    QUICK,
    DepthImages,
    DepthNetwork,
    DepthSettings,
    depth_scores,
    depth_statistics,
    reverse_huber,
)
from fastbyol.evaluation.tasks.segmentation import pixel_loss
from fastbyol.evaluation.tasks.training import TaskStopped
from fastbyol.models import build_encoder
from fastbyol.models.backbone import backbone_of
from fastbyol.models.fast_up_projection import FastUpProjection, UpConvolution, UpProjectionDecoder
from tests.dense_jobs import TINY, make_job, tiny_encoder
from tests.forked import start_ranks
from tests.test_report import call

SMALL = dataclasses.replace(QUICK, steps=4, batch_images=4, test_images=6, first_channels=8, up_channels=(4,), crop_px=(32, 40))


# ---- the paper's protocol


def test_the_defaults_are_the_papers_settings() -> None:
    paper = DepthSettings()
    assert depth.TASKS["depth"].versions["paper"] == paper
    assert (paper.steps, paper.batch_images, paper.weight_decay, paper.lr) == (7500, 256, 5e-4, 0.16)
    # 640 x 480 -> x .5 -> centre crop 304 x 228.
    assert (paper.frame_scale, paper.crop_px, paper.flip_p, paper.gray_p) == (0.5, (228, 304), 0.5, 0.3)
    assert (paper.brightness, paper.saturation, paper.hue) == (0.1255, (0.5, 1.5), 0.2)
    assert (paper.first_channels, paper.up_channels, paper.huber_share) == (1024, (512, 256, 128, 64), 0.2)
    assert (paper.drop_at, paper.test_images) == ((), 0)
    assert depth.PAPER_ROWS["paper, BYOL ResNet-50"] == {"pct1": 84.6, "pct2": 96.7, "pct3": 99.1, "rms": 0.541, "rel": 0.129}


def test_the_decoder_on_a_torchvision_resnet_has_the_parameters_and_shapes_of_fcrn() -> None:
    encoder = build_encoder("resnet50")
    theirs = torchvision.models.resnet50().state_dict()
    weights = {name: value for name, value in theirs.items() if not name.startswith("fc.")}
    encoder.load_state_dict(weights)
    network = DepthNetwork(backbone_of(encoder), first_channels=1024, up_channels=(512, 256, 128, 64)).eval()
    own = network.state_dict()
    assert all(torch.equal(own[f"backbone.encoder.{name}"], value) for name, value in weights.items())
    count = 2048 * 1024 + 2 * 1024 + 64 * 9 + 1
    for a, b in ((1024, 512), (512, 256), (256, 128), (128, 64)):
        # Twice 9 + 6 + 6 + 4 taps, a 3x3 convolution, three batch norms.
        count += 2 * 25 * a * b + 9 * b * b + 3 * 2 * b
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + count
    with torch.no_grad():
        # 304 x 228 px give 10 x 8 positions, and those 160 x 128, as in FCRN.
        assert UpProjectionDecoder(8, first_channels=8, up_channels=(8, 8, 8, 8))(torch.zeros(1, 8, 8, 10)).shape == (1, 1, 128, 160)
        assert backbone_of(build_encoder("resnet18")).eval()(torch.zeros(1, 3, 228, 304))[-1].shape[2:] == (8, 10)


def test_an_up_convolution_is_unpooling_with_zeros_and_a_5x5_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    up = UpConvolution(3, 2).double()
    kernel = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for name, rows, columns in (("a", 0, 0), ("b", 1, 0), ("c", 0, 1), ("d", 1, 1)):
            getattr(up, f"conv_{name}").weight.copy_(kernel[:, :, rows::2, columns::2])
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=generator)
    unpooled = torch.zeros(1, 3, 8, 10, dtype=torch.float64)
    unpooled[:, :, ::2, ::2] = x
    # Room for the positions at -1: FCRN pads its short kernels at the top and left, so its odd outputs are those in front of the even ones.
    convolved = F.conv2d(F.pad(unpooled, (3, 2, 3, 2)), kernel)
    expected = torch.empty(1, 2, 8, 10, dtype=torch.float64)
    for row in range(8):
        for column in range(10):
            expected[:, :, row, column] = convolved[:, :, 1 + row - 2 * (row % 2), 1 + column - 2 * (column % 2)]
    torch.testing.assert_close(up(x), expected)
    assert FastUpProjection(3, 2).double()(x).shape == (1, 2, 8, 10)


# ---- loss and scores


def test_reverse_huber_by_hand_with_unknown_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 4, generator=generator) * 5 + 1
    prediction = truth + torch.randn(2, 3, 4, generator=generator)
    truth[0, 0, 0], truth[1, 2, 3], truth[0, 1, 1] = 0, -1, float("nan")
    errors = [abs(p - t) for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True) if t > 0]
    assert len(errors) == 21
    c = 0.2 * max(errors)
    expected = sum(e if e <= c else (e * e + c * c) / (2 * c) for e in errors) / len(errors)
    prediction.requires_grad_()
    loss = reverse_huber(prediction, truth, share=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(prediction.grad).all()
    assert prediction.grad[0, 0, 0] == prediction.grad[1, 2, 3] == prediction.grad[0, 1, 1] == 0
    assert reverse_huber(prediction, torch.zeros(2, 3, 4), share=0.2).item() == 0


def _c_over_two_ranks(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    truth, errors = torch.full((1, 1, 4), 3.0), torch.tensor([0.1, 0.2, 0.3, 10.0 if rank else 0.4])
    loss = reverse_huber(truth + errors, truth, share=0.2)
    # c is 2 on both: the largest error, 10, is rank 1's.
    assert loss.item() == pytest.approx((0.6 + (104 / 4 if rank else 0.4)) / 4, rel=1e-5)
    dist.destroy_process_group()


def _pixels_over_two_ranks(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    # One known pixel with an error of 4 on rank 0, three with 1 on rank 1; c is above them. The mean over all four is 7 / 4.
    truth = torch.tensor([[[3.0, 0.0, 0.0]], [[3.0, 3.0, 3.0]]])[rank : rank + 1]
    errors = torch.full((1, 1, 3), 1.0 if rank else 4.0)
    losses = [reverse_huber(truth + errors, truth, share=1.0)]
    # The same of cross-entropy: log 2 a pixel where both classes have the same logit.
    labels = torch.tensor([[[1, 255, 255]], [[0, 1, 1]]])[rank : rank + 1]
    losses.append(pixel_loss(torch.zeros(1, 2, 1, 3), labels))
    losses.append(pixel_loss(torch.zeros(1, 2, 1, 3), torch.full_like(labels, 255)))
    for loss, expected in zip(losses, (7 / 4, math.log(2), 0.0), strict=True):
        dist.all_reduce(loss)
        assert loss.item() / 2 == pytest.approx(expected, rel=1e-6)
    dist.destroy_process_group()


def test_every_pixel_of_all_ranks_weighs_the_same(tmp_path: Path) -> None:
    start_ranks(_pixels_over_two_ranks, str(tmp_path / "store"))


def test_the_notes_say_the_momentum_and_the_statistics_that_were_used() -> None:
    assert "here 0.5, drops of the rate" in depth._notes(dataclasses.replace(QUICK, momentum=0.5))[1]
    whole = segmentation.SegmentationSettings(momentum=0.25)
    for settings, norms in (
        (whole, "each"),
        (dataclasses.replace(whole, encoder_rate=0.0), "the frozen encoder's running statistics, in the head each"),
    ):
        assert f"here 0.25, {norms} rank's own" in segmentation._notes(settings, num_train=10_000)[1]


def test_c_of_reverse_huber_is_of_all_ranks_errors(tmp_path: Path) -> None:
    start_ranks(_c_over_two_ranks, str(tmp_path / "store"))


def test_the_scores_by_hand_are_over_all_known_pixels_of_all_images() -> None:
    truths = [torch.tensor([[2.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, float("inf")]]), torch.zeros(1, 2)]
    predictions = [torch.tensor([[2.2, 2.0], [9.0, 1.5]]), torch.tensor([[-1.0, 3.0]]), torch.ones(1, 2)]
    found = np.stack([depth_statistics(p, t) for p, t in zip(predictions, truths, strict=True)])
    pairs = [(2.0, 2.2), (4.0, 2.0), (1.0, 1.5), (3.0, 0.01)]
    scores = depth_scores(found)
    for power in (1, 2, 3):
        share = sum(max(t / p, p / t) < 1.25**power for t, p in pairs) / 4
        assert scores[f"pct{power}"] == pytest.approx(share)
    assert (scores["pct1"], scores["pct2"]) == (0.25, 0.5)
    assert scores["rms"] == pytest.approx(math.sqrt(sum((t - p) ** 2 for t, p in pairs) / 4), rel=1e-6)
    assert scores["rel"] == pytest.approx(sum(abs(t - p) / t for t, p in pairs) / 4, rel=1e-6)
    assert found[2].tolist() == [0] * 6


# ---- frames


def write_labelled(root: Path, *, frames: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Writes NYU v2's files with small frames; returns images (frames, H, W, 3) and depths (frames, H, W)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (frames, 12, 16, 3), dtype=np.uint8)
    depths = rng.uniform(0.5, 9, (frames, 12, 16)).astype(np.float32)
    with h5py.File(root / LABELLED, "w") as file:
        # As MATLAB writes (H, W, 3, N): HDF5 sees the dimensions in reverse.
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [4], [5]]), "testNdxs": np.array([[2], [3]])})
    return images, depths


def test_nyus_labelled_file_is_read_by_its_split_in_its_orientation_and_survives_pickling(tmp_path: Path) -> None:
    images, depths = write_labelled(tmp_path)
    train, test = open_frames(str(tmp_path))
    assert (len(train), len(test)) == (3, 2)
    for frames, rows in ((train, (0, 3, 4)), (pickle.loads(pickle.dumps(test)), (1, 2))):
        for index, row in enumerate(rows):
            image, distance = frames.read(index)
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), images[row])
            np.testing.assert_array_equal(distance.numpy(), depths[row])


def test_a_folder_of_16_bit_depths_is_read_in_metres(scene_folder: Path) -> None:
    train, test = open_frames(str(scene_folder))
    assert (len(train), len(test)) == (32, 16)
    image, distance = train.read(0)
    assert image.shape[1:] == distance.shape == (48, 48)
    stored = np.asarray(Image.open(scene_folder / "annotations/train/cross_checks/00000_depth.png"))
    np.testing.assert_allclose(distance.numpy(), stored / 1000, rtol=1e-6)


def damage_split(root: Path) -> None:
    savemat(root / "splits.mat", {"trainNdxs": np.array([[1], [9]]), "testNdxs": np.array([[2]])})


def damage_arrays(root: Path) -> None:
    with h5py.File(root / LABELLED, "w") as file:
        file["images"], file["depths"] = np.zeros((2, 3, 4, 4), dtype=np.uint8), np.zeros((2, 4, 5), dtype=np.float32)


def damage_depth(root: Path) -> None:
    with h5py.File(root / LABELLED, "r+") as file:
        file["depths"][3] = 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / LABELLED).unlink(), r"expected nyu_depth_v2_labeled\.mat and splits\.mat of NYU v2, or train/images"),
        (lambda root: (root / "splits.mat").unlink(), "splits.mat: is missing beside"),
        (damage_split, "its train frames are not among the 5 frames"),
        (lambda root: (root / "splits.mat").write_bytes(b"x" * 200), "is not NYU's split"),
        (lambda root: (root / LABELLED).write_bytes(b"x" * 200), "is not a MATLAB 7.3 file"),
        (damage_arrays, r"images are uint8 \(2, 3, 4, 4\) and depths float32 \(2, 4, 5\)"),
        (damage_depth, "no pixel of frame 4 has a depth"),
    ],
)
def test_a_bad_labelled_file_is_one_line(damage, says: str, tmp_path: Path) -> None:
    write_labelled(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        depth.run(make_job("depth", SMALL, data=tmp_path, folder=tmp_path), SMALL)


def write_folder(root: Path) -> Path:
    for split in ("train", "test"):
        for kind in ("images", "depth"):
            (root / split / kind).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (48, 40), (90, 80, 70)).save(root / split / "images" / f"{name}.jpg")
            Image.fromarray(np.full((40, 48), 2000, dtype=np.uint16)).save(root / split / "depth" / f"{name}.png")
    return root


def save_depth(path: Path, depths: np.ndarray) -> None:
    Image.fromarray(depths).save(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: (root / "test/images/b.jpg").unlink(), r"b is in depth but not in images \(1 such names\)"),
        (
            lambda root: [save_depth(root / f"train/depth/{n}.png", np.zeros((40, 48), dtype=np.uint16)) for n in "ab"],
            r"a\.png: no pixel has a depth; 0 stands for unknown \(2 of 2 training frames have such a fault\)",
        ),
        (lambda root: save_depth(root / "train/depth/a.png", np.ones((9, 9), dtype=np.uint16)), "has 9 x 9 px, but its image 48 x 40"),
        (lambda root: save_depth(root / "train/depth/a.png", np.ones((40, 48), dtype=np.uint8)), "mode L; a depth image has 16-bit"),
        (lambda root: (root / "test/depth/a.png").write_bytes(b"x"), r"a\.png: cannot be read as an image"),
    ],
)
def test_bad_folders_are_one_line_that_names_and_counts_it(damage, says: str, tmp_path: Path) -> None:
    damage(write_folder(tmp_path))
    with pytest.raises(UserError, match=says):
        depth.run(make_job("depth", SMALL, data=tmp_path, folder=tmp_path), SMALL)


class OneFrame:
    """A frame whose red level is 40 times its depth in metres, which is 1 on the left and 5 on the right."""

    def __init__(self, height: int = 480, width: int = 640) -> None:
        self.distance = torch.ones(height, width)
        self.distance[:, width // 2 :] = 5
        self.image = torch.stack([40 * self.distance, torch.full_like(self.distance, 10), torch.full_like(self.distance, 10)]).byte()

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image, self.distance

    def check(self, index: int) -> None: ...


def test_frames_are_halved_and_cropped_and_image_and_depth_are_mirrored_together() -> None:
    plain = dataclasses.replace(DepthSettings(), gray_p=0.0, brightness=0.0, saturation=(1.0, 1.0), hue=0.0)
    source, left = DepthImages(OneFrame(), plain), set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, distance = source.train(0)
        assert (image.shape, distance.shape) == ((3, 228, 304), (228, 304))
        inner = (distance == 1) | (distance == 5)
        assert inner.all()
        edge = slice(2, -2)
        near = distance[:, edge] == 1
        assert (image[0][:, edge][near] < 80).float().mean() > 0.99
        left.add(float(distance[0, 0]))
    assert left == {1.0, 5.0}
    # The paper's frames are centre crops in tests too; Laina et al. score their prediction over the whole frame.
    image, distance = source.test(0)
    assert (image.shape, distance.shape) == ((3, 228, 304), (456, 608))
    stretched = dataclasses.replace(source, settings=dataclasses.replace(plain, test_view="stretched")).test(0)
    assert torch.equal(stretched[0], image)
    assert stretched[1].shape == (480, 640)


def test_a_frame_smaller_than_the_crop_is_padded_and_what_is_added_is_not_scored() -> None:
    plain = dataclasses.replace(DepthSettings(), frame_scale=1.0, crop_px=(40, 60))
    image, distance = DepthImages(OneFrame(30, 80), plain).test(0)
    assert (image.shape, distance.shape) == ((3, 40, 60), (40, 60))
    assert (distance == 0).sum() == 10 * 60
    assert ((image.sum(dim=0) == 0) == (distance == 0)).all()


def test_colours_change_within_the_papers_ranges() -> None:
    grays, levels = 0, []
    source = DepthImages(OneFrame(20, 20), dataclasses.replace(QUICK, saturation=(1.0, 1.0), hue=0.0, gray_p=0.3, crop_px=(20, 20)))
    for seed in range(200):
        torch.manual_seed(seed)
        image, _ = source.train(0)
        gray = bool((image[0] == image[1]).all())
        grays += gray
        if not gray:
            levels.append(int(image[0].max()) - 200)
    assert 40 < grays < 80
    # +-.1255 of 255 levels.
    assert min(levels) >= -32
    assert max(levels) <= 32
    assert min(levels) < -25
    assert max(levels) > 25


# ---- the whole task


def test_a_stopped_training_goes_on_to_the_same_scores(scene_folder: Path, tmp_path: Path) -> None:
    whole = depth.run(make_job("depth", SMALL, data=scene_folder, folder=tmp_path / "whole"), SMALL)
    with pytest.raises(TaskStopped, match="stopped after step 3 of 4 of byol seed 0"):
        depth.run(make_job("depth", SMALL, data=scene_folder, folder=tmp_path / "part", stop=3), SMALL)
    again = depth.run(make_job("depth", SMALL, data=scene_folder, folder=tmp_path / "part"), SMALL)
    assert {name: each.scores for name, each in again.subjects.items()} == {name: each.scores for name, each in whole.subjects.items()}
    assert again.subjects["byol"].details["known_pixels"] == 6 * 32 * 40  # of the centre crop


def test_the_command_writes_scores_and_a_picture_with_a_row_beside_the_papers(
    scene_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_encoder().state_dict(), tmp_path / "weights.pt")
    command = ["evaluate", "depth", "--checkpoint", str(tmp_path / "weights.pt"), "--data", str(scene_folder)]
    small = ["--steps", "2", "--batch_images", "2", "--test_images", "4", "--first_channels", "8", "--up_channels", "4,4", *TINY]
    code, out, err = call([*command, *small, "--dry_run"], capsys)
    assert code == 0, err
    assert "2 trainings of 2 steps of 2 images" in out
    code, out, err = call([*command, *small], capsys)
    assert code == 0, err
    assert "84.6" in out
    assert "0.541" in out
    (file,) = tmp_path.rglob("depth.json")
    record = json.loads(file.read_text())
    assert record["sizes"] == {"train": 32, "test": 4}
    assert set(record["subjects"]["byol"]["scores"]) == {"pct1", "pct2", "pct3", "rms", "rel"}
    assert Image.open(next(file.parent.glob("depth-*.png"))).width > 300
    code, _, err = call([*command, "--crop_px", "48"], capsys)
    assert code == 2
    assert "--crop_px" in err
