"""Faults that strike on a GPU only, brought about here by stand-ins for torch.cuda's calls: where they are made, and with what."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu.syncs import PINNED
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader, dali_renderer

VIEWS = ViewPair(size_px=32)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Pretends that there is a GPU for the loader, and returns the list of tensors that are put into pinned memory."""
    made: list[torch.Tensor] = []
    empty = torch.empty

    def pinned_empty(*shape, pin_memory=False, **options):
        tensor = empty(*shape, **options)
        made.extend([tensor] if pin_memory else [])
        return tensor

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor)
        return tensor

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.empty", pinned_empty)
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    return made


def test_all_that_travels_to_the_gpu_is_pinned(image_folder: Path, pinned: list[torch.Tensor]) -> None:
    config = DataConfig(train=str(image_folder), workers=1, prefetch=1)
    with build_loader(config, views=VIEWS, seed=0, global_batch=4, output="uint8") as loader:
        batch = next(iter(loader))
    places = {tensor.data_ptr() for tensor in pinned}
    own = {name: getattr(batch, name).untyped_storage().data_ptr() in places for name in batch._fields}
    assert own == {name: name in PINNED for name in batch._fields}


def test_dalis_thread_works_on_the_ranks_own_gpu(tar_folder: Path, pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a property of each thread: on GPU 0, the events did not wait for the copies from DALI's buffers."""
    current = threading.local()
    recorded_on = []
    event = SimpleNamespace(record=lambda: recorded_on.append(getattr(current, "device", torch.device("cuda", 0))), query=lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: setattr(current, "device", device))
    monkeypatch.setattr("torch.cuda.Event", lambda: event)

    def run(jpeg, **boxes):
        crops = np.zeros((len(jpeg), 32, 32, 3), np.uint8)
        return [SimpleNamespace(as_tensor=lambda: torch.from_numpy(crops))] * 2

    monkeypatch.setattr(dali_renderer, "built_pipeline", lambda graph, **options: SimpleNamespace(run=run))
    gpu = torch.device("cuda", 3)
    with build_loader(
        DataConfig(train=str(tar_folder), workers=1), views=VIEWS, seed=0, global_batch=4, device=gpu, output="uint8"
    ) as loader:
        assert len(list(loader)) == len(recorded_on)
    assert set(recorded_on) == {gpu}
