"""Data at URLs in converters, checks and evaluation: the same bytes as from a local folder, faults, and no secret anywhere.

A real web server on loopback, and fsspec's memory file system as a store that can be written to; tests/long/object_stores.py has S3 and nginx.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fastbyol.__main__ import main
from fastbyol.config import urls
from fastbyol.config.errors import LOST_EXIT, USER_ERROR_EXIT, Lost, UserError, public_argument
from fastbyol.config.schema import DataConfig, TrainConfig
from fastbyol.config.urls import full_url, public_text, separated, shown_url, without_credentials
from fastbyol.data.backends.store_tables import StoreTables
from fastbyol.data.build import backend_of
from fastbyol.data.conversion import beton_writer, command_line, tar_writer
from fastbyol.data.inputs import tars as tars_module
from fastbyol.data.inputs.images import list_images
from fastbyol.evaluation.splits import split_paths
from fastbyol.host import stores, web_reading
from fastbyol.host.staged_output import StagedOutput
from fastbyol.host.store_copies import local_copy
from fastbyol.host.store_path import StorePath
from fastbyol.host.stores import Absent, Refused, retried
from tests.web_server import LONG_BYTES, SLOW_S, WebServer

WORDS = ("secretpw", "secrettoken")
ENCODER = ("--checkpoint", "tests/golden/scenes_encoder.pt", "--views.size_px", "32")


@pytest.fixture(autouse=True)
def _own_cache_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urls, "_known", {})
    monkeypatch.setattr(stores, "WAITS_S", (0.01, 0.01, 0.01))


@pytest.fixture(scope="module")
def served(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `colours` as folders, a tar, a list, Parquet and WebDataset's shards."""
    root = tmp_path_factory.mktemp("served")
    (root / "colours").symlink_to(colours)
    images = sorted(path for path in (colours / "train").rglob("*") if path.is_file())
    with tarfile.open(root / "train.tar", "w") as tar:
        tar.add(colours / "train", "train")
    for part in range(2):
        with tarfile.open(root / f"part-{part}.tar", "w") as tar:
            for path in images[part::2]:
                tar.add(path, path.name)
                (root / "x.cls").write_text(path.parent.name)
                tar.add(root / "x.cls", f"{path.stem}.cls")
    (root / "x.cls").unlink()
    (root / "list.csv").write_text(
        "path,label\n" + "".join(f"colours/train/{at.parent.name}/{at.name},{at.parent.name}\n" for at in images)
    )
    table = pa.table({"image": [path.read_bytes() for path in images], "label": [path.parent.name for path in images]})
    pa.parquet.write_table(table, root / "train.parquet")
    return root


@pytest.fixture
def server(served: Path) -> Iterator[WebServer]:
    with WebServer(served) as running:
        yield running


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def run(*arguments: str | Path) -> int:
    try:
        main(list(map(str, arguments)))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def convert(data: str | Path, out: str | Path, *options: str) -> int:
    return run("convert", "--data", data, "--out", out, "--workers", "1", *options)


@pytest.fixture(scope="module")
def local_beton(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("local") / "x.beton"
    assert convert(colours / "train", out) == 0
    return out.read_bytes()


@pytest.mark.parametrize("name", ["colours/train", "train.tar", "list.csv", "train.parquet", "part-{0..1}.tar", "part-*.tar"])
def test_the_listing_of_a_url_is_that_of_the_same_files_here(name: str, served: Path, server: WebServer) -> None:
    options = {"label_column": "label"} if name == "list.csv" else {}
    here, there = list_images(str(served / name), **options), list_images(f"{server.url}/{name}", **options)
    assert (there.files, there.labels, there.class_names, there.skipped) == (here.files, here.labels, here.class_names, here.skipped)
    assert there.digest() == here.digest()
    for index in (0, len(here.files) // 2, len(here.files) - 1):
        assert there.location(index).read() == here.location(index).read()
        assert pickle.loads(pickle.dumps(there.location(index))).read() == here.location(index).read()


def test_urls_that_differ_only_in_their_query_are_refused_in_a_list_as_in_a_command(
    served: Path, server: WebServer, tmp_path: Path
) -> None:
    first, second = sorted(path.relative_to(served) for path in (served / "colours/train").rglob("*.png"))[:2]
    listing = tmp_path / "list.txt"
    listing.write_text(f"{server.url}/{first}?id=1\n{server.url}/{second}?id=2\n{server.url}/{first}?id=1\n")
    assert len(list_images(listing).files) == 2
    listing.write_text(f"{server.url}/{first}?id=1\n{server.url}/{first}?id=2\n")
    message = f"{server.url}/{first}: is given with two different queries; fetch one of the files first"
    with pytest.raises(UserError, match=f"^{re.escape(f'{listing}: {message}')}$"):
        list_images(listing)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        list_images([f"{server.url}/{first}?id=1", f"{server.url}/{first}?id=2"])


def test_a_conversion_from_a_url_to_a_url_writes_the_bytes_of_a_local_one(
    local_beton: bytes, server: WebServer, memory: fsspec.AbstractFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = "memory://bucket/out", "memory://bucket/out/x.beton"
    assert convert(f"{server.url}/colours/train", out) == 0
    assert memory.cat("/bucket/out/x.beton") == local_beton
    assert sorted(memory.find("/bucket")) == [f"/bucket/out/x.beton{end}" for end in ("", ".json", ".report.json")]
    assert not [*(tmp_path / "cache/fastbyol/uploads").iterdir()]
    assert run("verify", out, "--source", f"{server.url}/colours/train") == 0
    assert run("info", out) == 0
    assert convert(f"{server.url}/colours/train", out) == USER_ERROR_EXIT
    assert "exists already" in capsys.readouterr().err
    assert split_paths(store) == (store, "")
    damaged = bytearray(local_beton)
    damaged[len(damaged) // 2] ^= 1
    memory.pipe("/bucket/out/x.beton", bytes(damaged))
    assert run("info", out) == USER_ERROR_EXIT
    assert "its sha256 is not the manifest's" in capsys.readouterr().err
    assert run("verify", out) == 1


def test_parts_of_several_machines_are_merged_in_a_store(
    colours: Path, memory: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = "memory://bucket/shards.v2"  # a name with a dot is a folder's too
    for part in ("0/2", "1/2"):
        assert convert(colours / "train", out, "--to", "dali", "--shard", part) == 0
    assert run("convert", "--to", "dali", "--out", out, "--merge") == 0
    assert sorted(name.rpartition("/")[2] for name in memory.find("/bucket")) == [
        *("manifest.json", "report.json", "samples.npy"),
        *(f"shard-0000{part}-of-00002-00000.{end}" for part in (0, 1) for end in ("idx", "tar")),
    ]
    assert run("verify", out, "--source", colours / "train") == 0
    assert backend_of(out, option="--data") == "dali"
    assert run("convert", "--to", "dali", "--out", out, "--merge") == USER_ERROR_EXIT
    assert "holds a complete data set already" in capsys.readouterr().err


def test_an_upload_that_was_stopped_goes_on_without_another_conversion(
    colours: Path,
    local_beton: bytes,
    memory: fsspec.AbstractFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, put = "memory://bucket/x.beton", memory.put_file
    struck = []

    def failing(path: str, target: str) -> None:
        if target.endswith(".beton"):
            struck.append(path)
            raise OSError("the connection is lost")
        put(path, target)

    monkeypatch.setattr(type(memory), "put_file", lambda self, path, target: failing(path, target))
    assert convert(colours / "train", out) == LOST_EXIT
    assert len(struck) == 4
    assert Path(struck[0]).read_bytes() == local_beton  # nothing is lost
    assert convert(colours / "val", out) == USER_ERROR_EXIT
    assert "made with data" in capsys.readouterr().err
    monkeypatch.undo()
    os.environ["XDG_CACHE_HOME"] = str(Path(struck[0]).parents[3])
    assert convert(colours / "train", out) == 0
    assert "its upload goes on" in capsys.readouterr().out
    assert memory.cat("/bucket/x.beton") == local_beton


@pytest.mark.parametrize("name", ["x.beton", "shards"])
def test_an_output_that_was_complete_when_its_command_ended_is_uploaded_by_the_next(
    name: str, colours: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError  # as '| head' closes stdout

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "print_outcome", closed)
        patch.setattr(os, "dup2", lambda *_: None)
        assert convert(colours / "train", f"memory://bucket/{name}") == 128 + signal.SIGPIPE
    assert not memory.find("/bucket")
    monkeypatch.setattr(beton_writer, "convert_images", None)
    monkeypatch.setattr(tar_writer, "convert_images", None)
    assert convert(colours / "train", f"memory://bucket/{name}") == 0
    assert "its upload goes on" in capsys.readouterr().out
    assert run("verify", f"memory://bucket/{name}", "--source", colours / "train") == 0


def test_a_part_that_is_made_again_replaces_its_shards_in_a_store_and_a_merge_wants_all_of_them(
    colours: Path, memory: fsspec.AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "memory://bucket/shards"
    for part in ("0/2", "1/2"):
        assert convert(colours / "train", out, "--to", "dali", "--shard", part) == 0
    old = "/bucket/shards/shard-00000-of-00002-00005.tar"
    memory.pipe(old, b"of an earlier conversion")
    assert convert(colours / "train", out, "--to", "dali", "--shard", "0/2", "--restart") == 0
    assert not memory.exists(old)
    shard = "/bucket/shards/shard-00001-of-00002-00000.tar"
    content = memory.cat(shard)
    memory.pipe(shard, content[:-512])
    assert run("convert", "--to", "dali", "--out", out, "--merge") == USER_ERROR_EXIT
    assert "(cut or replaced); remove memory://bucket/shards/part-00001-of-00002.json and convert" in capsys.readouterr().err
    memory.pipe(shard, content)
    assert run("convert", "--to", "dali", "--out", out, "--merge") == 0


def test_an_output_at_a_file_url_makes_the_folders_that_a_store_does_not_need(colours: Path, tmp_path: Path) -> None:
    out = f"file://{tmp_path}/mounted/shards"
    for part in ("0/2", "1/2"):
        assert convert(f"file://{colours}/train", out, "--to", "dali", "--shard", part) == 0
    assert run("convert", "--to", "dali", "--out", out, "--merge") == 0
    assert run("verify", tmp_path / "mounted" / "shards", "--source", colours / "train") == 0


def test_features_are_the_same_from_a_url_and_are_written_to_one(
    colours: Path, server: WebServer, memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    assert run("embed", *ENCODER, "--data", colours / "val", "--out", tmp_path / "x.npz", "--workers", "1") == 0
    assert run("embed", *ENCODER, "--data", f"{server.url}/colours/val", "--out", "memory://bucket/x.npz", "--workers", "1") == 0
    with np.load(tmp_path / "x.npz") as here, np.load(memory.open("/bucket/x.npz")) as there:
        for name in ("feature", "label", "name"):
            assert np.array_equal(here[name], there[name])
        facts, remote = (json.loads(str(arrays["facts"])) for arrays in (here, there))
    assert remote == facts | {"data": f"{server.url}/colours/val"}
    assert split_paths(f"{server.url}/colours") == (f"{server.url}/colours/train", f"{server.url}/colours/val")


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_server_that_fails_for_a_while_changes_no_byte(fault: str, local_beton: bytes, server: WebServer, tmp_path: Path) -> None:
    server.fault = lambda method, path: fault if server.struck[fault] < 3 and (fault == "503" or path.endswith(".png")) else ""
    assert convert(f"{server.url}/colours/train", tmp_path / "x.beton") == 0
    assert server.struck[fault] == 3
    assert (tmp_path / "x.beton").read_bytes() == local_beton


def test_a_server_that_stays_away_ends_in_one_line(server: WebServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = lambda method, path: "503" if path.endswith("5.png") and method == "GET" else ""
    # Not in a conversion, whose workers are processes of their own and wait for a minute.
    place = StorePath.of(f"{server.url}/colours/train/red/5.png")
    with pytest.raises(Lost, match="did not answer in 4 tries"):
        place.read_bytes()
    assert server.struck["503"] == 4
    assert run("info", f"{server.url}/colours/train/") == LOST_EXIT
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastbyol: error: {server.url}/colours/train/")


def test_a_copy_is_fetched_once_and_goes_on_where_it_stopped(served: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbyol.host.store_copies.PART_BYTES", 1 << 12)
    monkeypatch.setattr("fastbyol.host.store_copies._SAVED_EVERY", 1)
    monkeypatch.setattr("fastbyol.host.store_copies._PARTS_AT_ONCE", 1)
    place, content = StorePath.of(f"{server.url}/train.tar"), (served / "train.tar").read_bytes()
    server.fault = lambda method, path: "503" if server.asked["GET"] > 10 else ""
    with pytest.raises(Lost):
        local_copy(place)
    server.fault, server.asked["GET"] = lambda method, path: "", 0
    path, is_new = local_copy(place)
    assert (path.read_bytes(), is_new) == (content, True)
    assert server.asked["GET"] == -(-len(content) // (1 << 12)) - 10
    assert local_copy(place) == (path, False)
    path.write_bytes(content[:-1])
    assert local_copy(place) == (path, True)


def test_a_write_of_less_than_a_part_ends_the_copy_and_leaves_no_hole(
    served: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbyol.host.store_copies.PART_BYTES", 1 << 15)
    monkeypatch.setattr("fastbyol.host.store_copies._SAVED_EVERY", 1)
    place, pwrite, written = StorePath.of(f"{server.url}/train.tar"), os.pwrite, []

    def cut_once(descriptor: int, data: bytes, offset: int) -> int:
        written.append(offset)
        return pwrite(descriptor, data[:100] if len(data) == 1 << 15 and offset == 1 << 15 else data, offset)

    monkeypatch.setattr(os, "pwrite", cut_once)
    with pytest.raises(UserError, match=r"train.tar cannot be copied there \(No space left on device\); make room"):
        local_copy(place)
    assert 1 << 15 in written
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert local_copy(place)[0].read_bytes() == (served / "train.tar").read_bytes()


@pytest.mark.parametrize("name", ["a%2Fb.beton", "..%2F..%2Fx.beton", "a%00.beton"])
def test_a_name_that_no_file_here_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"https://h/{name}: its name holds a '/'"):
        local_copy(StorePath.of(f"https://h/{name}"))
    with pytest.raises(UserError, match=f"https://h/{name}: its name holds a '/'"):
        StoreTables(f"https://h/{name}", root=tmp_path, limit_bytes=1, option="data.train")


def test_a_server_without_ranges_is_refused_before_it_sends_everything(server: WebServer) -> None:
    server.fault = lambda method, path: "whole" if path.endswith(".tar") else ""
    with pytest.raises(UserError, match="sends the whole file when a part is asked for"):
        StorePath.of(f"{server.url}/train.tar").read(1000, 10)


@pytest.mark.parametrize(
    ("status", "kind", "words"), [("404", Absent, "no such file"), ("403", Refused, "refuses access"), ("401", Refused, "credentials")]
)
def test_what_no_second_try_would_change_is_said_at_once(status: str, kind: type, words: str, server: WebServer) -> None:
    server.fault = lambda method, path: status
    for ask in (StorePath.stat, StorePath.read_bytes, StorePath.children):
        with pytest.raises(kind, match=words):
            ask(StorePath.of(f"{server.url}/colours"))
    assert server.asked["GET"] <= 3


def test_secrets_of_a_url_reach_the_server_and_nothing_else(
    server: WebServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = server.url.replace("//", f"//user:{WORDS[0]}@")
    query = f"?token={WORDS[1]}"
    assert convert(f"{secret}/train.tar{query}", tmp_path / "x.beton") == 0
    assert run("embed", *ENCODER, "--data", f"{secret}/colours/val", "--out", tmp_path / "x.parquet", "--workers", "1") == 0
    assert run("info", f"{secret}/train.tar{query}", "--json") == 0
    for command in (
        ("convert", "--data", f"{secret}/absent.tar{query}", "--out", tmp_path / "y.beton"),
        ("convert", "--data", f"{secret}/colours/train{query}", "--out", tmp_path / "y.beton"),
        ("convert", "--data", f"{secret}/x{query}", "--out", f"{secret}/y.beton{query}"),
        ("convert", "--data", f"s3://user:{WORDS[0]}@bucket/x{query}", f"--out=https://user:{WORDS[0]}@h/x.beton{query}"),
        ("info", f"a::{secret}/absent{query}"),
        ("info", f"{secret}/absent{query}::b"),
        ("info", f"https://user:{WORDS[0]}/x@h/y"),
        ("verify", f"{secret}/absent.beton{query}"),
        ("embed", *ENCODER, "--data", f"{secret}/absent{query}", "--out", tmp_path / "z.npz"),
        ("evaluate", "all", *ENCODER, "--data", f"{secret}/absent{query}"),
        ("evaluate", "all", *ENCODER, "--data", f"{secret}/colours", "--subset", f"{secret}/list{query}"),
        ("evaluate", "detection", *ENCODER, "--settings", "quick", "--data", f"{secret}/absent{query}"),
        ("train", "--preset", "cpu_demo", f"--data.train={secret}/absent{query}", "--out", f"{secret}/run{query}"),
        ("subset", "--data", f"{secret}/train.tar{query}", "--out", f"{secret}/list.txt"),
    ):
        assert run(*command) in (USER_ERROR_EXIT, LOST_EXIT), command
    assert server.authorised > 100
    printed = "".join(capfd.readouterr())
    assert "absent" in printed
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert server.url.encode() in written
    for word in WORDS:
        assert word not in printed
        assert word.encode() not in written


def test_urls_are_shown_without_secrets_and_opened_with_them() -> None:
    typed = f"a::https://user:{WORDS[0]}@host:8/x/y.tar?sig={WORDS[1]}::s3://bucket/z"
    assert public_text(typed) == "a::https://host:8/x/y.tar::s3://bucket/z"
    assert full_url("https://host:8/x/y.tar") == f"https://user:{WORDS[0]}@host:8/x/y.tar?sig={WORDS[1]}"
    assert full_url("https://host:8/x/other") == f"https://user:{WORDS[0]}@host:8/x/other"
    assert full_url("s3://bucket/z") == "s3://bucket/z"
    assert separated("http://[::1]:80/x::b") == ["http://[::1]:80/x", "b"]
    assert shown_url(typed[3:].partition("::s3")[0]) == "https://host:8/x/y.tar"
    assert (
        without_credentials(f"404 for url='https://user:{WORDS[0]}@host:8/x?sig={WORDS[1]}', {WORDS[0]}")
        == "404 for url='https://host:8/x', ***"
    )
    for unclear in ("https://u:a/b@host/x", "https://host/x?sig=a::b", "https://host/x?id=1::https://host/x?id=2"):
        with pytest.raises(UserError):
            public_argument(unclear)
    place = StorePath.of(f"https://user:{WORDS[0]}@host:8/x/")
    assert (str(place / "a b.jpg"), (place / "a b.jpg").name, place.parent.url) == (
        "https://host:8/x/a%20b.jpg",
        "a b.jpg",
        "https://host:8",
    )
    assert WORDS[0] not in repr(place)
    assert DataConfig(train=f"https://user:{WORDS[0]}@host/x?q").train == "https://host/x"
    with pytest.raises(UserError, match="out = s3://bucket/run: is a URL"):
        TrainConfig(out="s3://bucket/run")


def test_no_more_than_was_asked_for_is_taken_from_a_server(served: Path, server: WebServer) -> None:
    tar = StorePath.of(f"{server.url}/train.tar")
    server.fault = lambda method, path: "long"
    with pytest.raises(UserError, match="train.tar: the server sends more than the 10 bytes that it is asked for; fetch the file first"):
        tar.read(600, 10)
    server.fault = lambda method, path: "whole"
    assert tar.read(0, 10) == (served / "train.tar").read_bytes()[:10]
    server.fault = lambda method, path: ""
    assert tar.read(600, 10) == (served / "train.tar").read_bytes()[600:610]
    assert server.sent["train.tar"] < LONG_BYTES  # the client was gone before the end


def test_a_server_that_sends_a_byte_now_and_then_does_not_hold_a_request(
    served: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_reading, "GRACE_S", 0.3)
    server.fault = lambda method, path: "slow" * (server.struck["slow"] < 2)
    tar = StorePath.of(f"{server.url}/train.tar")
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"^\d+ bytes arrived in 0 s"):
        tar.read_once(0, 1000)
    assert time.monotonic() - begun < SLOW_S
    assert tar.read_bytes() == (served / "train.tar").read_bytes()  # at the second try
    assert server.struck["slow"] == 2


@pytest.mark.parametrize("sign", ["#", "?"])
def test_signs_of_a_query_belong_to_the_names_of_objects(
    sign: str, served: Path, memory: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = [(served / f"part-{part}.tar").read_bytes() for part in range(2)]
    for part, tar in enumerate(tars):
        memory.pipe_file(f"/bucket/tars/part{sign}{part}.tar", tar)
        memory.pipe_file(f"/bucket/images/frame{sign}{part}.bmp", bytes([part]))
    images = list_images("memory://bucket/images", labels="none")
    sent = pickle.dumps([images.location(index) for index in range(2)])
    assert [location.read() for location in pickle.loads(sent)] == [b"\0", b"\1"]
    here = list_images(str(served / "part-*.tar"))
    for _ in range(2):  # the second listing is that of the index, which the first one writes
        there = list_images("memory://bucket/tars/part*.tar")
        assert there.places is not None
        assert list(map(str, there.places.containers)) == [f"memory://bucket/tars/part{sign}{part}.tar" for part in range(2)]
        assert [there.location(index).read() for index in range(len(there.files))] == [
            here.location(index).read() for index in range(len(here.files))
        ]
        monkeypatch.setattr(tars_module, "_scan", None)
    (tmp_path / "list.txt").write_text("".join(f"memory://bucket/images/frame{sign}{part}.bmp\n" for part in range(2)))
    with pytest.raises(UserError, match="memory://bucket/images/frame: is given with two different queries"):
        list_images(str(tmp_path / "list.txt"))


def test_a_place_takes_its_secrets_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps(StorePath.of(f"https://user:{WORDS[0]}@host/x?sig={WORDS[1]}") / "a.jpg")
    monkeypatch.setattr(urls, "_known", {})
    there = pickle.loads(sent)
    assert full_url(there.url) == f"https://user:{WORDS[0]}@host/x/a.jpg?sig={WORDS[1]}"
    assert full_url("https://host/other") == f"https://user:{WORDS[0]}@host/other"


def test_an_error_that_is_not_the_stores_is_not_tried_again() -> None:
    calls = []
    with pytest.raises(ZeroDivisionError):
        retried(lambda: calls.append(1) or 1 // 0, "x")
    assert calls == [1]
    with pytest.raises(UserError, match="web server cannot be written"):
        StagedOutput(StorePath("https://host/x"), settings={})
    with pytest.raises(UserError, match="fsspec knows no scheme 'nonsense'"):
        StorePath("nonsense://x/y").stat()
