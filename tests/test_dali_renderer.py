"""Tests of views made by DALI: equal to the kernel's up to rounding, with the same order, resume and errors."""

from __future__ import annotations

import itertools
import tarfile
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair, both
from fastbyol.data import ViewBatch, build_loader, dali_renderer
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.backends.source import Pixels
from fastbyol.data.batch import views_on_device
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.formats.tar_shards import shard_name
from fastbyol.data.loader import TwoViewLoader
from tests.commands import LIMIT_S

VIEWS = ViewPair(size_px=32)


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
            on_device, _ = views_on_device(ours, views, torch.device("cpu"), compiled=compiled)
            for made, wanted in zip(on_device.chunk(2), (theirs.view1, theirs.view2), strict=True):
                difference = (levels(made) - levels(wanted)).abs()
                assert difference.mean() < 0.5
                assert difference.quantile(0.99) < 3


def as_bytes(batch: ViewBatch) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in batch]


def test_order_ranks_and_resume_are_those_of_every_loader(tar_folder: Path) -> None:
    with loader_at(tar_folder, "crop") as whole:
        wanted = [as_bytes(batch) for batch in whole]
    with loader_at(tar_folder, "crop") as resumed:
        resumed.load_state_dict({"epoch": 0, "batch": 2})
        assert [as_bytes(batch) for batch in resumed] == wanted[2:]
    shares = []
    for rank in range(2):
        with loader_at(tar_folder, "crop", rank=rank, world_size=2) as share:
            shares.append([batch.index.tolist() for batch in share])
    with loader_at(tar_folder, "decode") as kernel:
        order = [batch.index.tolist() for batch in kernel]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in order]


@pytest.mark.parametrize("stop_after", [None, 1])
def test_the_files_of_the_next_batch_are_read_while_one_is_decoded(
    stop_after: int | None, tar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder here ends only when an image of the batch after it has been read; it would wait for ever for the thread it runs on."""
    read: dict[int, threading.Event] = defaultdict(threading.Event)
    jpeg, waited = DaliSource.jpeg, []

    def noted(source: DaliSource, index: int) -> Pixels:
        read[int(index)].set()
        return jpeg(source, index)

    def decode(jpeg: list, **boxes: object) -> list:
        if upcoming := expected[len(waited) + 1 : len(waited) + 2]:
            waited.append(all(read[index].wait(timeout=LIMIT_S) for index in upcoming[0]))
        crops = torch.zeros(len(jpeg), 32, 32, 3, dtype=torch.uint8)
        return [SimpleNamespace(as_tensor=lambda: crops)] * 2

    with loader_at(tar_folder, "decode") as kernel:
        wanted = [batch.index.tolist() for batch in kernel]
    # When the consumer stops, reads that have not started are cancelled: nothing is sure of any batch but the next one.
    expected = wanted if stop_after is None else wanted[: stop_after + 1]
    monkeypatch.setattr(DaliSource, "jpeg", noted)
    monkeypatch.setattr(dali_renderer, "built_pipeline", lambda graph, **options: SimpleNamespace(run=decode))
    with loader_at(tar_folder, "crop") as loader:
        made = [batch.index.tolist() for batch in itertools.islice(loader, stop_after)]
    assert made == wanted[:stop_after]
    assert waited
    assert all(waited)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fastbyol-read")]


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


def test_what_dali_cannot_do_is_refused(tar_folder: Path, image_folder: Path) -> None:
    with pytest.raises(UserError, match="data.dali_ops = 'crop': .* not read by the dali backend"):
        loader_at(image_folder, "crop")
    with pytest.raises(UserError, match="data.dali_ops = 'all': must be one of auto, decode, crop"):
        loader_at(tar_folder, "all")
