"""Training data in a store: the same batches as from local disk, whatever the store does, in a cache smaller than the data."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastbyol.data.backends.block_cache as block_cache
import fastbyol.data.backends.store_tables as store_tables
import fastbyol.train as train
from fastbyol.config.errors import LOST_EXIT, Lost, UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader, build_loader
from fastbyol.data.build import nodes_of
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.host.stores import retried
from fastbyol.ranks.process_group import Process
from tests.commands import SMALL_RUN
from tests.web_server import WebServer

VIEWS, IMAGES, MIB = ViewPair(size_px=16), 40, 2**20
SMALL_CACHE = 2.2 / 1024
"""GiB of a cache that holds two of the three shards, of 1 MiB each, which are a block each."""
Batches = list[tuple[list[int], bytes]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to serve: 40 noisy images in three shards, train, and in train.beton."""
    root = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        folder = root / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (200, 280, 3), dtype=np.uint8)).save(folder / f"{i:03d}.jpg", quality=95)
    write_tar_shards(root / "images", out=root / "train", workers=1, shard_mib=1)
    write_beton(root / "images", out=root / "train.beton", workers=1)
    assert len(list((root / "train").glob("*.tar"))) == 3
    return root


@pytest.fixture
def server(site: Path):
    with WebServer(site) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the minute for which a store is asked again."""
    monkeypatch.setattr(block_cache, "retried", functools.partial(retried, waits_s=(0.1, 0.1)))


def batches_of(data: str | Path, cache: Path | None = None, *, gib: float = 1.0, epochs: int = 1, batch: int = 0, **options) -> Batches:
    order = {"traversal": options.pop("traversal", "local"), "window_mib": 1}
    config = DataConfig(train=str(data), workers=1, cache=str(cache or ""), cache_gib=gib, prefetch=1, **order)
    with build_loader(config, views=VIEWS, seed=5, global_batch=8, **options) as loader:
        if batch:
            loader.load_state_dict({"epoch": 0, "batch": batch})
        return [(views.index.tolist(), views.view1.numpy().tobytes()) for _ in range(epochs) for views in loader]


@pytest.mark.parametrize("name", ["train.beton", "train"])
def test_views_can_be_drawn_before_any_epoch_with_an_empty_cache(site: Path, server: WebServer, tmp_path: Path, name: str) -> None:
    def views_of(data: str, cache: Path) -> list[bytes]:
        with build_loader(
            DataConfig(train=data, workers=1, cache=str(cache), cache_gib=1.0), views=VIEWS, seed=5, global_batch=8
        ) as loader:
            return [batch.view1.numpy().tobytes() for batch in loader.views_of([3, 1, 20], epoch=2, batch=2)]

    assert views_of(f"{server.url}/{name}", tmp_path) == views_of(str(site / name), tmp_path)


def cached_bytes(cache: Path) -> int:
    total = 0
    for path in cache.rglob("*.block"):
        with contextlib.suppress(FileNotFoundError):  # it has just left
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("name", ["train", "train.beton"])
@pytest.mark.parametrize("traversal", ["random", "local"])
def test_batches_from_a_store_are_those_from_local_disk_and_come_from_the_cache_the_second_time(
    name: str, traversal: str, site: Path, server: WebServer, tmp_path: Path
) -> None:
    expected = batches_of(site / name, traversal=traversal, epochs=2)
    assert batches_of(f"{server.url}/{name}", tmp_path, traversal=traversal, epochs=2) == expected
    images = sum(sent for file, sent in server.sent.items() if file.endswith((".tar", ".beton")))
    assert 0.9 * images < cached_bytes(tmp_path) <= images  # each byte once
    server.sent.clear()
    assert batches_of(f"{server.url}/{name}", tmp_path, traversal=traversal, batch=2) == expected[2:5]
    assert sum(server.sent.values()) < 70_000  # manifest, or the head of the file's table


def test_an_epoch_larger_than_the_cache_reads_each_byte_once_and_the_cache_keeps_its_limit(
    site: Path, server: WebServer, tmp_path: Path
) -> None:
    largest, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not ended.wait(0.002):
            largest = max(largest, cached_bytes(tmp_path))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        got = batches_of(f"{server.url}/train", tmp_path, gib=SMALL_CACHE, epochs=3)
    finally:
        ended.set()
        watching.join()
    assert got == batches_of(site / "train", epochs=3)
    shards = {path.name: path.stat().st_size for path in (site / "train").glob("*.tar")}
    assert sum(shards.values()) > SMALL_CACHE * 2**30
    assert MIB < largest <= SMALL_CACHE * 2**30
    # At most once in each of the three epochs, and ahead for a fourth.
    assert all(0.9 * size < server.sent[f"train/{name}"] <= 4 * size for name, size in shards.items())


def test_two_ranks_of_a_machine_fetch_each_block_once_between_them(site: Path, server: WebServer, tmp_path: Path) -> None:
    expected = [batches_of(site / "train", rank=rank, world_size=2) for rank in range(2)]
    got: list[Batches] = [[], []]

    def run(rank: int) -> None:
        got[rank] = batches_of(f"{server.url}/train", tmp_path, rank=rank, world_size=2)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert got == expected
    assert all(server.sent[f"train/{path.name}"] <= path.stat().st_size for path in (site / "train").glob("*.tar"))


@pytest.mark.parametrize("fault", ["503", "cut", "damaged"])
def test_a_store_that_fails_for_a_while_costs_only_time(fault: str, site: Path, server: WebServer, tmp_path: Path, impatient: None) -> None:
    server.fault = lambda method, path: (
        fault if path.endswith(".tar") and not server.struck[f"{path}"] and not server.struck.update([path]) else ""
    )
    assert batches_of(f"{server.url}/train", tmp_path) == batches_of(site / "train")
    assert server.struck[fault] == 3  # each shard's first answer


def test_a_store_that_is_killed_ends_in_one_line_and_the_cache_stays_of_use(
    site: Path, server: WebServer, tmp_path: Path, impatient: None
) -> None:
    server.fault = lambda method, path: "503" if path.endswith(("1.tar", "2.tar")) else ""
    with pytest.raises(Lost, match=r"shard-0000[12]\.tar: the store did not answer in 3 tries .*continues from the last checkpoint"):
        batches_of(f"{server.url}/train", tmp_path)
    assert server.struck["503"] >= 3
    server.fault = lambda method, path: ""
    assert batches_of(f"{server.url}/train", tmp_path) == batches_of(site / "train")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("damaged", r"shard-00001\.tar: image \d+ has other bytes in the store than after the conversion"),
        ("404", r"shard-00001\.tar: no such file in the store"),
        ("403", r"shard-00001\.tar: the store refuses access \(403, "),
        ("whole", r"shard-00001\.tar: the server sends the whole file"),
    ],
)
def test_a_shard_that_is_damaged_missing_or_refused_is_named(fault: str, message: str, server: WebServer, tmp_path: Path) -> None:
    server.fault = lambda method, path: fault if path.endswith("1.tar") else ""
    with pytest.raises(UserError, match=message):
        batches_of(f"{server.url}/train", tmp_path)
    assert server.struck[fault]


def test_what_changed_or_was_cut_in_the_cache_is_fetched_again(site: Path, server: WebServer, tmp_path: Path) -> None:
    expected = batches_of(site / "train")
    assert batches_of(f"{server.url}/train", tmp_path) == expected
    changed, cut, _ = sorted(tmp_path.rglob("*.block"))
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:1000])
    server.sent.clear()
    assert batches_of(f"{server.url}/train", tmp_path) == expected
    assert len([name for name in server.sent if name.endswith(".tar")]) == 2


@pytest.mark.parametrize(("name", "table"), [("train", "samples.npy"), ("train.beton", "train.beton")])
def test_a_table_that_was_damaged_in_the_cache_is_fetched_again(
    name: str, table: str, site: Path, server: WebServer, tmp_path: Path
) -> None:
    expected = batches_of(site / name)
    assert batches_of(f"{server.url}/{name}", tmp_path) == expected
    (copy,) = tmp_path.rglob(table)
    size = copy.stat().st_size
    copy.write_bytes(b"")
    os.truncate(copy, size)  # as after a power cut
    assert batches_of(f"{server.url}/{name}", tmp_path) == expected


def test_a_table_that_is_damaged_on_its_way_is_fetched_again_and_one_in_the_store_is_named(
    site: Path, server: WebServer, tmp_path: Path
) -> None:
    server.fault = lambda method, path: "damaged" * (path.endswith("samples.npy") and method == "GET" and not server.struck["damaged"])
    assert batches_of(f"{server.url}/train", tmp_path / "once") == batches_of(site / "train")
    server.fault = lambda method, path: "damaged" * (path.endswith("samples.npy") and method == "GET")
    before = server.struck["damaged"]
    with pytest.raises(UserError, match=rf"^{server.url}/train/samples.npy: "):
        batches_of(f"{server.url}/train", tmp_path / "always")
    assert server.struck["damaged"] == before + 2


def test_a_copied_beton_is_flushed_before_it_gets_its_name_and_its_folder_after(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(f"rename {self}"), replace(self, to))[1])
    tables = store_tables.StoreTables(f"{server.url}/train.beton", root=tmp_path, limit_bytes=1 << 30, option="data.train")
    unfinished = tables.path.with_name("tables.unfinished")
    at = done.index(f"rename {unfinished}")
    assert (done[at - 1], done[at + 1]) == (str(unfinished), str(tables.path.parent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gib": SMALL_CACHE, "traversal": "random"}, "data.traversal = 'random': reads all .* take data.traversal local"),
        ({"gib": 1 / 1024}, "data.cache_gib = 0.000977: two windows of data.window_mib need up to"),
    ],
)
def test_a_cache_that_is_too_small_for_a_traversal_is_refused(options: dict, message: str, server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        batches_of(f"{server.url}/train", tmp_path, **options)


def test_data_that_are_not_there_or_another_file_are_refused_by_their_url(site: Path, server: WebServer, tmp_path: Path) -> None:
    (site / "other.beton").write_bytes(b"not a .beton file" * 100)
    for name, message in {
        "nothing": "http://.*/nothing: no such file in the store",
        "nothing.beton": "nothing.beton: no such file in the store",
        "other.beton": "http://.*/other.beton: not a .beton file of version 2",
    }.items():
        with pytest.raises(UserError, match=message):
            batches_of(f"{server.url}/{name}", tmp_path)
    with pytest.raises(UserError, match="^data.train = nowhere://x/train: fsspec knows no scheme 'nowhere'"):
        batches_of("nowhere://x/train", tmp_path)


def test_an_evaluation_loader_reads_a_store_without_reading_ahead(site: Path, tmp_path: Path) -> None:
    def images(data: str) -> list[bytes]:
        with build_image_loader(DataConfig(train=data, cache=str(tmp_path), workers=1), views=VIEWS, batch=8) as loader:
            return [batch.image.numpy().tobytes() for batch in loader]

    assert images(f"file://{site}/train") == images(str(site / "train"))


def test_a_run_from_a_store_ends_in_the_same_losses_and_keeps_no_credentials(
    site: Path, server: WebServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    url = server.url.replace("//", "//user:secret1@") + "/train?signature=secret2"
    command = ["--data.cache", str(cache), "--data.traversal", "local", "--mirror", f"file://{tmp_path}/mirror"]
    arguments = [*SMALL_RUN, "--epochs", "1", *command]
    monkeypatch.setattr("sys.argv", ["train.py", "--data.train", url, *arguments])
    train.main(["--data.train", url, "--out", str(run), *arguments])
    said = capfd.readouterr()
    files = [path for folder in (run, cache, tmp_path / "mirror") for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "provenance.json", "train.log", "step-000000005.json"} <= {path.name for path in files}
    for text in (said.out + said.err, *map(str, files), *(path.read_bytes().decode(errors="replace") for path in files)):
        assert "secret" not in text
    assert f"{server.url}/train" in (run / "config.yaml").read_text()


def test_a_store_that_is_gone_ends_a_run_with_its_exit_code(
    server: WebServer, tmp_path: Path, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    server.fault = lambda method, path: "503" if path.endswith(".tar") else ""
    with pytest.raises(SystemExit) as ended:
        train.main(
            [
                *SMALL_RUN,
                "--epochs",
                "1",
                "--data.train",
                f"{server.url}/train",
                "--data.cache",
                str(tmp_path / "c"),
                "--out",
                str(tmp_path / "r"),
            ]
        )
    assert ended.value.code == LOST_EXIT
    assert "fastbyol: error: http://127.0.0.1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rank", "world", "local", "on_node", "nodes"), [(5, 8, 1, 4, 2), (0, 1, 0, 1, 1), (3, 6, 0, 2, 0), (2, 5, 0, 2, 0)]
)
def test_nodes_must_have_equally_many_ranks(
    rank: int, world: int, local: int, on_node: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_node))
    count: Callable[[], int] = lambda: nodes_of(Process(rank=rank, world_size=world, device=None))  # type: ignore[arg-type] # noqa: E731
    if nodes:
        assert count() == nodes
    else:
        with pytest.raises(UserError, match="same number of ranks on each node"):
            count()
