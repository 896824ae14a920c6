"""Tests of views made by DALI: equal to the kernel's up to rounding, with the same order, resume and errors."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair, both
from fastbyol.data import ViewBatch, build_loader
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.device import views_on_device
from fastbyol.data.loader import TwoViewLoader
from fastbyol.data.tar_shards import shard_name

VIEWS = ViewPair(size_px=32)
CROPS = both(VIEWS, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


def loader_at(path: Path, ops: str, *, views: ViewPair = VIEWS, **changes: object) -> TwoViewLoader:
    options: dict = {"seed": 5, "global_batch": 6} | changes
    return build_loader(DataConfig(train=str(path), workers=2, dali_ops=ops), views=views, **options)


def levels(view: torch.Tensor, views: ViewPair = VIEWS) -> torch.Tensor:
    """Returns a normalised view (N, 3, S, S) in units of 255 levels."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (views.mean, views.std))
    return 255 * (view * std + mean)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_dalis_crops_equal_the_kernels_to_within_one_level(tar_folder: Path, interpolation: str, antialias: bool) -> None:
    views = ViewPair(size_px=32, interpolation=interpolation, antialias=antialias)
    with loader_at(tar_folder, "crop", views=views) as dali, loader_at(tar_folder, "decode", views=views, output="uint8") as kernel:
        for ours, theirs in zip(dali, kernel, strict=True):
            assert ours.view1.dtype == torch.uint8
            assert ours.view1.is_contiguous(memory_format=torch.channels_last)
            for field in ("label", "index", "parameters"):
                assert torch.equal(getattr(ours, field), getattr(theirs, field))
            for view in ("view1", "view2"):
                difference = (getattr(ours, view).int() - getattr(theirs, view).int()).abs()
                assert difference.max() <= 1
                assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_dalis_crops_augmented_on_the_device_equal_the_kernels_views(tar_folder: Path, compiled: bool) -> None:
    views = both(VIEWS, solarize_p=0.0)  # a level more or less decides at its threshold
    with loader_at(tar_folder, "crop", views=views) as dali, loader_at(tar_folder, "decode", views=views) as kernel:
        for ours, theirs in zip(dali, kernel, strict=True):
            on_device = views_on_device(ours, views, torch.device("cpu"), compiled=compiled)
            for made, wanted in zip(on_device[:2], (theirs.view1, theirs.view2), strict=True):
                difference = (levels(made) - levels(wanted)).abs()
                assert difference.mean() < 0.5
                assert difference.quantile(0.99) < 3


def test_dalis_own_operations_use_our_parameters(tar_folder: Path) -> None:
    """Crop, flip, grey and solarize equal the paper's, up to DALI's rounding to 8 bits between operations."""
    for views, largest in ((CROPS, 1.6), (both(CROPS, gray_p=1.0), 2.6), (both(CROPS, solarize_p=1.0), 1.6)):
        with loader_at(tar_folder, "all", views=views) as dali, loader_at(tar_folder, "decode", views=views) as kernel:
            for ours, theirs in zip(dali, kernel, strict=True):
                assert torch.equal(ours.parameters, theirs.parameters)
                difference = (levels(ours.view1) - levels(theirs.view1)).abs()
                if views.view1.solarize_p:  # a pixel at the threshold may fall on either side
                    assert difference.quantile(0.98) < largest
                else:
                    assert difference.max() < largest


@pytest.mark.parametrize(
    ("changes", "mean_between", "largest"),
    [
        ({"jitter_p": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, (0.0, 1.0), 2.1),
        ({"blur_p": 1.0}, (0.0, 1.0), 2.1),
        ({"jitter_p": 1.0}, (2.0, 20.0), 256),
    ],
)
def test_dalis_brightness_and_blur_equal_the_papers_but_its_full_jitter_does_not(
    tar_folder: Path, changes: dict[str, float], mean_between: tuple[float, float], largest: float
) -> None:
    views = both(CROPS, **changes)
    with loader_at(tar_folder, "all", views=views) as dali, loader_at(tar_folder, "decode", views=views) as kernel:
        ours, theirs = next(iter(dali)), next(iter(kernel))
    inside = (levels(ours.view2) - levels(theirs.view2)).abs()[..., 2:-2, 2:-2]  # DALI's blur reflects at the border
    assert mean_between[0] <= inside.mean() <= mean_between[1]
    assert inside.max() <= largest


def as_bytes(batch: ViewBatch) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in batch]


@pytest.mark.parametrize("ops", ["crop", "all"])
def test_order_ranks_and_resume_are_the_same_as_for_other_renderers(tar_folder: Path, ops: str) -> None:
    with loader_at(tar_folder, ops) as whole:
        wanted = [as_bytes(batch) for batch in whole]
    with loader_at(tar_folder, ops) as resumed:
        resumed.load_state_dict({"epoch": 0, "batch": 2})
        assert [as_bytes(batch) for batch in resumed] == wanted[2:]
    shares = []
    for rank in range(2):
        with loader_at(tar_folder, ops, rank=rank, world_size=2) as share:
            shares.append([batch.index.tolist() for batch in share])
    with loader_at(tar_folder, "decode") as kernel:
        order = [batch.index.tolist() for batch in kernel]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in order]


def test_a_damaged_image_is_named(image_folder: Path, tmp_path: Path) -> None:
    write_tar_shards(image_folder, out=tmp_path / "shards", workers=1)
    shard = tmp_path / "shards" / shard_name(0)
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name == "00000011.jpg")
        offset = member.offset_data + member.size // 2
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x00" * 40)
    with loader_at(tmp_path / "shards", "crop", global_batch=25) as loader, pytest.raises(UserError, match="00000011.jpg"):
        next(iter(loader))


def test_views_and_devices_that_dali_does_not_support_are_refused(tar_folder: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match="have no rotation"):
        loader_at(tar_folder, "all", views=both(VIEWS, rotation_deg=10.0))
    with pytest.raises(UserError, match="have no views.semantics torchvision"):
        loader_at(tar_folder, "all", views=ViewPair(size_px=32, semantics="torchvision"))
    with pytest.raises(UserError, match="data.dali_ops = 'crop': .* not read by the dali backend"):
        loader_at(image_folder, "crop")
    with pytest.raises(UserError, match="data.dali_ops = 'some': must be one of"):
        loader_at(tar_folder, "some")
