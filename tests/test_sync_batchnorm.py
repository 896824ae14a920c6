"""Cross-replica batch norm: two ranks must equal one process that sees the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastbyol.byol import BYOL_OBJECTIVE, build_byol
from fastbyol.config.schema import ModelConfig, ObjectiveConfig
from fastbyol.models.view_batchnorm import ViewBatchNorm, convert_to_batchnorm, convert_to_view_batchnorm, use_all_ranks
from fastbyol.optim.lars import LARS
from fastbyol.optim.param_groups import byol_param_groups

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


def _byol_steps(model: nn.Module, byol, views, label, *, steps: int) -> list[float]:
    optimizer = LARS(byol_param_groups(byol), lr=5.0, weight_decay=1e-6)
    losses = []
    for _ in range(steps):
        output = model(*views, label)
        (output.loss + output.probe_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        byol.update_target(0.9)
        losses.append(output.loss.item())
    return losses


def _byol_and_batch(objective: ObjectiveConfig = BYOL_OBJECTIVE):
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)
    byol = build_byol(config, num_classes=3, objective=objective).double()
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(2, 8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return byol, views, torch.arange(8) % 3


SIMCLR_WITH_PREDICTOR = ObjectiveConfig(beta=1.0, alpha=0.1, target="online")


def _rank(rank: int, folder: str, split: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    share = slice(0, split) if rank == 0 else slice(split, 16)
    module = convert_to_view_batchnorm(_network(), views=1)
    use_all_ranks(module)
    x = _images(16)[share].clone().requires_grad_()
    y = module(x)
    (y**3).sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    half = slice(4 * rank, 4 * rank + 4)
    contrastive, views, label = _byol_and_batch(SIMCLR_WITH_PREDICTOR)
    use_all_ranks(contrastive)
    ddp = DistributedDataParallel(contrastive, broadcast_buffers=False)
    _byol_steps(ddp, contrastive, views[:, half], label[half], steps=2)
    byol, views, label = _byol_and_batch()
    use_all_ranks(byol)
    ddp = DistributedDataParallel(byol, broadcast_buffers=False, gradient_as_bucket_view=True)
    losses = torch.tensor(_byol_steps(ddp, byol, views[:, half], label[half], steps=3), dtype=torch.float64)
    dist.all_reduce(losses)
    torch.save(
        {
            "y": y.detach(),
            "dx": x.grad,
            "gradients": gradients,
            "buffers": module.state_dict(),
            "losses": losses / 2,
            "byol": byol.state_dict(),
            "contrastive": contrastive.state_dict(),
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[8, 13])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two ranks computed; of the 16 images, the first rank had 8 or 13."""
    folder = tmp_path_factory.mktemp(f"split{request.param}")
    mp.spawn(_rank, args=(str(folder), request.param), nprocs=2)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


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


def test_three_byol_steps_on_two_ranks_equal_one_rank_with_the_whole_batch(ranks):
    byol, views, label = _byol_and_batch()
    losses = _byol_steps(byol, byol, views, label, steps=3)
    torch.testing.assert_close(ranks[0]["losses"], torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    for name, value in byol.state_dict().items():
        torch.testing.assert_close(ranks[0]["byol"][name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert torch.equal(ranks[0]["byol"][name], ranks[1]["byol"][name]), name


def test_negatives_come_from_all_ranks_with_their_gradients(ranks):
    byol, views, label = _byol_and_batch(SIMCLR_WITH_PREDICTOR)
    _byol_steps(byol, byol, views, label, steps=2)
    for name, value in byol.state_dict().items():
        torch.testing.assert_close(ranks[1]["contrastive"][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_conversion_moves_the_very_tensors_keeps_names_and_leaves_the_target_frozen():
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


def test_on_one_process_each_view_is_normalised_alone_whatever_the_momentum():
    for momentum in (0.1, None):
        plain = nn.BatchNorm2d(6, momentum=momentum)
        converted = convert_to_view_batchnorm(nn.BatchNorm2d(6, momentum=momentum), views=2)
        use_all_ranks(converted)
        x = torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last)
        joint = converted(x)
        assert joint.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(joint, torch.cat([plain(x[:4]), plain(x[4:])]))
        for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(plain.eval()(x), converted.eval()(x))


def test_a_batch_that_does_not_hold_the_views_and_a_norm_that_does_more_are_refused():
    with pytest.raises(ValueError, match="batch of 7 does not hold 2 views"):
        convert_to_view_batchnorm(nn.BatchNorm1d(3), views=2)(torch.zeros(7, 3))
    with pytest.raises(ValueError, match="InstanceStyleNorm: a batch norm of this class"):
        convert_to_view_batchnorm(type("InstanceStyleNorm", (nn.BatchNorm2d,), {})(3), views=2)
