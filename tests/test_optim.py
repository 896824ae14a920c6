"""LARS, the target's update and SGD against the official code, and the fused forms against their references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastbyol.config.schema import OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import ema_update, ema_update_reference
from fastbyol.optim.lars import LARS, lars_step_reference
from fastbyol.optim.param_groups import byol_param_groups

GOLDEN = Path(__file__).parent / "golden"


def _lars_case(precision):
    golden = np.load(GOLDEN / f"lars_wd1.5e-6_{precision}.npz")
    params = [torch.tensor(golden[f"p{i:02d}_init"]) for i in range(len(golden["names"]))]
    return golden, params


@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 6e-14), ("f32", 2e-5)])
def test_lars_follows_the_official_trajectory(precision, tolerance):
    golden, params = _lars_case(precision)
    groups = [
        {"params": [p for p, adapted in zip(params, golden["adapted"], strict=True) if adapted]},
        {"params": [p for p, adapted in zip(params, golden["adapted"], strict=True) if not adapted], "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, weight_decay=float(golden["weight_decay"]))
    for step, lr in enumerate(golden["lr"]):
        for i, p in enumerate(params):
            p.grad = torch.tensor(golden[f"p{i:02d}_grads"][step])
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for i, p in enumerate(params):
            trajectory = golden[f"p{i:02d}_params"]
            largest_move = max(np.abs(trajectory - golden[f"p{i:02d}_init"]).max(), 1e-30)
            assert np.abs(p.numpy() - trajectory[step]).max() <= tolerance * largest_move, (golden["names"][i], step)
            buffer = optimizer.state[p]["momentum_buffer"].numpy()
            largest = max(np.abs(golden[f"p{i:02d}_mu"]).max(), 1e-30)
            assert np.abs(buffer - golden[f"p{i:02d}_mu"][step]).max() <= tolerance * largest, (golden["names"][i], step)


def test_the_reference_step_follows_the_official_trajectory_too():
    golden, params = _lars_case("f64")
    for i, p in enumerate(params):
        buffer = torch.zeros_like(p)
        trajectory = golden[f"p{i:02d}_params"]
        largest_move = max(np.abs(trajectory - golden[f"p{i:02d}_init"]).max(), 1e-30)
        for step, lr in enumerate(golden["lr"]):
            gradient = torch.tensor(golden[f"p{i:02d}_grads"][step])
            lars_step_reference(
                p,
                gradient,
                buffer,
                lr=float(lr),
                momentum=0.9,
                weight_decay=float(golden["weight_decay"]),
                trust_coefficient=1e-3,
                adapt=bool(golden["adapted"][i]),
            )
            assert np.abs(p.numpy() - trajectory[step]).max() <= 6e-14 * largest_move


def test_lars_takes_the_learning_rate_as_a_tensor():
    values = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        p = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        p.grad = torch.linspace(2, 3, 12, dtype=torch.float64).reshape(3, 4)
        LARS([p], lr=lr, weight_decay=1e-3).step()
        values.append(p)
    assert torch.equal(*values)


def test_lars_resumes_from_its_state_dict():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    def steps(module, optimizer, num):
        for _ in range(num):
            optimizer.zero_grad()
            module(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)).square().sum().backward()
            optimizer.step()

    straight, broken = net(), net()
    make = lambda m: LARS(byol_param_groups(m), lr=0.3, weight_decay=1e-4)  # noqa: E731
    optimizer = make(straight)
    steps(straight, optimizer, 5)
    first = make(broken)
    steps(broken, first, 2)
    second = make(broken)
    second.load_state_dict(first.state_dict())
    steps(broken, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), broken.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "weight_decay": -1},
        {"lr": 0.1, "trust_coefficient": 0.0},
    ],
)
def test_lars_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be"):
        LARS([torch.zeros(2, 2)], **wrong)


def test_biases_and_batch_norm_skip_decay_and_adaptation_and_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    module[3].weight.requires_grad_(False)
    adapted, plain = byol_param_groups(module)
    assert [tuple(p.shape) for p in adapted["params"]] == [(4, 3, 3, 3)]
    assert adapted["adapt"]
    assert sorted(tuple(p.shape) for p in plain["params"]) == [(2,), (4,), (4,), (4,)]
    assert not plain["adapt"]
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 2.3e-16), ("f32", 1.2e-7)])
def test_target_update_equals_the_official_code(precision, tolerance):
    golden = np.load(GOLDEN / f"ema_{precision}.npz")
    for k in (0, 500, 1000):
        target = [torch.tensor(golden[f"target_{name}"]) for name in "abc"]
        online = [torch.tensor(golden[f"online_{name}"]) for name in "abc"]
        ema_update(target, online, float(golden[f"tau_k{k}"]))
        for t, name in zip(target, "abc", strict=True):
            expected = golden[f"new_{name}_k{k}"]
            # Exact or one unit in the last place was measured; ten of them allowed.
            np.testing.assert_allclose(t.numpy(), expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_fused_target_update_equals_the_loop_and_takes_tau_as_a_tensor():
    shapes = [(3, 4), (5,), (2, 3, 3, 3), ()]
    online = [torch.randn(s, dtype=torch.float64) for s in shapes]
    start = [torch.randn(s, dtype=torch.float64) for s in shapes]
    results = []
    for update, tau in ((ema_update, 0.99), (ema_update_reference, 0.99), (ema_update, torch.tensor(0.99, dtype=torch.float64))):
        target = [t.clone() for t in start]
        update(target, online, tau)
        results.append(target)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_target_update_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="must match"):
        ema_update([torch.zeros(1)], [], 0.9)


def test_nesterov_sgd_of_the_linear_evaluation_equals_the_official_code():
    golden = np.load(GOLDEN / "sgd_nesterov_f64.npz")
    params = [torch.tensor(golden["w_init"]), torch.tensor(golden["b_init"])]
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=float(golden["momentum"]), nesterov=True)
    for step, lr in enumerate(golden["lr"]):
        for p, name in zip(params, ("gw", "gb"), strict=True):
            p.grad = torch.tensor(golden[name][step])
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        for p, name in zip(params, ("w", "b"), strict=True):
            np.testing.assert_allclose(p.numpy(), golden[name][step], rtol=4e-14, atol=4e-14)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "torch_optimizer_lars"])
def test_every_optimizer_on_offer_lowers_a_loss(name):
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    x = torch.randn(20, 6)
    optimizer = build_optimizer(OptimConfig(name=name), module)
    losses = []
    for _ in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.zero_grad()
        loss = (module(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_torch_optimizers_lars_agrees_with_ours_where_the_decay_is_small():
    from torch_optimizer import LARS as TheirLARS

    start = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = start.clone(), start.clone()
    for p, cls in ((ours, LARS), (theirs, TheirLARS)):
        optimizer = cls([p], lr=0.2, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3)
        for _ in range(5):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
