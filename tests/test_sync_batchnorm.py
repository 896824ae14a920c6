"""Cross-replica batch norm: two ranks must equal one process that sees the whole batch."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbyol.byol import BYOL_OBJECTIVE, build_byol
from fastbyol.config.schema import ModelConfig, ObjectiveConfig, PrecisionConfig
from fastbyol.models.view_batchnorm import ViewBatchNorm, convert_to_batchnorm, convert_to_view_batchnorm, use_all_ranks
from fastbyol.objectives import byol_loss, infonce_beta_loss, least_squares_prediction
from fastbyol.optim.lars import LARS
from fastbyol.optim.param_groups import byol_param_groups
from fastbyol.ranks.data_parallel import gradient_reduction, replicate
from tests.forked import start_ranks

pytestmark = pytest.mark.distributed


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 16, 8, bias=False),
        nn.BatchNorm1d(8),
    ).double()


def _images(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 5


def _byol_steps(model: nn.Module, byol, micro_batches, *, steps: int) -> list[float]:
    """Optimizer steps over the same micro-batches (views, label, weight); returns the sum of weighted losses of each step."""
    optimizer = LARS(byol_param_groups(byol), lr=5.0, weight_decay=1e-6)
    losses = []
    for _ in range(steps):
        total = 0.0
        for i, (views, label, weight) in enumerate(micro_batches):
            with gradient_reduction(model, now=i == len(micro_batches) - 1):
                output = model(*views, label)
                (weight * (output.loss + output.probe_loss)).backward()
            total += weight * output.loss.item()
        optimizer.step(target_update=byol.target_update(0.9))
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _byol_and_batch(objective: ObjectiveConfig = BYOL_OBJECTIVE):
    torch.manual_seed(0)
    solved = {"predictor_layers": 0, "projection_dim": 4} if objective.predictor == "least_squares" else {"projection_dim": 8}
    config = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, **solved)
    byol = build_byol(config, num_classes=3, objective=objective).double()
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(2, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return byol, views, torch.arange(8) % 3


OVER_ALL_RANKS = {
    "negatives": ObjectiveConfig(beta=1.0, alpha=0.1, target="online"),
    "batch_norm": ObjectiveConfig(normalization="batch_norm"),
    "least_squares": ObjectiveConfig(predictor="least_squares"),
}
"""Objectives in which an image's loss depends on the images of other ranks."""


class NoHostSync(TorchDispatchMode):
    """Raises if an operation needs a value on the host, or a shape that depends on values: on a GPU the host would wait for it."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal", "_assert_async")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            raise AssertionError(f"host sync: {name}")
        return func(*args, **(kwargs or {}))


def _share(rank: int, split: int, count: int) -> slice:
    """Returns this rank's rows of `count`, where the first rank has `split` of 16."""
    cut = count * split // 16
    return slice(0, cut) if rank == 0 else slice(cut, count)


def _replicated(byol, *, accumulate: int) -> nn.Module:
    use_all_ranks(byol)
    return replicate(byol, PrecisionConfig(), accumulate=accumulate)


def _micro_batches(views, label, *, accumulate: int, rows) -> list:
    """Returns the rows of each micro-batch, weighted so that DDP's average of the sums over ranks is the mean over the whole
    micro-batch.
    """
    size = len(label) // accumulate
    parts = []
    for i in range(accumulate):
        part, part_label = views[:, i * size : (i + 1) * size][:, rows(size)], label[i * size : (i + 1) * size][rows(size)]
        parts.append((part, part_label, len(part_label) / size / accumulate))
    return parts


def _layer_alone(share: slice) -> dict:
    module = convert_to_view_batchnorm(_network(), views=1)
    use_all_ranks(module)
    x = _images(16)[share].clone().requires_grad_()
    with NoHostSync():
        y = module(x)
        (y**3).sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients, "buffers": module.state_dict()}


def _in_one_graph(share: slice) -> dict:
    """The whole network in one traced graph, forward and backward, with its collectives; float32, where compiled sums are reordered least."""
    module = convert_to_view_batchnorm(_network(), views=2).float()
    use_all_ranks(module)
    x = torch.cat([_images(16)[share], _images(16)[share] / 2]).float()
    results = {}
    for name, call in (
        ("eager", copy.deepcopy(module)),
        ("traced", torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")),
    ):
        leaf = x.clone().to(memory_format=torch.channels_last).requires_grad_()
        call(leaf).pow(3).sum().backward()
        results[name] = [leaf.grad, *(b.clone() for b in call.buffers())]
    return results


def _loss_over_all_ranks(name: str, *rows: torch.Tensor) -> torch.Tensor:
    """Computes each of those objectives on predictions 1 and 2, then projections 1 and 2."""
    if name == "negatives":
        return infonce_beta_loss(*rows, beta=1.0, alpha=0.1)
    if name == "batch_norm":
        return byol_loss(*rows, normalization="batch_norm")
    online1, online2, key1, key2 = rows
    return byol_loss(least_squares_prediction(online1, key2), least_squares_prediction(online2, key1), key1, key2)


def _in_one_graph_each(share: slice) -> dict:
    """Returns the gradient of the projections, eager and traced, by objective."""
    rows = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[:, share]
    gradients = {}
    for name in OVER_ALL_RANKS:
        loss = functools.partial(_loss_over_all_ranks, name)
        for how, call in (("eager", loss), ("traced", torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager"))):
            leaf = rows.clone().requires_grad_()
            call(*leaf).backward()
            gradients[f"{name} {how}"] = leaf.grad
    return gradients


def _with_bf16_messages(share: slice) -> dict:
    byol, views, label = _byol_and_batch()
    use_all_ranks(byol)
    model = replicate(byol, PrecisionConfig(gradient_messages="bf16"), accumulate=1)
    model(*views[:, share], label[share]).loss.backward()
    return {name: p.grad for name, p in byol.online.named_parameters()}


def _rank(rank: int, folder: str, split: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    result = _layer_alone(_share(rank, split, 16))
    if split == 8:
        half = _share(rank, split, 8)
        for name, objective in OVER_ALL_RANKS.items():
            byol, views, label = _byol_and_batch(objective)
            _byol_steps(_replicated(byol, accumulate=1), byol, [(views[:, half], label[half], 1.0)], steps=2)
            result[name] = byol.state_dict()
        result |= {"graph": _in_one_graph(_share(rank, split, 16)), "graphs": _in_one_graph_each(half)}
        result |= {"bf16_messages": _with_bf16_messages(half)}
    for accumulate in (1, 2):
        byol, views, label = _byol_and_batch()
        rows = functools.partial(_share, rank, split)
        parts = [(v, y, 2 * w) for v, y, w in _micro_batches(views, label, accumulate=accumulate, rows=rows)]
        losses = _byol_steps(_replicated(byol, accumulate=accumulate), byol, parts, steps=3)
        result[f"byol{accumulate}"] = byol.state_dict()
        result[f"losses{accumulate}"] = torch.tensor(losses, dtype=torch.float64) / 2
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _two_ranks(folder: Path, split: int) -> list[dict]:
    start_ranks(_rank, str(folder), split)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


@pytest.fixture(scope="module")
def equal_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Returns the results of two ranks, each with 8 of 16 images."""
    return _two_ranks(tmp_path_factory.mktemp("equal"), 8)


@pytest.fixture(scope="module")
def unequal_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The first rank had 12 of 16 images."""
    return _two_ranks(tmp_path_factory.mktemp("unequal"), 12)


@pytest.fixture(params=["equal_ranks", "unequal_ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return request.getfixturevalue(request.param)


def test_two_ranks_equal_one_process_also_with_shares_of_unequal_size(ranks):
    whole = _network()
    x = _images(16).requires_grad_()
    y = whole(x)
    (y**3).sum().backward()
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([r["y"] for r in ranks]), y.detach(), **exact)
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), x.grad, **exact)
    for rank in ranks:
        for ours, parameter in zip(rank["gradients"], whole.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, **exact)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(rank["buffers"][name], value, **exact)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_byol_steps_on_two_ranks_equal_one_rank_with_the_whole_batch(ranks, accumulate):
    """Covers steps that accumulate two micro-batches, and ranks with different shares of them."""
    byol, views, label = _byol_and_batch()
    losses = _byol_steps(byol, byol, _micro_batches(views, label, accumulate=accumulate, rows=lambda n: slice(0, n)), steps=3)
    ours = ranks[0][f"losses{accumulate}"] + ranks[1][f"losses{accumulate}"]
    torch.testing.assert_close(ours, torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    first, second = (rank[f"byol{accumulate}"] for rank in ranks)
    for name, value in byol.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("objective", OVER_ALL_RANKS)
def test_an_objective_that_compares_images_takes_them_from_all_ranks_with_gradients(objective, equal_ranks):
    byol, views, label = _byol_and_batch(OVER_ALL_RANKS[objective])
    _byol_steps(byol, byol, [(views, label, 1.0)], steps=2)
    for name, value in byol.state_dict().items():
        torch.testing.assert_close(equal_ranks[1][objective][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_network_with_it_is_one_graph_for_torch_compile_forward_and_backward(equal_ranks):
    for rank in equal_ranks:
        for traced, eager in zip(rank["graph"]["traced"], rank["graph"]["eager"], strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OVER_ALL_RANKS)
def test_collectives_are_part_of_the_one_compiled_graph(objective, equal_ranks):
    for rank in equal_ranks:
        traced, eager = (rank["graphs"][f"{objective} {how}"] for how in ("traced", "eager"))
        torch.testing.assert_close(traced, eager, rtol=1e-9, atol=1e-12)


def test_gradients_sent_in_bf16_equal_the_exact_ones_up_to_rounding(equal_ranks):
    byol, views, label = _byol_and_batch()
    byol(*views, label).loss.backward()
    errors = []
    for name, exact in byol.online.named_parameters():
        first, second = (rank["bf16_messages"][name] for rank in equal_ranks)
        assert torch.equal(first, second)
        if exact.grad.norm() > 1e-9:  # the bias before a batch norm has none
            errors.append(((first - exact.grad).norm() / exact.grad.norm()).item())
    assert 1e-4 < max(errors) < 2**-6


def test_the_detector_of_host_syncs_finds_them():
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.sum() > 0), lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="host sync"), NoHostSync():
            wait(torch.ones(3))


def test_conversion_keeps_the_same_tensors_and_names_and_leaves_the_target_frozen():
    network = _network()
    names, weight, mean = list(network.state_dict()), network[1].weight, network[1].running_mean
    network[1].weight.requires_grad_(False)
    convert_to_view_batchnorm(network, views=2)
    assert list(network.state_dict()) == names
    assert isinstance(network[1], ViewBatchNorm)
    assert network[1].weight is weight
    assert network[1].running_mean is mean
    assert not network[1].weight.requires_grad
    convert_to_batchnorm(network)
    assert [type(network[i]) for i in (1, 4, 7)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d]
    assert network[1].weight is weight


def test_torchs_sync_batch_norm_is_converted_and_its_state_loads_both_ways():
    plain, synced = _network(), nn.SyncBatchNorm.convert_sync_batchnorm(_network())
    plain(_images(6))
    converted = convert_to_view_batchnorm(synced, views=2)
    converted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(converted.eval()(_images(5)), plain.eval()(_images(5)))
    assert isinstance(convert_to_batchnorm(converted)[4], nn.SyncBatchNorm)
    _network().load_state_dict(converted.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_one_process_each_view_is_normalised_alone_whatever_the_momentum(momentum, layout):
    plain = nn.BatchNorm2d(6, momentum=momentum)
    converted = convert_to_view_batchnorm(nn.BatchNorm2d(6, momentum=momentum), views=2)
    use_all_ranks(converted)
    x = torch.randn(8, 6, 5, 5).to(memory_format=layout)
    joint = converted(x)
    assert joint.is_contiguous(memory_format=layout)
    # torch's own operation is used, or for channels-last our kernel, which rounds otherwise.
    exact = {"rtol": 0.0, "atol": 0.0} if layout == torch.contiguous_format else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(joint, torch.cat([plain(x[:4]), plain(x[4:])]), **exact)
    for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)
    converted.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(x), converted.eval()(x))


def test_a_batch_that_does_not_split_into_views_and_a_norm_that_does_more_are_refused():
    with pytest.raises(ValueError, match="batch of 7 does not hold 2 views"):
        convert_to_view_batchnorm(nn.BatchNorm1d(3), views=2)(torch.zeros(7, 3))
    with pytest.raises(ValueError, match="InstanceStyleNorm: a batch norm of this class"):
        convert_to_view_batchnorm(type("InstanceStyleNorm", (nn.BatchNorm2d,), {})(3), views=2)
