"""Tests of the loaders with all three backends: workers, ranks and resumes change no byte of a batch."""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair, both
from fastbyol.data import ViewBatch, build_image_loader, build_loader
from fastbyol.data.backends.source import Indices, Pixels, RangeReader, Source
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.formats.beton import read_beton
from fastbyol.data.loader import Readahead, TwoViewLoader
from fastbyol.data.renderer import BatchMemory, KernelRenderer
from fastbyol.data.traversal import Traversal, group_into_blocks, local_order

BACKENDS = ("folder", "ffcv", "dali")
VIEWS = ViewPair(size_px=16)
CROPS = both(VIEWS, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


def loader_at(path: Path, **changes: object) -> TwoViewLoader:
    options: dict = {"views": VIEWS, "seed": 5, "global_batch": 6, "workers": 2, "prefetch": 2, "backend": "auto"} | changes
    of_data = {name: options.pop(name) for name in ("workers", "prefetch", "backend", "traversal") if name in options}
    return build_loader(DataConfig(train=str(path), **of_data), **options)


def as_bytes(batch: ViewBatch) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in batch]


@pytest.fixture(params=BACKENDS)
def path(request: pytest.FixtureRequest, data_paths: dict[str, Path]) -> Path:
    return data_paths[request.param]


def test_a_batch_has_the_promised_shapes_types_and_layout(path: Path) -> None:
    with loader_at(path) as loader:
        batch = next(iter(loader))
        assert (len(loader), loader.num_samples, loader.class_names) == (4, 25, ("ant", "bee", "cat"))
    for view in (batch.view1, batch.view2):
        assert view.shape == (6, 3, 16, 16)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.label.dtype == batch.index.dtype == torch.int64
    assert batch.parameters.shape[:2] == (6, 2)
    assert batch.label.tolist() == [0 if i < 8 else 1 if i < 17 else 2 for i in batch.index.tolist()]


def test_uint8_output_gives_the_crops_of_the_same_boxes(path: Path) -> None:
    plain = both(CROPS, flip_p=0.0)
    with loader_at(path, views=plain, output="uint8") as crops, loader_at(path, views=plain) as views:
        crop, view = next(iter(crops)), next(iter(views))
    assert crop.view1.dtype == torch.uint8
    assert torch.equal(crop.parameters, view.parameters)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (plain.mean, plain.std))
    pixels = (view.view2 * std + mean) * 255
    assert (crop.view2.float() - pixels).abs().max() <= 0.51  # rounded to the nearest level


def test_workers_and_prefetch_change_no_byte(path: Path) -> None:
    with loader_at(path, workers=1, prefetch=1) as one, loader_at(path, workers=3, prefetch=4) as three:
        assert [as_bytes(batch) for batch in one] == [as_bytes(batch) for batch in three]


def test_a_resume_at_any_batch_continues_byte_for_byte(path: Path) -> None:
    with loader_at(path) as loader:
        states, batches = [], []
        for epoch in range(2):
            loader.set_epoch(epoch)
            states.append(loader.state_dict())
            for batch in loader:
                batches.append(as_bytes(batch))
                states.append(loader.state_dict())
    assert states[4] == states[5] == {"epoch": 1, "batch": 0}
    assert len({batch[0] for batch in batches}) == 8
    states.pop(4)
    for position in (0, 1, 3, 4, 6):
        with loader_at(path, workers=1) as resumed:
            resumed.load_state_dict(states[position])
            resumed.set_epoch(states[position]["epoch"])  # as a training loop does: must not rewind
            assert as_bytes(next(iter(resumed))) == batches[position]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_global_batch_of_one_rank_byte_for_byte(path: Path, world_size: int) -> None:
    with loader_at(path) as whole:
        expected = [as_bytes(batch) for batch in whole]
    parts = []
    for rank in range(world_size):
        with loader_at(path, rank=rank, world_size=world_size) as loader:
            parts.append(list(loader))
    joined = [[torch.cat(tensors) for tensors in zip(*shares, strict=True)] for shares in zip(*parts, strict=True)]
    assert [as_bytes(ViewBatch(*tensors)) for tensors in joined] == expected


def test_batches_stay_valid_while_later_ones_are_made(path: Path) -> None:
    with loader_at(path) as loader:
        kept, copies = [], []
        for batch in loader:
            kept.append(batch)
            copies.append(as_bytes(batch))
    assert [as_bytes(batch) for batch in kept] == copies


def test_batch_memory_is_reused_only_after_every_tensor_on_it_is_freed() -> None:
    memory, shape = BatchMemory(torch.float32, pinned=False, spare=1), (2, 3, 4, 4, 3)
    first, second = memory.lend(shape), memory.lend(shape)
    place, part = first.data_ptr(), first[1, 2:].permute(0, 3, 1, 2).numpy()
    part[:] = 7
    del first
    third = memory.lend(shape)
    assert place not in (second.data_ptr(), third.data_ptr())
    third.zero_()
    assert (part == 7).all()
    del part
    assert memory.lend((1, 2, 4, 4, 3)).shape == (1, 2, 4, 4, 3)  # another shape never gets it
    fourth = memory.lend(shape)
    place = fourth.data_ptr()
    del fourth
    assert memory.lend(shape).data_ptr() == place


def test_at_most_the_given_number_of_unused_batches_is_kept() -> None:
    memory, shape = BatchMemory(torch.uint8, pinned=False, spare=2), (1, 1, 4, 4, 3)
    held = [memory.lend(shape) for _ in range(5)]
    places = [tensor.data_ptr() for tensor in held]
    held.clear()
    again = [memory.lend(shape) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} < set(places)
    assert not memory._spare


def test_a_new_epoch_has_another_order_and_other_views(path: Path) -> None:
    with loader_at(path) as loader:
        first, second = list(loader), list(loader)
    assert loader.state_dict() == {"epoch": 2, "batch": 0}
    order = [[int(i) for batch in batches for i in batch.index] for batches in (first, second)]
    assert order[0] != order[1]
    drawn = [
        {int(i): row for batch in batches for i, row in zip(batch.index, batch.parameters, strict=True)} for batches in (first, second)
    ]
    both_epochs = drawn[0].keys() & drawn[1].keys()
    assert not any(torch.equal(drawn[0][i], drawn[1][i]) for i in both_epochs)


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_the_fast_backends_return_the_bytes_of_the_reference(backend: str, data_paths: dict[str, Path]) -> None:
    with loader_at(data_paths[backend], views=VIEWS) as fast, loader_at(data_paths["folder"], views=VIEWS) as reference:
        assert [as_bytes(batch) for batch in fast] == [as_bytes(batch) for batch in reference]


def test_leaving_an_epoch_early_leaks_no_thread_and_goes_on_at_the_next_batch(path: Path) -> None:
    with loader_at(path) as loader:
        expected = [as_bytes(batch) for batch in loader]
    before = threading.active_count()
    with loader_at(path) as loader:
        for position in range(4):
            for batch in loader:
                assert as_bytes(batch) == expected[position]
                break
        assert threading.active_count() <= before + 2
    assert threading.active_count() == before


def test_the_image_loader_yields_every_image_once_in_order(path: Path) -> None:
    with build_image_loader(path, views=VIEWS, batch=10, workers=2) as loader:
        for _ in range(2):
            batches = list(loader)
            assert [len(batch.image) for batch in batches] == [10, 10, 5]
            assert torch.cat([batch.index for batch in batches]).tolist() == list(range(25))
            assert torch.cat([batch.label for batch in batches]).tolist() == [0] * 8 + [1] * 9 + [2] * 8
        assert (len(loader), loader.num_samples, loader.class_names) == (3, 25, ("ant", "bee", "cat"))


def test_an_image_of_one_colour_becomes_that_colour_normalised(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(a_png=Image.new("RGB", (20, 30), (255, 0, 51)), b_png=Image.new("RGB", (1, 1), (0, 255, 102)))
    with build_image_loader(folder, views=VIEWS, batch=2, workers=1) as loader:
        (batch,) = loader
    for image, colour in zip(batch.image, ((1.0, 0.0, 0.2), (0.0, 1.0, 0.4)), strict=True):
        for plane, value, mean, std in zip(image, colour, VIEWS.mean, VIEWS.std, strict=True):
            assert plane.numpy() == pytest.approx((value - mean) / std, abs=1e-5)


def test_images_of_one_pixel_work_in_every_backend(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(a_jpg=Image.new("RGB", (1, 1), (200, 90, 10)), b_jpg=Image.new("L", (1, 3), 40))
    write_beton(folder, out=tmp_path / "x.beton", workers=1)
    write_tar_shards(folder, out=tmp_path / "tar", workers=1)
    batches = []
    for path in (folder, tmp_path / "x.beton", tmp_path / "tar"):
        with loader_at(path, global_batch=2) as loader:
            batches.append(as_bytes(next(iter(loader))))
    assert batches[0] == batches[1] == batches[2]


# ---- local traversal


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_a_local_traversal_changes_the_order_but_no_view_and_can_resume(backend: str, data_paths: dict[str, Path]) -> None:
    def views_of(batches: list[ViewBatch]) -> dict[int, bytes]:
        return {int(i): view.numpy().tobytes() for batch in batches for i, view in zip(batch.index, batch.view2, strict=True)}

    with (
        loader_at(data_paths[backend], global_batch=5) as loader,
        loader_at(data_paths[backend], global_batch=5, traversal="local") as local,
    ):
        random_batches, local_batches = list(loader), list(local)
        assert views_of(random_batches) == views_of(local_batches)
        blocks = local.traversal.blocks
        assert blocks is not None
        assert [int(i) for batch in local_batches for i in batch.index] == local_order(blocks, seed=5, epoch=0).tolist()
    with loader_at(data_paths[backend], global_batch=5, traversal="local", workers=1) as resumed:
        resumed.load_state_dict({"epoch": 0, "batch": 3})
        assert as_bytes(next(iter(resumed))) == as_bytes(local_batches[3])


def test_a_local_traversal_of_an_image_folder_is_refused(image_folder: Path) -> None:
    with pytest.raises(UserError, match="data.traversal: each image is a file of its own"):
        loader_at(image_folder, traversal="local")
    with pytest.raises(UserError, match="data.traversal = 'pages': must be one of random, local, sharded"):
        loader_at(image_folder, traversal="pages")


class _StoredSource(Source):
    """A source of 40 samples of 10 bytes in one file, which records what is read ahead."""

    def __init__(self) -> None:
        super().__init__(labels=np.zeros(40, dtype=np.int64), class_names=("only",))
        self.fetched: list[tuple[int, ...]] = []

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        return np.full(len(indices), 4), np.full(len(indices), 4)

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        yield from np.zeros((len(indices), 4, 4, 3), dtype=np.uint8)

    def sample_name(self, index: int) -> str:
        return f"image {index}"

    def read_ahead(self, indices: Indices) -> None:
        self.fetched.append(tuple(indices.tolist()))


def wait_until_fetched(source: _StoredSource, num: int) -> None:
    """Waits until the number of fetched blocks is reached, and checks that no more follow shortly after."""
    end = time.monotonic() + 10
    while len(source.fetched) < num and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(source.fetched) == num


def test_blocks_are_fetched_a_window_ahead_once_an_epoch_and_shared_between_the_readers_of_a_machine() -> None:
    blocks = group_into_blocks(np.zeros(40, dtype=np.int64), 10 * np.arange(40), block_bytes=40, window_bytes=120)
    halves: list[list[tuple[int, ...]]] = []
    for reader in range(2):
        source = _StoredSource()
        walk = Traversal(40, 1, 4, blocks=blocks)
        readahead = Readahead(source, walk, reader=reader, num_readers=2)
        loader = TwoViewLoader(KernelRenderer(source, VIEWS, prefetch=1), views=VIEWS, traversal=walk, readahead=readahead)
        with loader:
            iterator = iter(loader)
            first = next(iterator)
            wait_until_fetched(source, (4, 2)[reader])  # of two windows of three blocks each
            rest = list(iterator)
            wait_until_fetched(source, (7, 3)[reader])  # of all ten blocks
        halves.append(source.fetched)
        assert len({int(i) for batch in (first, *rest) for i in batch.index}) == 40
    assert sorted(i for half in halves for block in half for i in block) == list(range(40))


def test_reading_ahead_past_the_end_of_a_file_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(3_000_000))
    reader = RangeReader(tmp_path / "x")
    reader.read_ahead(0, 2_500_000)
    reader.read_ahead(2_000_000, 9_000_000)
    reader.close()


# ---- damage


DAMAGES = ("header", "tail", "one byte")


def jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def noisy_folder(make_folder: Callable[..., Path]) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    return make_folder(**{f"{i}_jpg": jpeg_bytes(Image.fromarray(pixels)) for i, pixels in enumerate(noise)})


def expect_damage_reported(path: Path, *, index: int, name: str) -> None:
    """Checks that each epoch ends in the error, without a hang or a black image, and that the threads stay usable."""
    with loader_at(path, global_batch=3, views=VIEWS) as loader:
        for _ in range(2):
            with pytest.raises(UserError, match=f"image {index} .*{name}.* does not decode"):
                list(loader)


def test_a_truncated_jpeg_in_a_folder_is_named(noisy_folder: Path) -> None:
    victim = noisy_folder / "class" / "4.jpg"
    victim.write_bytes(victim.read_bytes()[:-400])
    expect_damage_reported(noisy_folder, index=4, name="4.jpg")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_jpeg_in_a_beton_is_named(noisy_folder: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "x.beton"
    write_beton(noisy_folder, out=out, workers=1)
    table = read_beton(out)
    wipe(out, int(table.offset[4]), int(table.size[4]), damage)
    expect_damage_reported(out, index=4, name="x.beton")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_jpeg_in_a_tar_is_named(noisy_folder: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "shards"
    write_tar_shards(noisy_folder, out=out, workers=1)
    row = np.load(out / "samples.npy")[4]
    wipe(out / "shard-00000.tar", int(row["offset"]), int(row["size"]), damage)
    expect_damage_reported(out, index=4, name="00000004.jpg of .*shard-00000.tar")


def wipe(path: Path, offset: int, size: int, damage: str) -> None:
    """Zeroes a range of an image's bytes. No decoder notices a single changed byte in the middle."""
    start, length = {"header": (0, 64), "tail": (size // 2, size - size // 2), "one byte": (size // 2, 1)}[damage]
    with path.open("r+b") as file:
        file.seek(offset + start)
        assert file.read(length) != bytes(length)
        file.seek(offset + start)
        file.write(bytes(length))


def test_a_beton_that_is_cut_while_open_is_reported_and_does_not_kill_the_process(beton: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(beton, tmp_path / "cut.beton"))
    with loader_at(copy) as loader:
        with copy.open("r+b") as file:
            file.truncate(10_000)
        with pytest.raises(UserError, match=r"ended at byte \d+ while being read"):
            list(loader)


class _BrokenSource(Source):
    def __init__(self) -> None:
        super().__init__(labels=np.zeros(8, dtype=np.int64), class_names=("only",))

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        return np.full(len(indices), 9), np.full(len(indices), 9)

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for index in indices:
            yield np.zeros((9, 9, 3 if index != 6 else 4), dtype=np.uint8)

    def sample_name(self, index: int) -> str:
        return f"image {index}"


def test_an_unexpected_exception_of_a_worker_reaches_the_consumer_and_names_the_sample() -> None:
    loader = TwoViewLoader(KernelRenderer(_BrokenSource(), VIEWS, workers=2), views=VIEWS, traversal=Traversal(8, 0, 4))
    with loader, pytest.raises(ValueError, match="uint8") as caught:
        list(loader)
    assert caught.value.__notes__ == ["while rendering image 6"]


def test_a_loader_state_outside_the_epoch_is_refused(image_folder: Path) -> None:
    with loader_at(image_folder) as loader, pytest.raises(UserError, match="an epoch has 4 batches"):
        loader.load_state_dict({"epoch": 0, "batch": 4})
