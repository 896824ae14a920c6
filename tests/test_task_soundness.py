"""What is checked before a training: images of the test and held-out ones, on all ranks; and work that an earlier start has left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.views import PAPER
from fastbyol.evaluation.tasks.dense.files import decoded_size
from fastbyol.evaluation.tasks.images import open_labelled
from fastbyol.evaluation.tasks.linear import LinearSettings
from fastbyol.evaluation.tasks.soundness import require_sound
from fastbyol.ranks.process_group import Process
from tests.conftest import noisy_colours
from tests.dense_jobs import make_job
from tests.forked import start_ranks
from tests.test_report import call
from tests.test_task_linear import FAST

TYPED = {
    "linear": (*FAST, "--rates", "0.1,0.2"),
    "finetune": ("--epochs", "1", "--rates", "0.1", "--global_batch", "16", "--device", "cpu", "--workers", "1"),
}


def cut(image: Path) -> Path:
    """Takes the end of the image away: its header is whole."""
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return image


@pytest.mark.parametrize("task", TYPED)
def test_a_damaged_test_image_is_found_before_the_first_training_and_what_is_left_of_it_is_named(task, colours_run, tmp_path, capsys):
    data, out = noisy_colours(tmp_path / "data", train=8, val=3), tmp_path / "out"
    damaged = next((data / "val" / "red").iterdir())
    whole = damaged.read_bytes()
    cut(damaged)
    typed = ["evaluate", task, "--checkpoint", str(colours_run), "--data", str(data), "--out", str(out), *TYPED[task], "--init", "byol"]
    code, _, err = call(typed, capsys)
    assert code == 2
    assert f"({damaged}) does not decode" in err.splitlines()[-1]
    assert not list(out.glob("*.work-*/*")), "nothing is trained yet"
    damaged.write_bytes(whole)
    (stale := out / f"{task}.work-0123456789ab").mkdir(parents=True)
    code, _, err = call(typed, capsys)
    assert code == 0, err
    assert f"{stale}: unfinished work of {task}, with which its own command goes on; delete it where that is not wanted" in err
    subject = json.loads((out / f"{task}.json").read_text())["subjects"]["byol"]
    assert (subject["chosen"]["held_out_top1"] is not None) if task == "linear" else not subject["details"]["100 %"]["trials"]


def test_held_out_images_are_decoded_too_and_only_once_in_a_job(tmp_path: Path) -> None:
    data = noisy_colours(tmp_path / "data", train=2, val=1)
    job = make_job("linear", LinearSettings(), data=data, folder=tmp_path)
    with open_labelled(job, PAPER) as images:
        cut(data / "train" / images.train.image_names()[4])
        with pytest.raises(
            UserError, match=r"does not decode .* python -m fastbyol convert leaves out all that do not decode, and names them$"
        ):
            images.require_decodable(job, np.array([3, 4]))
        images.require_decodable(job, np.array([3]))
        images.require_decodable(job, np.array([3, 4]))


def test_an_image_of_a_dense_task_is_decoded_before_the_training_and_its_header_is_not_believed(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    assert decoded_size(tmp_path / "whole.jpg") == (40, 60)
    with pytest.raises(UserError, match="cannot be read as an image"):
        decoded_size(cut(tmp_path / "whole.jpg"))


def _shared(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    job = replace(
        make_job("linear", LinearSettings(), data=Path(folder), folder=Path(folder)), process=Process(rank, 2, torch.device("cpu"))
    )
    seen: list[int] = []

    def check(item: int) -> int:
        seen.append(item)
        if item > 10:
            raise UserError(f"{item} is too large")
        return 2 * item

    assert require_sound(job, "numbers", range(5), check) == [0, 2, 4, 6, 8]
    assert seen == [[0, 1], [2, 3, 4]][rank]
    with pytest.raises(UserError, match=r"^12 is too large \(2 of 4 numbers have such a fault\); correct it, or take it off the list$"):
        require_sound(job, "numbers", [1, 2, 12, 13], check)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_the_ranks_share_a_check_and_all_raise_what_one_of_them_finds(tmp_path: Path) -> None:
    start_ranks(_shared, str(tmp_path))
