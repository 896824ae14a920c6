"""Batch-norm statistics over groups of ranks: four processes in groups of two, against torch's batch norm on each group's images."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import PrecisionConfig, TrainConfig
from fastbyol.models.norm_relu import norm_relu
from fastbyol.models.view_batchnorm import ViewBatchNorm, use_all_ranks
from fastbyol.ranks.process_group import Process, leave_process_group
from fastbyol.run.bn_statistics import bn_group, bn_images, bn_ranks, check_bn_images
from tests.forked import start_ranks

RANKS, SHARED, IMAGES, CHANNELS, VIEWS = 4, 2, 3, 5, 2
FORMS = {"plain operations": torch.float64, "our kernel": torch.float32}
"""Number format that makes the layer take this form of its work on a CPU."""


def _views(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns this rank's images of both views; every rank's have another mean."""
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(IMAGES, CHANNELS, 4, 4, generator=generator, dtype=torch.float64) + rank).to(dtype) for _ in range(VIEWS)]


def _layer(dtype: torch.dtype) -> ViewBatchNorm:
    layer = ViewBatchNorm(CHANNELS, views=VIEWS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return layer


def _config(bn_ranks: int = SHARED, **fields: int) -> TrainConfig:
    return TrainConfig(**({"global_batch": RANKS * IMAGES} | fields), precision=PrecisionConfig(bn_ranks=bn_ranks))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    group = bn_group(_config(), Process(rank=rank, world_size=RANKS, device=torch.device("cpu")))
    results = {}
    for form, dtype in FORMS.items():
        layer = _layer(dtype)
        use_all_ranks(layer, group=group)
        x = torch.cat(_views(rank, dtype)).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = norm_relu(layer, x)
        (y**3).sum().backward()
        results[form] = {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad, **layer.state_dict()}
    if rank < SHARED:  # one group compiles: the import alone takes each process seconds
        compiled = torch.compile(_layer(torch.float64), fullgraph=True, dynamic=False, backend="aot_eager")
        use_all_ranks(compiled, group=group)
        results["compiled"] = {"y": torch.relu(compiled(torch.cat(_views(rank, torch.float64)))).detach()}
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave_process_group()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_rank, str(folder), ranks=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _whole_group(first: int) -> dict[str, torch.Tensor]:
    """Returns what torch's batch norm and ReLU give for the images of ranks first and first + 1 in one process, a view at a time."""
    norm = nn.BatchNorm2d(CHANNELS).double()
    norm.load_state_dict(_layer(torch.float64).state_dict())
    views = [torch.cat([_views(rank, torch.float64)[view] for rank in (first, first + 1)]).requires_grad_() for view in range(VIEWS)]
    outputs = [torch.relu(norm(view)) for view in views]
    sum((output**3).sum() for output in outputs).backward()
    # One rank's rows, one view after the other, as its layer has them.
    halves = [torch.cat([both.chunk(2)[half] for both in outputs]).detach() for half in range(2)]
    gradients = [torch.cat([view.grad.chunk(2)[half] for view in views]) for half in range(2)]
    buffers = {name: value for name, value in norm.state_dict().items() if "running" in name}
    return {"y": halves, "dx": gradients, "dw": norm.weight.grad, "db": norm.bias.grad, **buffers}


@pytest.mark.distributed
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", range(0, RANKS, SHARED))
def test_each_group_of_ranks_has_what_one_process_has_with_the_groups_images(form: str, first: int, ranks: list) -> None:
    whole, pair = _whole_group(first), [rank[form] for rank in ranks[first : first + SHARED]]
    exact = {"rtol": 1e-10, "atol": 1e-10} if FORMS[form] == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for half, rank in enumerate(pair):
        for name in ("y", "dx"):
            torch.testing.assert_close(rank[name].double(), whole[name][half], **exact)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(rank[name].double(), whole[name], **exact)
    for name in ("dw", "db"):  # stay local: DDP averages them
        torch.testing.assert_close(sum(rank[name].double() for rank in pair), whole[name], **exact)


@pytest.mark.distributed
def test_a_compiled_layer_shares_its_statistics_with_the_same_group(ranks: list) -> None:
    for rank in ranks[:SHARED]:
        torch.testing.assert_close(rank["compiled"]["y"], rank["plain operations"]["y"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shared", "fitting"), [(3, "2, 4"), (16, "2, 4"), (5, "2, 4")])
def test_a_number_that_does_not_divide_the_ranks_is_refused_with_those_that_do(shared: int, fitting: str) -> None:
    process = Process(rank=0, world_size=8, device=torch.device("cpu"))
    with pytest.raises(UserError) as refused:
        check_bn_images(_config(shared, global_batch=64), process)
    wanted = f"precision.bn_ranks = {shared}: must divide the number of ranks, 8; use 0 for all of them, or {fitting}"
    assert str(refused.value) == wanted


def test_it_needs_statistics_over_ranks_at_all() -> None:
    with pytest.raises(UserError, match=r"precision.bn_ranks = 2: must be 0 where precision.cross_replica_bn is false"):
        PrecisionConfig(bn_ranks=2, cross_replica_bn=False)


def test_the_images_of_a_group_are_counted_and_one_at_a_time_is_refused() -> None:
    process = Process(rank=0, world_size=8, device=torch.device("cpu"))
    config = _config(2, global_batch=64)
    assert (bn_ranks(config, process), bn_images(config, process)) == (2, 16)
    assert bn_images(_config(0, global_batch=64), process) == 64
    with pytest.raises(UserError, match="one image at a time"):
        check_bn_images(_config(1, global_batch=8), process)


def test_a_run_with_groups_says_how_many_images_its_batch_norm_sees(caplog, monkeypatch) -> None:
    monkeypatch.setattr("fastbyol.run.bn_statistics.rank_groups", lambda size, *, timeout_s: f"group of {size}")
    process = Process(rank=0, world_size=8, device=torch.device("cpu"))
    assert bn_group(_config(2, global_batch=64), process) == "group of 2"
    assert bn_group(_config(0, global_batch=64), process) == ""
    alone = TrainConfig(global_batch=64, precision=PrecisionConfig(cross_replica_bn=False))
    with caplog.at_level(logging.WARNING, "fastbyol"):
        for config, said in (
            (_config(2, global_batch=64), "batch norm sees 16 of the 64 images at a time (precision.bn_ranks = 2)"),
            (_config(1, global_batch=64), "batch norm sees 8 of the 64 images at a time (precision.bn_ranks = 1)"),
            (alone, "batch norm sees 8 of the 64 images at a time (precision.cross_replica_bn = false)"),
            (_config(0, global_batch=64), ""),
        ):
            caplog.clear()
            check_bn_images(config, process)
            assert said in caplog.text
            assert bool(said) == bool(caplog.text)
