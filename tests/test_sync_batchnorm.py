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
from fastbyol.models.sync_batchnorm import CrossReplicaBatchNorm, convert_to_cross_replica
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
    module = convert_to_cross_replica(_network())
    x = _images(16)[share].clone().requires_grad_()
    y = module(x)
    (y**3).sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    half = slice(4 * rank, 4 * rank + 4)
    contrastive, views, label = _byol_and_batch(SIMCLR_WITH_PREDICTOR)
    ddp = DistributedDataParallel(convert_to_cross_replica(contrastive), broadcast_buffers=False)
    _byol_steps(ddp, contrastive, views[:, half], label[half], steps=2)
    byol, views, label = _byol_and_batch()
    ddp = DistributedDataParallel(convert_to_cross_replica(byol), broadcast_buffers=False, gradient_as_bucket_view=True)
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
    byol, _, _ = _byol_and_batch()
    names = list(byol.state_dict())
    weight = byol.online.encoder.bn1.weight
    convert_to_cross_replica(byol)
    assert list(byol.state_dict()) == names
    assert byol.online.encoder.bn1.weight is weight
    assert isinstance(byol.online.encoder.bn1, CrossReplicaBatchNorm)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in byol.modules())
    assert not any(p.requires_grad for p in byol.target.parameters())


def test_on_one_process_it_is_plain_batch_norm():
    plain = _network()
    converted = convert_to_cross_replica(_network())
    x = _images(6)
    assert torch.equal(plain(x), converted(x))
    assert torch.equal(plain.eval()(x), converted.eval()(x))
