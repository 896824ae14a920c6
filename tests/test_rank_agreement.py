"""Ranks that would train different things find out before the first step, and all of them end with the same message."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, OptimConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_image_loader
from fastbyol.data.inputs.images import list_images
from fastbyol.ranks.process_group import Process
from fastbyol.run import provenance, rank_agreement
from fastbyol.run.folder import FREE_TO_CHANGE
from fastbyol.run.rank_agreement import FREE_ON_EACH_RANK, opened_alike, require_same_start
from tests.forked import start_ranks

ALIKE = TrainConfig(out="here", data=DataConfig(train="a", workers=2))
STARTS = {
    "alike, but for paths and threads": TrainConfig(out="there", grace_s=9, data=DataConfig(train="b", workers=7)),
    "seed and rate": TrainConfig(seed=5, optim=OptimConfig(base_lr=1.0)),
    "global batch": TrainConfig(global_batch=512),
    "logging, in which all ranks take part": TrainConfig(log_every=3),
}


def _said(what) -> str:
    try:
        what()
    except UserError as error:
        return str(error)
    return ""


def _rank(rank: int, folder: str, data: dict[str, str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    process = Process(rank, 2, torch.device("cpu"))
    said = {name: _said(lambda: require_same_start(other if rank else ALIKE, process)) for name, other in STARTS.items()}  # noqa: B023
    digest = provenance.source_digest()
    rank_agreement.source_digest = lambda: "edited" if rank else digest
    said["code"] = _said(lambda: require_same_start(ALIKE, process))
    rank_agreement.source_digest = provenance.source_digest
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("fastbyol").addHandler(handler)
    rank_agreement.package_versions = lambda: {"torch": f"9.{rank}"}
    said["versions"] = _said(lambda: require_same_start(ALIKE, process)) + "".join(warned)
    for name, path in data.items():

        def open_data(path=path if rank else data["same"]):
            return build_image_loader(path, views=ViewPair(size_px=8), batch=2, option="data.train")

        said[name] = _said(lambda: opened_alike(open_data, process))
    torch.save(said, f"{folder}/said{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, beton: Path) -> list[dict[str, str]]:
    """Returns the output of each of two ranks, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    same = folder / "same"
    for name in ("ant", "bee"):
        (same / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 9 + i), (i, 90, 9)).save(same / name / f"{i}.png")
    data = {"same": same, "none": folder / "none", "fewer": folder / "fewer", "moved": folder / "moved", "names": folder / "names"}
    for name in ("fewer", "moved", "names"):
        shutil.copytree(same, data[name])
    (data["fewer"] / "ant" / "2.png").unlink()
    (data["moved"] / "ant" / "2.png").rename(data["moved"] / "bee" / "9.png")  # as many images, other labels
    (data["names"] / "bee").rename(data["names"] / "wasp")
    shutil.copytree(same, data.setdefault("pictures", folder / "pictures"))
    Image.effect_noise((64, 64), 90).convert("RGB").save(data["pictures"] / "ant" / "0.png")
    data["alike"] = folder / "alike"
    shutil.copytree(same, data["alike"])
    start_ranks(_rank, str(folder), {name: str(path) for name, path in data.items()})
    return [torch.load(folder / f"said{rank}.pt", weights_only=True) for rank in range(2)]


SAYS = {
    "alike, but for paths and threads": "",
    "seed and rate": "rank 1: seed = 5, where rank 0 has 0; optim.base_lr = 1.0, where rank 0 has 0.3",
    "global batch": "rank 1: global_batch = 512, where rank 0 has 4096",
    "logging, in which all ranks take part": "rank 1: log_every = 3",
    "code": "source edited, where rank 0 has",
    "same": "",
    "alike": "",
    "none": "data.train's state = unusable",
    "fewer": "data.train's number of images = 5, where rank 0 has 6",
    "moved": "data.train's labels = ",
    "names": "data.train's class names = ",
    "pictures": "data.train's images = ",
}


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "says"), SAYS.items(), ids=SAYS)
def test_both_ranks_say_the_same_of_what_differs_and_nothing_of_what_may(said, case, says):
    first, second = (each[case] for each in said)
    assert first == second
    assert (says in first) if says else first == ""


@pytest.mark.distributed
def test_other_versions_of_what_it_is_built_on_are_said_by_the_main_rank_and_no_obstacle(said):
    assert said[0]["versions"] == "rank 1 has other package versions, so results may differ between ranks: torch 9.1, rank 0 has 9.0"
    assert said[1]["versions"] == ""


def test_what_may_differ_from_rank_to_rank_may_differ_from_start_to_start():
    assert FREE_ON_EACH_RANK <= FREE_TO_CHANGE


def test_the_digest_of_the_source_changes_with_a_line_of_it(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "run").mkdir(parents=True)
    (package / "run" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(package / "run" / "a.py"))
    before = provenance.source_digest()
    assert before == provenance.source_digest()
    (package / "run" / "a.py").write_text("x = 2\n")
    assert provenance.source_digest() != before


def test_data_of_every_backend_have_a_fingerprint_that_their_labels_and_images_change(data_paths):
    from fastbyol.data.build import _open_source

    for backend, path in data_paths.items():
        source = _open_source(DataConfig(train=str(path), backend=backend), option="data")
        facts = source.fingerprint()
        assert facts == source.fingerprint()
        assert facts["number of images"] == "25"
        source.labels = source.labels[::-1].copy()
        assert {name for name, fact in source.fingerprint().items() if fact != facts[name]} == {"labels"}, backend
        source.close()


def test_images_of_the_same_names_and_file_sizes_have_another_fingerprint(tmp_path):
    from fastbyol.data.backends.folder_source import FolderSource

    facts = []
    for copy, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / copy / "class").mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / copy / "class" / "1.bmp")
        facts.append(FolderSource(list_images(tmp_path / copy)).fingerprint())
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"images"}


def test_images_without_checksums_have_a_fingerprint_of_their_bytes(beton, tmp_path):
    from fastbyol.data.backends.ffcv_source import FfcvSource
    from fastbyol.data.formats.beton import FIELD, HEADER, read_beton

    copy = Path(shutil.copy(beton, tmp_path / "x.beton"))
    table = read_beton(copy)
    content = bytearray(copy.read_bytes())
    at = HEADER.itemsize + FIELD.fields["arguments"][1]
    content[at : at + 16] = bytes(16)  # as stock FFCV writes it
    copy.write_bytes(content)
    before = FfcvSource(copy).fingerprint()
    content[table.offset[0] + table.size[0] - 3] ^= 1
    copy.write_bytes(content)
    after = FfcvSource(copy).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"images"}


def test_one_process_compares_nothing():
    require_same_start(dataclasses.replace(ALIKE, seed=3), Process(0, 1, torch.device("cpu")))
